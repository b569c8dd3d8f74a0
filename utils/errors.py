"""What a user did wrong, or what the machine refused: each is shown as one line, never as a traceback."""

import errno
import os

HINT_RESTORE = "restore it from a copy, or start over with --fresh (which moves this folder's files aside)"


class UserError(Exception):
    """A fault that the user can correct. The message names the thing, what was found and what to do.

    It is no ``ValueError``: no handler of our own for bad values may swallow it.
    """


class ConfigError(UserError):
    """A key, value or file of the configuration."""


class DataError(UserError):
    """The image data: folders, counts, files."""


class BackboneError(UserError):
    """The pre-trained model: its name or its weights."""


class CheckpointError(UserError):
    """A saved file that is missing, damaged or belongs to something else."""


class DamagedRunError(CheckpointError):
    """A run whose saved files are not what was saved: only a copy, or starting over, helps, and the line says so."""

    def __str__(self) -> str:
        return f"{super().__str__()}; {HINT_RESTORE}"


class BankError(UserError):
    """The feature bank on disk."""


class NumericError(UserError):
    """A NaN or an infinite number where there must be none."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of an accelerator, is what lacks: PyTorch raises RuntimeErrors for that."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("allocate memory", "out of memory", "failed to map segment")  # the last: of a library that is loaded
    return isinstance(error, (RuntimeError, ImportError)) and any(word in str(error) for word in words)


_FREE_MEMORY = (
    "free some, raise its limit (ulimit -v) or lower what takes it (batch_size, feature_batch_size, num_workers)"
)
_CORRECT = "correct that"
# what a disk or the machine refuses, whatever the program does, with what helps; any other OSError is a bug
_REMEDIES = {
    **dict.fromkeys(("EMFILE", "ENFILE"), "raise the number of open files (ulimit -n)"),
    "EFBIG": "raise the size of files (ulimit -f)",
    "ENOMEM": _FREE_MEMORY,
    **dict.fromkeys(("ENOSPC", "EDQUOT"), "free space or set another folder"),
    **dict.fromkeys(("EACCES", "EPERM", "EROFS"), "correct the permissions or set another folder"),
    **dict.fromkeys(("EIO", "ESTALE", "ENOLCK", "ENAMETOOLONG", "ELOOP", "ETIMEDOUT", "ENODEV", "ENXIO"), _CORRECT),
}


def remedy_of(error: OSError) -> str:
    """What a user does about an error of the file system or of the machine."""
    return _REMEDIES.get(errno.errorcode.get(error.errno or 0, ""), _CORRECT)


def machine_fault(error: BaseException) -> UserError | None:
    """What the machine refused, with what helps; None if ``error`` is something else, such as a bug.

    Libraries wrap such errors in their own, as PyTorch does in RuntimeErrors: then the text tells. Whoever takes an
    error for damage asks this first.
    """
    said = (str(error).strip().splitlines() or ["nothing says how much was asked for"])[0]
    if isinstance(error, OSError):
        if errno.errorcode.get(error.errno or 0) not in _REMEDIES:
            return None
        said, remedy = f"{error.filename or 'a file'}: {error.strerror}", remedy_of(error)
    elif is_lack_of_memory(error):
        said, remedy = f"the memory does not suffice ({said})", _FREE_MEMORY
    else:
        refused = [n for n in (errno.EMFILE, errno.ENOSPC, errno.EACCES) if os.strerror(n) in said]
        if not refused or not isinstance(error, RuntimeError):
            return None
        remedy = remedy_of(OSError(refused[0], said))
    return UserError(f"{said}; {remedy}, then start again")
