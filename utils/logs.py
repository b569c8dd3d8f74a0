"""Log lines in PILOT's form, on the terminal and in the run's file."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

LOG_FORMAT = "%(asctime)s [%(filename)s] => %(message)s"


def set_up_logging() -> None:
    """Log lines to standard output in PILOT's form (progress bars go to standard error)."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stdout, force=True)
    for noisy in ("timm", "huggingface_hub", "httpx", "PIL", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Also write log lines to ``path``, appending."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); set log_dir to another folder") from error
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.handleError = _raise_log_error
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):  # every line is flushed when written: this error was raised then
            handler.close()


def _raise_log_error(record: logging.LogRecord) -> None:
    """A log that cannot be written, such as on a full disk, ends the run; logging itself would go on in silence."""
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        raise  # logging calls this while it handles the error
    reason = error.strerror or str(error)
    raise UserError(f"the log cannot be written ({reason}); free space or set log_dir, then start again") from error
