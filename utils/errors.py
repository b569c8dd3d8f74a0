"""What a user did wrong, or what the machine refused: each is shown as one line, never as a traceback."""


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


class BankError(UserError):
    """The feature bank on disk."""


class NumericError(UserError):
    """A NaN or an infinite number where there must be none."""
