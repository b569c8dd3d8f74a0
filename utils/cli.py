"""The frame that all commands share: a user's fault is one line, output cannot fail, and the exit code is right.

Exit codes: what the command returns; 2 after a fault that the user can correct, or output that could not be written;
128 + signal after Ctrl-C or SIGTERM; 1 when the reader of the output, such as ``head``, has closed it.
"""

import argparse
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO, cast

from utils.errors import UserError, is_lack_of_memory

DEBUG = "TOSCA_DEBUG"  # =1 in the environment: every fault shows its traceback
HINT_GO_ON = "start the same command again to go on"
HINT_CORRECT = "correct that, then start again"
HINT_MEMORY = (
    "free some, raise its limit (ulimit -v) or lower what takes it (batch_size, feature_batch_size, num_workers), then "
    "start again"
)

# what a disk or the machine refuses, whatever the program does; every other OSError is a bug and shows its traceback
_OF_THE_MACHINE = {
    getattr(errno, name, None)
    for name in (
        *("EIO", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "ESTALE", "EMFILE", "ENFILE", "ENOLCK", "ENOMEM"),
        *("EACCES", "EPERM", "ENAMETOOLONG", "ELOOP", "ETIMEDOUT", "ENODEV", "ENXIO"),
    )
} - {None}


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, such as a cluster sends before it takes the machine away."""

    def __init__(self, number: int, hint: str | None = None) -> None:
        super().__init__()
        self.number, self.hint = number, hint  # hint: how to go on, where that is not what the command says


class OutputFailed(Exception):
    """Standard output cannot be written and nothing that follows matters; raised by ``SafeOutput.write``."""


class Parser(argparse.ArgumentParser):
    """Answers a mistake on the command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help shows the usage\n")


class SafeOutput:
    """A text stream on which writing cannot fail: no traceback, no lost line.

    A character that the stream's encoding does not have is written as an escape. After the first failure of the
    stream itself (its reader has closed it, its disk is full) ``error`` holds that, and nothing is written any more.

    Args:
        stream: where the text goes.
        ends_command: whether such a failure raises ``OutputFailed``.
    """

    def __init__(self, stream: TextIO, *, ends_command: bool = False) -> None:
        self.stream, self.ends_command = stream, ends_command
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``; return its length.

        Raises:
            OutputFailed: see the class.
        """
        if self.error is None:
            with self._failure_noted():
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    encoding = self.stream.encoding or "ascii"
                    self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand what was written to the operating system.

        Raises:
            OutputFailed: see the class.
        """
        if self.error is None:
            with self._failure_noted():
                self.stream.flush()

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            _discard(self.stream)
            if self.ends_command:
                raise OutputFailed from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _discard(stream: TextIO) -> None:
    """Let what ``stream`` still holds go nowhere: else Python would fail once more when it exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file of the operating system
        pass


def run_command(prog: str, action: Callable[[], int], *, hint: str = HINT_GO_ON, needs_output: bool = True) -> int:
    """Do what a command does; return its exit code.

    Args:
        prog: the command's name, in front of each line about a fault.
        action: the command; it returns an exit code.
        hint: how a user who stopped it can go on.
        needs_output: whether standard output is all that the command is for, so that it ends when that fails.
    """
    streams = sys.stdout, sys.stderr
    _occupy_standard_descriptors()
    out = SafeOutput(sys.stdout or _closed_stream(refuses=needs_output), ends_command=needs_output)
    err = SafeOutput(sys.stderr or _closed_stream(refuses=False))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        with _signals_as_exceptions():
            leaving: SystemExit | None = None
            try:
                try:
                    code = action()
                except SystemExit as exit_request:  # of argparse: --help, or a mistake on the command line
                    code, leaving = 0, exit_request
                sys.stdout.flush()
            except OutputFailed:
                code = 1 if isinstance(out.error, BrokenPipeError) else 2
            except Exception as error:
                fault = fault_of(error)
                if os.environ.get(DEBUG) == "1":
                    traceback.print_exc()
                print(f"{prog}: error: {fault}", file=sys.stderr)
                code = 2
            except KeyboardInterrupt as stop:
                stopped = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
                print(f"\n{prog}: stopped; {stopped.hint or hint}", file=sys.stderr)
                code = 128 + stopped.number
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            print(f"{prog}: error: standard output cannot be written ({out.error.strerror})", file=sys.stderr)
            code = code or 2
        sys.stderr.flush()
        if leaving is not None and not code:
            raise leaving
        return code
    finally:
        sys.stdout, sys.stderr = streams


def _occupy_standard_descriptors() -> None:
    """Open what whoever started the process has closed: else the next file would be where libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _closed_stream(*, refuses: bool) -> TextIO:
    """What stands for a stream that whoever started the process has closed: all goes nowhere, or writing fails."""
    return open(os.open(os.devnull, os.O_RDONLY if refuses else os.O_WRONLY), "w", encoding="utf-8")


def fault_of(error: Exception) -> UserError:
    """What a user is told about ``error``: itself, or what the machine refused; a bug of ours is raised again."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return UserError(f"{error.filename or 'a file'}: {error.strerror}; {HINT_CORRECT}")
    if is_lack_of_memory(error):
        reason = (str(error).strip().splitlines() or ["nothing says how much was asked for"])[0]
        return UserError(f"the memory does not suffice ({reason}); {HINT_MEMORY}")
    raise error


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Within, the first Ctrl-C or SIGTERM raises ``Stopped``; a second one ends the process at once, without a word."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    stopping = False

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise Stopped(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_process(code: int) -> NoReturn:
    """End the process with ``code``; a Ctrl-C while Python shuts down ends it at once, without a word."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code or 128 + signal.SIGINT))
    sys.exit(code)
