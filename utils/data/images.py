"""A file as an 8-bit RGB image, or one kind of error. ``docs/data.md`` has the table of all of Pillow's modes."""

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.data.splits import MAX_PIXELS, Split
from utils.errors import DataError
from utils.files import open_regular, sha256_of_file
from utils.words import counted

HINT_REPLACE = "replace or remove what is named, then start again: what is done stays"
WHITE = (255, 255, 255)  # what a transparent picture is laid on, as a page shows it

COMMON_FORMATS = ("BMP", "GIF", "JPEG", "PPM", "PNG")  # tried first, as Pillow does
# Pillow knows these by their first bytes but decodes none of them itself; EPS would start Ghostscript, a program
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})

# What is not, or not fully, in the 8-bit RGB image, by kind: said once with the number of images
KINDS = {
    "alpha": "with transparency: laid on white",
    "deep": "with more than 8 bits a channel: scaled to 8",
    "cmyk": "in CMYK: converted by formula, without colour profile",
    "frames": "with several pictures in the file: the first is used",
    "rotated": "that EXIF asks to turn or mirror when shown: it is not done, as in the release",
}

# Pillow warns of odd remarks in a file without naming the file; pixels that lack are an error, which names it
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


class UnreadableImage(DataError):
    """Why a file is no image, in a few words; the caller names the file."""


# -- reading files ----------------------------------------------------------------------------------------------------


