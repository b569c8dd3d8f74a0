"""Decoding: a file as an RGB image, or one kind of error."""

from pathlib import Path

from PIL import Image

from utils.errors import DataError

HINT_REPLACE = "replace or remove what is named, then start again: what is done stays"


def read_image(path: Path) -> Image.Image:
    """A file as PIL's ``convert("RGB")`` makes it: EXIF rotation is not applied, 16-bit grey is clipped."""
    with Image.open(path) as image:
        return image.convert("RGB")


class UnreadableImage(DataError):
    """Why a file is no image, in a few words; the caller names the file."""


def decode(path: Path) -> Image.Image:
    """``read_image``; whatever a damaged file makes a decoder trip over is one kind of error.

    Raises:
        UnreadableImage: the file is missing or no image.
    """
    try:
        return read_image(path)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def open_image(path: Path) -> Image.Image:
    """The file as an RGB image.

    Raises:
        DataError: it is missing, or not an image that can be read.
    """
    try:
        return decode(path)
    except UnreadableImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{path} does not exist") from None
        raise DataError(f"{path} is not a readable image ({error})") from None
