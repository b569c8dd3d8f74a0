"""Work done ahead of whoever consumes it, in order: by threads here, or by processes that share nothing with this one.

A loader process is started from nothing (no fork, so threads here cannot hang it), imports only what its work needs,
and has a socket of its own to us: neither a small ``/dev/shm`` nor what it prints can leave the consumer waiting. It
ends by itself when its socket ends, that is, with us.
"""

import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from utils.errors import DataError

_PATIENCE = 1.0  # seconds that a thread has to end; what waits for a dead disk is left behind
_ROOT = Path(__file__).resolve().parents[2]
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from utils.data.loader import serve; serve(int(sys.argv[1]))"

Job = TypeVar("Job")
Result = TypeVar("Result")
Answer = tuple[Any, BaseException | None]  # the result, or the error


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

    When a job's turn comes, so does the error that ``work`` raised, or the end of the process that had it.

    Args:
        work: what to do; with ``processes``, it, its jobs and its results can be pickled.
        jobs: taken one by one, never more than ``ahead`` before their results are consumed.
        workers: how many threads or processes; each gets every so manieth job.
        ahead: how many jobs are at work or wait to be consumed.
        processes: work in processes of their own; under Windows, which hands no socket down, in threads as well.
        name: of a job, for messages.
    """
    crew: list[_Thread | _Process] = []
    waiting: deque[tuple[Job, _Thread | _Process]] = deque()

    def in_turn() -> tuple[Job, Result]:
        job, worker = waiting.popleft()
        result, error = worker.receive(lambda: name(job))
        if error is not None:
            raise error
        return job, result

    try:
        for _ in range(workers):
            crew.append(_Process(work) if processes and sys.platform != "win32" else _Thread(work))
        for job, worker in zip(jobs, cycle(crew)):
            worker.send(job)
            waiting.append((job, worker))
            if len(waiting) >= ahead:
                yield in_turn()
        while waiting:
            yield in_turn()
    finally:
        for worker in crew:
            worker.stop()


def as_done(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int
) -> Generator[tuple[Job, Result | DataError], None, None]:
    """Yield ``(job, work(job))`` as processes get done, each of which takes the next job only then.

    A process that ends by itself takes its one job with it: the error stands for that result, and a new process goes
    on. Close the generator to kill them all.

    Args:
        work, jobs: as for ``load_ahead``.
        workers: how many processes (``--jobs``).
    """
    waiting, busy, idle = deque(jobs), dict[_Process, Job](), list[_Process]()
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process = idle.pop() if idle else _Process(work, "its process", "lower --jobs")
                busy[process] = waiting.popleft()
                process.send(busy[process])
            for process in select.select(list(busy), [], [])[0]:
                job = busy.pop(process)
                try:
                    result, error = process.receive(lambda: "its result")
                    idle.append(process)
                except DataError as ended:
                    result, error = ended, None
                if error is not None:
                    raise error
                yield job, result
    finally:
        for process in (*busy, *idle):
            process.stop()


class _Thread:
    """A thread that does one job after another. It is a daemon: if it waits for a dead disk, that holds no exit.

    Any other is waited for: a thread that is within PyTorch while Python shuts down aborts the process.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work, self._stopped = work, False
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, job: object) -> None:
        self._jobs.put(job)

    def receive(self, _: object = None) -> Answer:
        return self._answers.get()

    def stop(self) -> None:
        self._stopped = True
        self._jobs.put(None)
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if self._stopped:
                return
            try:
                self._answers.put((self._work(job), None))
            except BaseException as error:
                self._answers.put((None, error))


class _Process:
    """A process that works, as seen from here: it shows no bar, and Pillow and NumPy need no threads of their own.

    Args:
        work: what to do with each job.
        what: which process it is, for messages.
        hint: what helps where memory is short.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        what: str = "a process that loads images",
        hint: str = "lower num_workers, 0 needs none",
    ) -> None:
        self._what, self._hint = what, hint
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX", "TQDM_DISABLE"), "1")
        try:
            self._socket, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, str(theirs.fileno()), str(_ROOT), *map(str, sys.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a library prints must not get into the output of a command
                    env={**os.environ, **one},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a terminal's Ctrl-C is for us to answer
                )
        except OSError as error:
            raise DataError(
                f"{what} cannot be started ({error.strerror}); {hint}, or raise the limits of processes and open files "
                "(ulimit -u, ulimit -n)"
            ) from None
        self._answers = self._socket.makefile("rb")
        self.send(work)

    def fileno(self) -> int:
        """Of the socket: ready to be read when the answer is there, or the process has ended."""
        return self._socket.fileno()

    def send(self, job: object) -> None:
        content = pickle.dumps(job, protocol=5)
        with suppress(OSError):  # it has ended: ``receive`` says so
            self._socket.sendall(content)

    def receive(self, name: Callable[[], str]) -> Answer:
        try:
            result, error, text = pickle.load(self._answers)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.stop()
            code = self._process.returncode or 0
            raise DataError(
                f"{self._what} ended ({f'signal {-code}' if code < 0 else f'exit code {code}'}) before it had handed "
                f"over {name()}; often memory is short: {self._hint}; start again afterwards: what is done stays"
            ) from None
        if error is not None:
            error.__cause__ = RuntimeError(f"in a loader process:\n{text}")
        return result, error

    def stop(self) -> None:
        self._process.kill()  # it holds nothing that could be lost
        self._answers.close()
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot be killed
            self._process.wait(timeout=1)


def serve(descriptor: int) -> None:
    """In a loader process: do what comes through a socket until it ends; first the work, then its jobs."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for whoever started this process to answer
        signal.signal(number, signal.SIG_IGN)
    try:
        with socket.socket(fileno=descriptor).makefile("rwb") as us:
            worker = _Thread(pickle.load(us))
            threading.Thread(target=_answer, args=(worker, us), daemon=True).start()
            while True:  # take what comes at once, so that whoever sends it never waits, and its end is never missed
                worker.send(pickle.load(us))
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(worker: _Thread, us: BinaryIO) -> None:
    """Send results and errors as they come."""
    while True:
        result, error = worker.receive()
        text = "".join(traceback.format_exception(error)) if error else ""
        try:
            pickle.dump((result, error, text), us, protocol=5)
            us.flush()
        except BaseException as other:
            if not isinstance(other, ConnectionError):  # whoever waited for it is gone
                traceback.print_exc()
            os._exit(1)
