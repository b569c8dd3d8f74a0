"""Work done ahead of whoever consumes it: by threads here, or by processes that share nothing with this one.

A loader process is started from nothing (no fork, so threads here cannot hang it), imports only what its work needs,
and talks through two pipes: jobs go in, results come out. Nothing else carries data, so neither a small ``/dev/shm``
nor a lost queue entry can leave the consumer waiting. It ends by itself when its input ends, that is, with us.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from utils.errors import DataError

STALL_SECONDS = 300  # without the result that is next in turn, before that is an error
JOBS_IN_FLIGHT = 2  # for each process: one that it works on, one that it finds when it is done
_ROOT = Path(__file__).resolve().parents[2]
_MAIN = "import sys; sys.path.insert(0, sys.argv[1]); from utils.data.loader import serve; serve()"

Job = TypeVar("Job")
Result = TypeVar("Result")


class LoaderError(DataError):
    """Loading stopped for a reason that is no image's: a process was killed, could not start, or nothing moves."""


class _InLoader(Exception):
    """The traceback of an error that a loader process had, as the cause of the same error here."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def load_ahead(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    ahead: int,
    processes: bool = False,
    name: Callable[[Job], str] = str,
) -> Generator[tuple[Job, Result], None, None]:
    """Yield ``(job, work(job))`` in the order of ``jobs``; close the generator to stop all work at once.

    Args:
        work: what to do; with ``processes``, it, its jobs and its results can be pickled.
        jobs: taken one by one, never more than ``ahead`` before their results are consumed.
        workers: how many threads or processes.
        ahead: how many jobs are at work or wait to be consumed.
        processes: work in processes of their own instead of threads of this one.
        name: of a job, for messages.

    Raises:
        LoaderError: a process cannot be started or was killed, or the next result does not come for
            ``STALL_SECONDS``.
        Exception: whatever ``work`` raised for the job whose turn it is.
    """
    crew: _Crew[Job, Result] = _Crew()
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    try:
        crew.start(work, workers, processes)
        for job in jobs:
            waiting.append((job, crew.submit(job)))
            if len(waiting) >= ahead:
                yield _finished(*waiting.popleft(), crew, name)
        while waiting:
            yield _finished(*waiting.popleft(), crew, name)
    finally:
        crew.stop()


def _finished(
    job: Job, future: "Future[Result]", crew: "_Crew[Job, Result]", name: Callable[[Job], str]
) -> tuple[Job, Result]:
    for _ in range(int(STALL_SECONDS)):  # short waits, so that a process that was suspended for hours is no stall
        try:
            return job, future.result(timeout=1.0)
        except FutureTimeoutError:
            if future.done():  # the error is of the work itself
                raise
        if crew.broken:
            raise crew.broken
    raise LoaderError(
        f"nothing was loaded for {STALL_SECONDS:.0f} s; the next in turn is {name(job)}: see whether its disk answers, "
        "then start again: what is done stays"
    )


class _Crew(Generic[Job, Result]):
    """Threads that take jobs in turn; each does them itself, or hands them to a process of its own.

    Attributes:
        broken: why no more results come, once a process is gone.
    """

    def __init__(self) -> None:
        self.broken: LoaderError | None = None
        self._todo: queue.SimpleQueue[tuple[Job, Future[Result]] | None] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def start(self, work: Callable[[Job], Result], workers: int, processes: bool) -> None:
        try:
            for _ in range(workers):
                if processes:
                    self._processes.append(process := _start_process(work))
                    self._start_thread(self._drive, process)
                else:
                    self._start_thread(self._work, work)
        except (OSError, RuntimeError) as error:  # RuntimeError: a thread cannot be started
            what = "processes" if processes else "threads"
            raise LoaderError(
                f"{workers} {what} that load images cannot be started ({getattr(error, 'strerror', None) or error}); "
                "lower num_workers, or raise the limits of processes and open files (ulimit -u, ulimit -n)"
            ) from None

    def submit(self, job: Job) -> "Future[Result]":
        future: Future[Result] = Future()
        self._todo.put((job, future))
        return future

    def stop(self) -> None:
        """End threads and processes, whatever they are at."""
        self._stopping = True
        for process in self._processes:
            process.kill()  # it holds nothing that could be lost
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot be killed
                process.wait(timeout=5)
        with contextlib.suppress(queue.Empty):
            while True:
                self._todo.get_nowait()
        self._todo.put(None)

    @staticmethod
    def _start_thread(target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()  # daemon: a stuck one must not hold the exit

    def _take(self, *, wait: bool) -> "tuple[Job, Future[Result]] | None":
        """The next job, or None if there is none; with ``wait``, if there will be none."""
        try:
            item = self._todo.get(block=wait)
        except queue.Empty:
            return None
        if item is None:
            self._todo.put(None)  # for the others
        return item

    def _work(self, work: Callable[[Job], Result]) -> None:
        while (item := self._take(wait=True)) is not None:
            job, future = item
            try:
                future.set_result(work(job))
            except BaseException as error:
                future.set_exception(error)

    def _drive(self, process: "subprocess.Popen[bytes]") -> None:
        """Keep one process busy: its next job is in its pipe before it is done with the last."""
        assert process.stdin is not None and process.stdout is not None
        in_flight: deque[Future[Result]] = deque()
        try:
            while True:
                while len(in_flight) < JOBS_IN_FLIGHT and (item := self._take(wait=not in_flight)) is not None:
                    in_flight.append(item[1])
                    pickle.dump(item[0], process.stdin, protocol=5)
                    process.stdin.flush()
                if not in_flight:
                    return
                succeeded, value = pickle.load(process.stdout)
                future = in_flight.popleft()
                if succeeded:
                    future.set_result(value)
                else:
                    future.set_exception(_as_here(*value))
        except (OSError, EOFError, pickle.UnpicklingError):
            if not self._stopping:
                self.broken = LoaderError(
                    f"a process that loads images was killed (process {process.pid}, {_how_it_ended(process)}); often "
                    "memory is short: lower num_workers, 0 needs none; start again afterwards: what is done stays"
                )
        finally:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


def _how_it_ended(process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "it closed its pipe"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _as_here(error: BaseException | None, text: str) -> BaseException:
    """The error of a loader process, with what it was there as its cause."""
    error = RuntimeError("an error that cannot be sent from a loader process") if error is None else error
    if not isinstance(error, DataError):  # a user's fault is one line: where it was raised says nothing
        error.__cause__ = _InLoader(text)
    return error


def _start_process(work: Callable[[Any], Any]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MAIN, str(_ROOT)]
    with _interrupts_held_back():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    pickle.dump(sys.path, process.stdin, protocol=5)  # what can be imported here can be imported there
    pickle.dump(work, process.stdin, protocol=5)
    process.stdin.flush()
    return process


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """What is started within never gets Ctrl-C: that is ours to answer, also while it still imports its modules."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in a loader process -----------------------------------------------------------------------------------------------


def serve() -> None:
    """Do what comes through standard input until it ends: where modules lie, the work, then its jobs."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the results
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where signals cannot be blocked by whoever started this
    jobs = sys.stdin.buffer
    try:
        sys.path[:] = pickle.load(jobs)
        work = pickle.load(jobs)
    except EOFError:  # stopped before it began
        return
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs, todo), daemon=True).start()
    while True:
        answer = _attempt(work, todo.get())
        try:
            pickle.dump(answer, results, protocol=5)
            results.flush()
        except OSError:  # whoever waited for it is gone
            os._exit(0)


def _receive(jobs: BinaryIO, todo: "queue.SimpleQueue[Any]") -> None:
    """Read jobs as they come, so that whoever sends them never waits; end the process when there will be none."""
    try:
        while True:
            todo.put(pickle.load(jobs))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _attempt(work: Callable[[Any], Any], job: Any) -> tuple[bool, Any]:
    try:
        return True, work(job)
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, (None, text)
        return False, (error, text)
