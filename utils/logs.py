"""Where log lines go: all to the run's file, in PILOT's form; those that matter at once to the terminal; and bars."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.errors import UserError

LOG_FORMAT = "%(asctime)s [%(filename)s] => %(message)s"
FILE_ONLY = {"file_only": True}  # as ``extra`` of a log call: the line stays off the terminal


def set_up_logging() -> None:
    """Send log lines to standard output, but for those of the file alone (progress bars go to standard error)."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("timm", "huggingface_hub", "httpx", "PIL", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Also write log lines to ``path``, appending."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); set log_dir to another folder") from error
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # every line is flushed when written: this error was raised then
            handler.close()


class _LogFile(logging.FileHandler):
    """A log that cannot be written, such as on a full disk, ends the run; logging itself would go on in silence."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise  # logging calls this while it handles the error
        reason = error.strerror or str(error)
        raise UserError(f"the log cannot be written ({reason}); free space or set log_dir, then start again") from error


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar; in a file (a cluster's log) it writes a line every ten seconds instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, mininterval=interval, **options)


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