def decode(source: Path | BinaryIO | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file, or a Pillow image, loaded or just opened, as an 8-bit RGB image.

    ``UnreadableImage`` where it is missing, damaged, too large or of no known scale. EXIF rotation and colour profiles
    are not applied, as in the release. Of several pictures the first counts.
    """
    with _one_kind_of_error(), ExitStack() as stack:
        if not isinstance(source, Image.Image):
            file = stack.enter_context(open_regular(source)) if isinstance(source, Path) else io.BytesIO(source.read())
            source = _identified(file, max_pixels)
        image = _loaded(source)
    return _to_rgb(image)


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The file as an RGB image; an error names the file."""
    try:
        return decode(path, max_pixels)
    except UnreadableImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{path} does not exist") from None
        raise DataError(f"{path} is not a readable image ({error})") from None


def kinds_of_file(path: Path) -> list[str] | None:
    """Which ``KINDS`` a file is of, from its header alone; None if it does not begin as an image does."""
    try:
        with open_regular(path) as file:
            return _kinds_of(_identified(file, None))
    except Exception:  # a damaged file makes decoders raise nearly anything
        return None


def content_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes; behind it, after a colon, the kinds of picture that it is, if any (``KINDS``)."""
    return ":".join([sha256_of_file(path), *filter(None, [",".join(kinds_of_file(path) or ())])])


class ImageFiles(Split):
    """Image files below ``<root>/<class>/``, classes and files in sorted order.

    Args:
        root: the split's folder.
        files: paths relative to ``root``, beginning with the class.
        labels: the class of each file.
        max_pixels: larger images are refused.
    """

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int] | np.ndarray, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.root: Path = root
        self.keys, self.labels, self.max_pixels = tuple(files), np.asarray(labels, dtype=np.int64), max_pixels

    def path(self, index: int) -> Path:
        return self.root / self.keys[index]

    def subset(self, rows: np.ndarray) -> "ImageFiles":
        keys = [self.keys[row] for row in rows.tolist()]
        return ImageFiles(self.root, keys, self.labels[rows], self.max_pixels)

    def load(self, index: int) -> Image.Image:
        path = self.path(index)
        try:
            return decode(path, self.max_pixels)
        except UnreadableImage as error:
            folder = Path(self.keys[index]).parent.as_posix()
            raise DataError(f"{path} (class {folder!r}) is not a readable image ({error}); {HINT_REPLACE}") from None


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Within, a decoder works on a file: a damaged one makes decoders raise nearly anything."""
    try:
        yield
    except UnreadableImage:
        raise
    except MemoryError as error:
        raise UnreadableImage("there is too little memory to decode it") from error
    except Exception as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def _identified(file: BinaryIO, max_pixels: int | None) -> Image.Image:
    """The open file as a Pillow image whose pixels are not decoded yet."""
    limit = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None and max_pixels > MAX_PIXELS and limit is not None and max_pixels > limit:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own guard, which the user has asked to raise
    try:
        image = Image.open(file, formats=decoded_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{error} Set max_pixels to a higher number if the file can be trusted") from error
    except UnidentifiedImageError as error:  # its words name the open file as Python does
        raise UnreadableImage("its content is of no format that Pillow decodes") from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise UnreadableImage(
            f"{width} × {height} = {width * height} pixels are above max_pixels {max_pixels}; raise that key if the "
            "file can be trusted"
        )
    return image


def _loaded(image: Image.Image) -> Image.Image:
    """The same image with its pixels decoded; two kinds are refused of which Pillow (13.0) makes wrong pixels."""
    parts = _parts(image)
    planes = any(decoder == "raw" and arguments[0] in list("RGBACMYK") for decoder, arguments in parts)
    if image.format == "TIFF" and planes and _tiff_tag(image, 258) == 16:
        raise UnreadableImage("a TIFF of 16 bits, channel after channel; save it compressed, or pixel after pixel")
    if isinstance(image.info.get("transparency"), (int, tuple)) and image.mode != "P":
        stored = next((arguments[0] for _, arguments in parts if isinstance(arguments[0], str)), image.mode)
        if stored not in ("L", "RGB") or image.mode != stored:  # Pillow compares the colour with other levels
            raise UnreadableImage(
                "a colour stands for transparent, in other than 8 bits; save it with an alpha channel"
            )
    image.load()
    return image


@cache
def decoded_formats() -> tuple[str, ...]:
    """The formats that the installed Pillow decodes by itself."""
    Image.init()
    from PIL import PngImagePlugin

    # a text or colour profile of more than a megabyte makes no picture unreadable; Pillow's limit for all texts stays
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    others = sorted(Image.OPEN.keys() - NOT_DECODED - set(COMMON_FORMATS))
    return (*COMMON_FORMATS, *others)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that the installed Pillow decodes by itself, in lower case, such as ``.jpg``."""
    formats = set(decoded_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


# -- to 8-bit RGB -----------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded Pillow image in 8-bit RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _levels_to_rgb(image)
    if not _has_alpha(image):
        return image.convert("RGB")
    straight = image.convert("LA") if image.mode == "La" else image  # premultiplied grey converts to this alone
    rgba = straight.convert("RGBA")
    page = Image.new("RGB", image.size, WHITE)
    page.paste(rgba, mask=rgba.getchannel("A"))
    return page


def _has_alpha(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _levels_to_rgb(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits; what has another scale, or none that its file names, is refused."""
    if not _is_deep(image) or _tiff_tag(image, 258) not in (None, 16) or _tiff_tag(image, 262) == 0:
        what = f"mode {image.mode}: no grey of 16 bits in which 65535 is white"
        raise UnreadableImage(f"{what}; save it with 8 or 16 bits")
    values = np.asarray(image).astype(np.float64)
    levels = np.rint(np.clip(values / 65535, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    value: Any = getattr(image, "tag_v2", {}).get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _parts(image: Image.Image) -> list[tuple[str, tuple[Any, ...]]]:
    """The decoder of each part of the file, with its arguments; empty once the image is loaded."""
    parts = getattr(image, "tile", [])
    return [(part[0], part[3] if isinstance(part[3], tuple) and part[3] else (part[3],)) for part in parts]


# -- kinds ------------------------------------------------------------------------------------------------------------


def _kinds_of(image: Image.Image) -> list[str]:
    """Which ``KINDS`` an image is of; its pixels are not decoded."""
    kinds = {
        "alpha": _has_alpha(image),
        "deep": _is_deep(image),
        "cmyk": image.mode == "CMYK",
        "frames": _has_frames(image),
        "rotated": _exif_orientation(image) not in (0, 1),
    }
    return [kind for kind, holds in kinds.items() if holds]


def _is_deep(image: Image.Image) -> bool:
    """Whether the file holds more than 8 bits a channel; Pillow's mode says so for grey alone."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return True
    return any(
        name == "SGI16" or ";16" in str(arguments[0]) or (name.startswith("ppm") and arguments[1] > 255)
        for name, arguments in _parts(image)
    )


def _has_frames(image: Image.Image) -> bool:
    try:  # some formats read on to the second picture to know
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False


def _exif_orientation(image: Image.Image) -> int:
    exif = Image.Exif()
    try:  # not image.getexif(), which decodes a PNG's pixels to look behind them
        exif.load(image.info.get("exif", b""))
        return int(exif.get(0x0112, 1))
    except Exception:
        return 1


def kind_sentences(kinds: Iterable[str]) -> list[str]:
    """One sentence for each kind among ``kinds`` (one word an image and kind), with how many images are of it."""
    counts = Counter(kinds)
    return [f"{counted(counts[kind], 'image')} {said}" for kind, said in KINDS.items() if counts[kind]]
