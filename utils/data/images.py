"""Decoding: a file as an 8-bit RGB image, or one kind of error. ``docs/data.md`` has the table of all modes."""

import io
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from utils.data.modes import UnreadableImage, correct_planes, kinds_of, raw_mode_of, to_rgb
from utils.errors import DataError
from utils.files import sha256_of_file

HINT_REPLACE = "replace or remove what is named, then start again: what is done stays"
MAX_PIXELS = 178_956_970  # Pillow refuses more as a possible decompression bomb

COMMON_FORMATS = ("BMP", "GIF", "JPEG", "PPM", "PNG")  # tried first, as Pillow does
# Pillow knows these by their first bytes but decodes none of them itself; EPS would start Ghostscript, a program
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_REMARKS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})  # chunks without pixels; Pillow limits their size

# -- reading files ----------------------------------------------------------------------------------------------------


def decode(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file as an 8-bit RGB image. Whatever a damaged file makes a decoder trip over is one kind of error.

    EXIF rotation and colour profiles are not applied, as in the release. Of several pictures the first counts.

    Raises:
        UnreadableImage: the file is missing, no image, too large, or of a kind that no 8-bit image stands for.
    """
    with _one_kind_of_error():
        image, raw_mode = read_image(path, max_pixels)
    return to_rgb(image, raw_mode)


def decode_file(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An open file, or anything that reads like one, by the same rules as a file's path.

    Raises:
        UnreadableImage: as ``decode``.
    """
    with _one_kind_of_error(), _identified(io.BytesIO(file.read()), max_pixels) as image:
        raw_mode = raw_mode_of(image)
        image.load()
    return to_rgb(image, raw_mode)


def rgb_of(image: Image.Image) -> Image.Image:
    """A Pillow image, loaded or just opened, as an 8-bit RGB image by the same rules as a file.

    Raises:
        UnreadableImage: as ``decode``.
    """
    with _one_kind_of_error():
        correct_planes(image)
        raw_mode = raw_mode_of(image)
        image.load()
    return to_rgb(image, raw_mode)


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Within, a decoder works on a file: a damaged one makes decoders raise nearly anything."""
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The file as an RGB image.

    Raises:
        DataError: it is missing, or not an image that can be read; the file is named.
    """
    try:
        return decode(path, max_pixels)
    except UnreadableImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{path} does not exist") from None
        raise DataError(f"{path} is not a readable image ({error})") from None


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """The first picture of a file as Pillow decodes it, with the name of the layout that its pixels had in the file."""
    _check_regular(path)
    with open(path, "rb") as file, _identified(file, max_pixels) as image:
        raw_mode = raw_mode_of(image)
        image.load()
        return image, raw_mode


def is_image(path: Path) -> bool:
    """Whether the file's content begins as an image does; nothing is decoded."""
    try:
        _check_regular(path)
        with open(path, "rb") as file, _identified(file, None):
            return True
    except Exception:  # as above: nearly anything
        return False


def _check_regular(path: Path) -> None:
    """Reading a pipe or a device may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise UnreadableImage(f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def _identified(file: BinaryIO, max_pixels: int | None) -> Image.Image:
    """The open file as a Pillow image whose pixels are not decoded yet."""
    limit = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None and max_pixels > MAX_PIXELS and limit is not None and max_pixels > limit:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own guard, which the user has asked to raise
    try:
        image = Image.open(file, formats=decoded_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{error} Set max_pixels to a higher number if the file can be trusted") from error
    except ValueError:
        file.seek(0)
        if file.read(8) != PNG_SIGNATURE:
            raise
        image = Image.open(io.BytesIO(_png_without_remarks(file)), formats=("PNG",))
    correct_planes(image)
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise UnreadableImage(
            f"{width} × {height} = {width * height} pixels are above max_pixels {max_pixels}; raise that key if the "
            "file can be trusted"
        )
    return image


def _png_without_remarks(file: BinaryIO) -> bytes:
    """The PNG without texts and colour profile, whose size Pillow limits; read from behind the signature."""
    kept = [PNG_SIGNATURE]
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        body = file.read(length + 4)  # with its checksum
        if name not in PNG_REMARKS:
            kept += [head, body]
    return b"".join(kept)


@cache
def decoded_formats() -> tuple[str, ...]:
    """The formats that the installed Pillow decodes by itself."""
    Image.init()
    others = sorted(Image.OPEN.keys() - NOT_DECODED - set(COMMON_FORMATS))
    return (*COMMON_FORMATS, *others)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that the installed Pillow decodes by itself, in lower case, such as ``.jpg``."""
    formats = set(decoded_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


# -- contents ---------------------------------------------------------------------------------------------------------


def content_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes; behind it, after a colon, the kinds of picture that it is, if any (``KINDS``)."""
    return ":".join([sha256_of_file(path), *filter(None, [",".join(kinds_of_file(path))])])


def kinds_of_file(path: Path) -> list[str]:
    """Which ``KINDS`` a file is of, from its header; none if it is no image (decoding it says so)."""
    try:
        _check_regular(path)
        with open(path, "rb") as file, _identified(file, None) as image:
            return kinds_of(image)
    except Exception:  # a damaged file makes decoders raise nearly anything
        return []
