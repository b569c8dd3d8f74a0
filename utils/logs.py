"""Where log lines go: all to the run's file, in PILOT's form; those that matter at once to the terminal; and bars."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from utils.errors import UserError

LOG_FORMAT = "%(asctime)s [%(filename)s] => %(message)s"
FILE_ONLY = {"file_only": True}  # as ``extra`` of a log call: the line stays off the terminal


@contextmanager
def logging_to_terminal(*, shown: bool = True) -> Iterator[None]:
    """Send log lines to standard output, but for those of the file alone (progress bars go to standard error).

    All lines, ``shown`` or not, are kept for the next file that ``logging_to`` opens: a run says much before that.
    """
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    terminal.addFilter(lambda record: not getattr(record, "file_only", False))
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = [terminal, MemoryHandler(0)] if shown else [MemoryHandler(0)]
    root.setLevel(logging.INFO)
    for noisy in ("timm", "huggingface_hub", "httpx", "PIL", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Also write log lines to ``path``, appending; first those that were said while no log was open."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); set log_dir to another folder") from error
    file.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    before = root.handlers
    keeping = [handler for handler in before if isinstance(handler, MemoryHandler)]
    root.handlers = [file, *(handler for handler in before if handler not in keeping)]
    try:
        for handler in keeping:
            handler.setTarget(file)
            handler.flush()
            handler.setTarget(None)
        yield
    finally:
        root.handlers = before
        with suppress(OSError):  # every line is flushed when written: this error was raised then
            file.close()


class _LogFile(logging.FileHandler):
    """A log that cannot be written, such as on a full disk, ends the run; logging itself would go on in silence."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise  # logging calls this while it handles the error
        reason = error.strerror or str(error)
        raise UserError(f"the log cannot be written ({reason}); free space or set log_dir, then start again") from error


class _Lines:
    """A stream for a bar where there is no terminal: each state of it is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.flush = stream, stream.flush

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(text.strip() + "\n")


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar; in a file (a cluster's log) it writes a line every ten seconds instead of ten states a second."""
    if not sys.stderr.isatty():
        options = {**options, "file": _Lines(sys.stderr), "mininterval": 10.0}
    return tqdm(iterable, **{"file": sys.stderr, "dynamic_ncols": True, **options})


@contextmanager
def epoch_bar(title: str, epochs: int, *, shown: bool) -> Iterator[Callable[[float, float], None]]:
    """A bar over the epochs of a task; what it yields moves it on, called with an epoch's loss and accuracy in percent.

    Args:
        title: which task.
        epochs: how many there are.
        shown: false for a method that does not train in epochs.
    """
    with progress(total=epochs, desc=title, unit="epoch", leave=False, disable=not shown) as bar:

        def advance(loss: float, accuracy: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1f}", refresh=False)
            bar.update()

        yield advance
