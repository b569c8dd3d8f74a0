"""The frame that all commands share: a user's fault is one line, output cannot fail, and the exit code is right.

Exit codes: what the command returns; 2 after a fault that the user can correct, or output that could not be written;
128 + signal after Ctrl-C or SIGTERM; 1 when the reader of the output, such as ``head``, has closed it.
"""

import argparse
import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from utils.errors import UserError, machine_fault

DEBUG = "TOSCA_DEBUG"  # =1 in the environment: every fault shows its traceback


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, such as a cluster sends before it takes the machine away."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class OutputFailed(Exception):
    """Standard output cannot be written and nothing that follows matters."""


class Parser(argparse.ArgumentParser):
    """Answers a mistake on the command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help shows the usage\n")


class SafeOutput:
    """A text stream whose failure (its reader has closed it, its disk is full) ends up in ``error``: no traceback.

    After it nothing is written any more. ``ends_command``: whether it raises ``OutputFailed``, too.
    """

    def __init__(self, stream: TextIO | None, *, ends_command: bool = False) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - it has no stream if started without one
        self.ends_command = ends_command
        self.error: OSError | None = None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # a character that the encoding does not have

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            if self.error is None:
                act()
        except OSError as error:
            self.error = error
            with suppress(OSError, ValueError):  # what the stream still holds would fail once more when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.ends_command:
                raise OutputFailed from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_command(
    prog: str, action: Callable[[], int], *, hint: str = "start it again", needs_output: bool = True
) -> int:
    """Do what a command does; return its exit code.

    Args:
        prog: the command's name, in front of each line about a fault.
        action: the command; it returns an exit code.
        hint: how a user who stopped it can go on.
        needs_output: whether standard output is all that the command is for, so that it ends when that fails.
    """
    streams = sys.stdout, sys.stderr
    out, err = SafeOutput(sys.stdout, ends_command=needs_output), SafeOutput(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        with signals_handled(_stop):
            code = _code_of(prog, action, hint)
        if out.error is not None:
            gone = isinstance(out.error, BrokenPipeError)
            if not gone:
                err.write(f"{prog}: error: standard output cannot be written ({out.error.strerror})\n")
            code = code or (int(needs_output) if gone else 2)
        err.flush()
        return code
    finally:
        sys.stdout, sys.stderr = streams


def _code_of(prog: str, action: Callable[[], int], hint: str) -> int:
    """Do what a command does, say in a line what went wrong, return the exit code."""
    try:
        try:
            code = action()
        except SystemExit as leaving:  # of argparse: --help, or a mistake on the command line
            code = int(leaving.code or 0)
        sys.stdout.flush()
        return code
    except OutputFailed:
        return 0
    except Exception as error:
        fault = fault_of(error)
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        print(f"{prog}: error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{prog}: stopped; {hint}", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def fault_of(error: Exception) -> UserError:
    """What a user is told about ``error``: itself, or what the machine refused; a bug of ours is raised again."""
    fault = error if isinstance(error, UserError) else machine_fault(error)
    if fault is None:
        raise error
    return fault


def _stop(number: int, _: object) -> None:
    """Answer the first Ctrl-C or SIGTERM; a second one ends the process at once, without a word."""
    _handle_signals(lambda again, _: os._exit(128 + again))
    raise Stopped(number)


@contextmanager
def signals_handled(handler: Any) -> Iterator[None]:
    """Give Ctrl-C and SIGTERM a handler for a while."""
    before = _handle_signals(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _handle_signals(handler: Any) -> dict[signal.Signals, Any]:
    """Give Ctrl-C and SIGTERM a handler; return those that they had. One that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        return {}
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def exit_process(code: int) -> NoReturn:
    """End the process with ``code``; a Ctrl-C while Python shuts down ends it at once, without a word.

    A notebook that ran the command goes on, with the handlers that it had.
    """
    atexit.register(_handle_signals, lambda number, _: os._exit(code or 128 + number))
    sys.exit(code)
