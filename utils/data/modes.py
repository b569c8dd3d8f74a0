"""What each of Pillow's modes means as 8-bit RGB, and what is lost on the way. ``docs/data.md`` has the table."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import DataError
from utils.words import counted

WHITE = (255, 255, 255)  # what a transparent picture is laid on, as a page shows it

# What is not, or not fully, in the 8-bit RGB image, by kind: said once with the number of images
KINDS = {
    "alpha": "with transparency: laid on white",
    "deep": "with more than 8 bits a channel: scaled to 8",
    "integer": "of 32-bit integers: values from 0 to 255 are read, others refused",
    "float": "of floating-point numbers: 0 to 1 (or 0 to 255) are read, others refused",
    "cmyk": "in CMYK: converted by formula, without colour profile",
    "frames": "with several pictures in the file: the first is used",
    "rotated": "that EXIF asks to turn or mirror when shown: it is not done, as in the release",
}
# Kinds that earlier versions and the release decode in another way; the others are as ``convert("RGB")`` makes them
DECODED_ANEW = frozenset({"alpha", "deep", "integer", "float"})

CHANNELS = frozenset("RGBACMYK")  # Pillow's names of parts that hold one channel


class UnreadableImage(DataError):
    """Why a file is no image, in a few words; the caller names the file."""


# -- to 8-bit RGB -----------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image, raw_mode: str = "") -> Image.Image:
    """A loaded Pillow image in 8-bit RGB.

    Args:
        raw_mode: how the file held the pixels, which fixes the scale of a colour that stands for "transparent".

    Raises:
        UnreadableImage: the values have no scale that says which of them is white.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _levels_to_rgb(image)
    if not _has_alpha(image):
        return image.convert("RGB")
    if isinstance(key := image.info.get("transparency"), (int, tuple)) and image.mode in ("1", "L", "RGB"):
        return _with_colour_key(image, key, raw_mode)
    straight = image.convert("LA") if image.mode == "La" else image  # premultiplied grey converts to this alone
    rgba = straight.convert("RGBA")
    page = Image.new("RGB", image.size, WHITE)
    page.paste(rgba, mask=rgba.getchannel("A"))
    return page


def _has_alpha(image: Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _with_colour_key(image: Image.Image, key: int | tuple[int, ...], raw_mode: str) -> Image.Image:
    """White where a pixel has the colour that the file calls transparent, given in the file's own bits."""
    if isinstance(key, tuple) and ";16" in raw_mode:  # Pillow keeps the high byte of each channel
        key = tuple(value >> 8 for value in key)
    elif image.mode == "1":
        key = 255 if key else 0
    elif isinstance(key, int):
        key = key * {"L;2": 85, "L;4": 17}.get(raw_mode, 1)  # Pillow has spread the levels over 0 to 255
    pixels = np.array(image.convert("RGB"))
    pixels[(pixels == np.asarray(key)).all(axis=2)] = WHITE
    return Image.fromarray(pixels)


def _levels_to_rgb(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits, scaled so that the kind's white is 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage(f"mode {image.mode}: it holds values that are not finite numbers")
    if (white := _white_level(image)) is None:
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if low < 0 or high > 255:
            kind = "floating-point numbers" if image.mode == "F" else "integers"
            raise UnreadableImage(
                f"mode {image.mode}: {kind} from {low:.6g} to {high:.6g}, and nothing says which is white; save it "
                "with 8 or 16 bits"
            )
        white = 1.0 if image.mode == "F" and high <= 1 else 255.0
    levels = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    if _tiff_tag(image, 262) == 0:  # in this TIFF, zero is white
        levels = 255 - levels
    pixels = np.stack([levels] * 3, axis=2)
    if isinstance(key := image.info.get("transparency"), int):
        pixels[values == key] = WHITE
    return Image.fromarray(pixels)


def _white_level(image: Image.Image) -> float | None:
    """The value that is white; None for 32-bit integers and floats, whose files do not say."""
    if image.mode.startswith("I;16"):
        bits = _tiff_tag(image, 258)  # such as 12
        return float(2 ** (bits or 16) - 1)
    return 65535.0 if image.mode == "I" and image.format in ("PNG", "PPM") else None


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    value: Any = getattr(image, "tag_v2", {}).get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def raw_mode_of(image: Image.Image) -> str:
    """How the file holds the pixels, in Pillow's words, such as ``RGB;16B``; empty where Pillow does not say."""
    for _, arguments in _tiles(image):
        return arguments[0] if arguments and isinstance(arguments[0], str) else ""
    return ""


def _tiles(image: Image.Image) -> list[tuple[str, tuple[Any, ...]]]:
    """The decoder of each part of the file, with its arguments; empty once the image is loaded."""
    parts = getattr(image, "tile", [])
    return [(part[0], part[3] if isinstance(part[3], tuple) else (part[3],)) for part in parts]


def correct_planes(image: Image.Image) -> None:
    """Let an opened TIFF whose 16-bit channels lie one after the other be read as such.

    Pillow (13.0) reads such channels as if they had 8 bits where they are not compressed: every other pixel would be
    the low byte of its neighbour.
    """
    if image.format != "TIFF" or _tiff_tag(image, 258) != 16:
        return
    tiff: Any = image  # of a class of Pillow's own
    order = "B" if tiff.tag_v2.prefix == b"MM" else "L"
    for number, (decoder, arguments) in enumerate(_tiles(image)):
        if decoder == "raw" and arguments[0] in CHANNELS:
            tiff.tile[number] = tiff.tile[number]._replace(args=(f"{arguments[0]};16{order}", *arguments[1:]))


# -- kinds ------------------------------------------------------------------------------------------------------------


def kinds_of(image: Image.Image) -> list[str]:
    """Which ``KINDS`` an image is of; its pixels need not be decoded."""
    kinds = {
        "alpha": _has_alpha(image),
        "deep": _is_deep(image),
        "integer": image.mode == "I" and _white_level(image) is None,
        "float": image.mode == "F",
        "cmyk": image.mode == "CMYK",
        "frames": _has_frames(image),
        "rotated": _exif_orientation(image) not in (0, 1),
    }
    return [kind for kind, holds in kinds.items() if holds]


def _is_deep(image: Image.Image) -> bool:
    """Whether the file holds more than 8 bits a channel; Pillow's mode says so for grey alone."""
    if image.mode.startswith("I;16") or _white_level(image) is not None or ";16" in raw_mode_of(image):
        return True
    parts = _tiles(image)
    return any(name == "SGI16" or (name in ("ppm", "ppm_plain") and arguments[1] > 255) for name, arguments in parts)


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


def row_content(content: str) -> str:
    """``content_of_file`` without the kinds that no feature depends on: ordinary images have their SHA-256 alone."""
    digest, _, kinds = content.partition(":")
    changed = [kind for kind in kinds.split(",") if kind in DECODED_ANEW]
    return ":".join([digest, *filter(None, [",".join(changed)])])
