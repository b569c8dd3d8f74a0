"""What a user did wrong, or what the machine refused: each is shown as one line, never as a traceback."""

HINT_RESTORE = "restore it from a copy, or start over with --fresh (which moves this folder's files aside)"


class UserError(Exception):
    """A fault that the user can correct. The message names the thing, what was found and what to do.

    It is no ``ValueError``: no handler of our own for bad values may swallow it.

    Attributes:
        goes_on: whether the same command, started again when the fault is corrected, goes on with what is done, so
            that a user who gave ``--fresh`` must leave it out.
    """

    goes_on = True


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

    goes_on = False

    def __str__(self) -> str:
        return f"{super().__str__()}; {HINT_RESTORE}"


class BankError(UserError):
    """The feature bank on disk."""


class NumericError(UserError):
    """A NaN or an infinite number where there must be none."""

    goes_on = False  # it would come again: another config is another run


def is_lack_of_memory(error: Exception) -> bool:
    """Whether memory, of the machine or of an accelerator, is what lacks: PyTorch raises RuntimeErrors for that."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("allocate memory", "out of memory", "failed to map segment")  # the last: of a library that is loaded
    return isinstance(error, (RuntimeError, ImportError)) and any(word in str(error) for word in words)
