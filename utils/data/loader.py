"""Work done ahead of whoever consumes it, in order: by threads here, or by processes that share nothing with this one.

A loader process is started from nothing (no fork, so threads here cannot hang it), imports only what its work needs,
and has a socket of its own to us: neither a small ``/dev/shm`` nor what it prints can leave the consumer waiting.
It ends by itself when its socket ends, that is, with us.
"""

import os
import pickle
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from utils.errors import DataError

_ROOT = Path(__file__).resolve().parents[2]
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from utils.data.loader import serve; serve(int(sys.argv[1]))"

Job = TypeVar("Job")
Result = TypeVar("Result")


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

    An error of ``work`` is raised when its job's turn comes, the end of a process as soon as it is seen.

    Args:
        work: what to do; with ``processes``, it, its jobs and its results can be pickled.
        jobs: taken one by one, never more than ``ahead`` before their results are consumed.
        workers: how many threads or processes.
        ahead: how many jobs are at work or wait to be consumed.
        processes: work in processes of their own; under Windows, which hands no socket down, in threads as well.
        name: of a job, for messages.
    """
    crew: _Processes[Job, Result] | _Threads[Job, Result]
    crew = _Processes(work, workers, name) if processes and sys.platform != "win32" else _Threads(work, workers)
    waiting: deque[tuple[Job, Future[Result]]] = deque()

    def next_in_turn() -> tuple[Job, Result]:
        job, future = waiting.popleft()
        return job, crew.result(future)

    try:
        for job in jobs:
            waiting.append((job, crew.submit(job)))
            if len(waiting) >= ahead:
                yield next_in_turn()
        while waiting:
            yield next_in_turn()
    finally:
        crew.stop()


class _Threads(Generic[Job, Result]):
    """Threads that take jobs in turn. They are daemons: one that waits for a dead disk must not hold the exit."""

    def __init__(self, work: Callable[[Job], Result], workers: int) -> None:
        self._work, self._workers = work, workers
        self._todo: queue.SimpleQueue[tuple[Job, Future[Result]] | None] = queue.SimpleQueue()
        for _ in range(workers):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, job: Job) -> "Future[Result]":
        future: Future[Result] = Future()
        self._todo.put((job, future))
        return future

    def result(self, future: "Future[Result]") -> Result:
        return future.result()

    def stop(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._todo.get_nowait()
        for _ in range(self._workers):
            self._todo.put(None)

    def _run(self) -> None:
        while (item := self._todo.get()) is not None:
            job, future = item
            try:
                future.set_result(self._work(job))
            except BaseException as error:
                future.set_exception(error)


class _Process(Generic[Job, Result]):
    """A loader process: the socket to it, and the jobs that it has not answered yet."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Job, Future[Result]]] = deque()
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno()), str(_ROOT), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints must not get into the output of a command
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for us to answer
            )

    def end(self) -> str:
        """Kill the process, if it is there; return how it ended."""
        self._process.kill()  # it holds nothing that could be lost
        self.socket.close()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot be killed
            self._process.wait(timeout=1)
        code = self._process.returncode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Processes(Generic[Job, Result]):
    """Loader processes. All is sent and received by the consumer's own thread, whenever it needs a result."""

    def __init__(self, work: Callable[[Job], Result], workers: int, name: Callable[[Job], str]) -> None:
        self._name, self._crew, self._selector = name, list[_Process[Job, Result]](), selectors.DefaultSelector()
        try:
            for _ in range(workers):
                self._crew.append(process := _Process[Job, Result]())
                self._selector.register(process.socket, selectors.EVENT_READ, process)
                _send(process.socket, _packed(work))
        except BaseException as error:
            self.stop()
            if not isinstance(error, OSError):
                raise
            raise DataError(
                f"{workers} processes that load images cannot be started ({error.strerror}); lower num_workers, or "
                "raise the limits of processes and open files (ulimit -u, ulimit -n)"
            ) from None

    def submit(self, job: Job) -> "Future[Result]":
        process, future = min(self._crew, key=lambda process: len(process.pending)), Future[Result]()
        process.pending.append((job, future))
        try:
            _send(process.socket, _packed(job))
        except OSError:
            raise self._ended(process) from None
        return future

    def result(self, future: "Future[Result]") -> Result:
        while not future.done():
            for ready, _ in self._selector.select():
                self._receive(ready.data)
        return future.result()

    def stop(self) -> None:
        for process in self._crew:
            process.end()
        self._selector.close()

    def _receive(self, process: _Process[Job, Result]) -> None:
        try:
            result, error, text = _receive(process.socket)
        except (EOFError, OSError):
            raise self._ended(process) from None
        _, future = process.pending.popleft()
        if error is None:
            future.set_result(result)
        else:
            error.__cause__ = RuntimeError(f"in a loader process:\n{text}")
            future.set_exception(error)

    def _ended(self, process: _Process[Job, Result]) -> DataError:
        at_work = f" while it was at {self._name(process.pending[0][0])}" if process.pending else ""
        return DataError(
            f"a process that loads images ended ({process.end()}){at_work}; often memory is short: lower num_workers, "
            "0 needs none; start again afterwards: what is done stays"
        )


# -- what both sides say -----------------------------------------------------------------------------------------------


def _packed(value: object) -> list[Any]:
    """What goes through a socket: the number of parts and the size of each, then these; arrays are not copied."""
    arrays: list[Any] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: arrays.append(buffer.raw()))
    sizes = [1 + len(arrays), len(head), *map(len, arrays)]
    return [b"".join(size.to_bytes(8, "big") for size in sizes) + head, *arrays]


def _send(to: socket.socket, parts: list[Any]) -> None:
    for part in parts:
        to.sendall(part)


def _receive(source: socket.socket) -> Any:
    sizes = [int.from_bytes(_exactly(source, 8), "big") for _ in range(int.from_bytes(_exactly(source, 8), "big"))]
    head, *arrays = [_exactly(source, size) for size in sizes]
    return pickle.loads(head, buffers=arrays)


def _exactly(source: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        count = source.recv_into(rest, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        rest = rest[count:]
    return content


# -- in a loader process -----------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Do what comes through a socket: first the work, then its jobs. The process ends when the socket does."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for whoever started this process to answer
        signal.signal(number, signal.SIG_IGN)
    ours, sender = socket.socket(fileno=descriptor), ThreadPoolExecutor(1)
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(ours, received), daemon=True).start()
    work = received.get()
    while True:
        sender.submit(_send, ours, _answer(work, received.get()))


def _listen(ours: socket.socket, received: "queue.SimpleQueue[Any]") -> None:
    """Take what comes at once, so that whoever sends it never waits, and its end is never missed."""
    try:
        while True:
            received.put(_receive(ours))
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(work: Callable[[Any], Any], job: Any) -> list[Any]:
    """The result, or the error and its traceback, packed."""
    try:
        return _packed((work(job), None, ""))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError("an error that cannot be sent")
        return _packed((None, error, text))
