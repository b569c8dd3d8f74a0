"""Every mode that Pillow opens, from pictures whose right answer is known."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms as T

from tests.conftest import ROOT
from utils.data.given import as_image
from utils.data.images import (
    KINDS,
    MAX_PIXELS,
    UnreadableImage,
    content_of_file,
    decode,
    image_suffixes,
    kind_sentences,
    kinds_of_file,
    open_image,
)
from utils.data.transforms import test_pixels as view_pixels
from utils.errors import DataError
from utils.files import sha256_of_file
from utils.hardware import forget_peak, peak_bytes

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
RNG = np.random.default_rng(0)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def decoded(path: Path) -> list:
    """The pixels of the first line, as tuples."""
    image = decode(path)
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


def line(values: list, dtype: str = "uint8") -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(bits: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of one line by the letter of the specification: Pillow writes only some of these."""
    width = len(row) * 8 // (bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff_of_strips(
    strips: list[bytes],
    bits: int,
    photometric: int,
    width: int,
    channels: int,
    order: str = "<",
    planes: bool = False,
    extra: int | None = None,
) -> bytes:
    """A TIFF of one line, by the letter of the specification; ``planes``: a strip for each channel."""
    tags = {256: [width], 257: [1], 258: [bits] * channels, 259: [1], 262: [photometric]}
    tags |= {273: [0] * len(strips), 277: [channels], 278: [1], 279: [len(strip) for strip in strips]}
    tags |= {284: [2 if planes else 1], 338: [extra] if extra else [], 339: [1] * channels}
    tags = {tag: values for tag, values in tags.items() if values}
    behind = 8 + 2 + 12 * len(tags) + 4  # the header and the directory
    longer = sum(4 * len(values) for values in tags.values() if len(values) > 1)  # values that do not fit into it
    starts = np.cumsum([behind + longer, *map(len, strips)]).tolist()
    tags[273] = starts[:-1]
    entries = values_behind = b""
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}I", *values)
        where = packed if len(values) == 1 else struct.pack(f"{order}I", behind + len(values_behind))
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + where
        values_behind += packed if len(values) > 1 else b""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + values_behind + b"".join(strips)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# -- what convert("RGB") keeps stays as it makes it -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_ordinary_pictures_are_what_pillow_makes_of_them(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    try:
        image.save(path)
        expected = np.asarray(Image.open(path).convert("RGB"))  # Pillow 11 does not read the YCbCr TIFF that it writes
    except (OSError, KeyError):
        pytest.skip("this format does not hold this mode")
    np.testing.assert_array_equal(np.asarray(decode(path)), expected)
    if mode != "CMYK":
        assert kinds_of_file(path) == []
        assert content_of_file(path) == sha256_of_file(path)


def test_cyan_ink_is_cyan_also_as_adobe_inverts_it(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert decoded(save(tmp_path / "a.tif", cyan))[0] == (0, 255, 255)
    (r, g, b) = decoded(save(tmp_path / "a.jpg", cyan, quality=95))[8]
    assert r < 6 and g > 249 and b > 249
    assert kinds_of_file(tmp_path / "a.jpg") == ["cmyk"]


# -- transparency is laid on white ------------------------------------------------------------------------------------


def test_transparent_pixels_are_laid_on_white_whatever_colour_hides_below(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)]):
        image.putpixel((x, 0), pixel)
    path = save(tmp_path / "a.png", image)
    assert decoded(path) == [RED, WHITE, (127, 127, 127)]
    assert kinds_of_file(path) == ["alpha"]
    assert decoded(save(tmp_path / "a.webp", image, lossless=True, exact=True)) == [RED, WHITE, (127, 127, 127)]
    assert decoded(save(tmp_path / "a.tif", image)) == [RED, WHITE, (127, 127, 127)]


def test_a_fully_opaque_alpha_channel_changes_no_pixel(tmp_path):
    pixels = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGBA")
    np.testing.assert_array_equal(np.asarray(decode(save(tmp_path / "a.png", image))), pixels)


def test_grey_with_alpha_straight_and_premultiplied(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (10, 255))
    assert decoded(save(tmp_path / "a.png", image)) == [(10, 10, 10), WHITE]
    (level, _, _) = as_image(Image.new("LA", (1, 1), (100, 128)).convert("La")).getpixel((0, 0))
    assert abs(level - (100 * 128 + 255 * 127) / 255) < 2


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])], ids=["one entry", "an alpha for each entry"])
def test_a_palette_with_transparent_entries(tmp_path, transparency):
    image = line([0, 1, 2]).convert("P")
    image.putpalette([*RED, *BLACK, 0, 0, 255])
    path = save(tmp_path / "a.png", image, transparency=transparency)
    assert decoded(path) == [RED, WHITE, (0, 0, 255)]
    assert kinds_of_file(path) == ["alpha"]
    assert decoded(save(tmp_path / "a.gif", image, transparency=1)) == [RED, WHITE, (0, 0, 255)]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "expected"),
    [
        (8, 0, b"\x01\x02", (2,), [(1, 1, 1), WHITE]),
        (16, 0, b"\x01\x01\x03\x04", (0x0304,), None),
        (8, 2, bytes([1, 2, 3, 1, 2, 4]), (1, 2, 3), [WHITE, (1, 2, 4)]),
        (1, 0, b"\x50", (1,), None),  # Pillow compares the key with levels that it has spread, or cut to 8 bits
        (2, 0, b"\x1b", (2,), None),
        (4, 0, b"\x1a", (10,), None),
        (16, 2, bytes([1, 0, 2, 0, 3, 0, 1, 0, 2, 0, 4, 0]), (256, 512, 768), None),
    ],
)
def test_the_colour_that_a_png_calls_transparent_is_white_or_the_file_refused(
    tmp_path, bits, colour, row, key, expected
):
    path = written(tmp_path / "a.png", png(bits, colour, row, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))))
    assert "alpha" in kinds_of_file(path)
    if expected:
        assert decoded(path) == expected
    else:
        with pytest.raises(UnreadableImage, match="save it with an alpha channel"):
            decode(path)


# -- more than 8 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", line([0, 300, 32768, 65535], "uint16"))
    assert decoded(path) == [(v, v, v) for v in (0, 1, 128, 255)]
    assert kinds_of_file(path) == ["deep"]


DEEP = np.array([[0, 255, 257], [0x12FF, 0x8000, 65535]], dtype=np.uint16)  # two pixels of a 16-bit colour picture
HIGH_BYTES = [(0, 0, 1), (18, 128, 255)]
NEAREST = [(0, 1, 1), (19, 128, 255)]  # value * 255 / 65535, rounded
CLEAR = np.array([[65535], [0]], dtype=np.uint16)  # alpha: opaque, transparent


def deep_png(channels: np.ndarray = DEEP, colour: int = 2) -> bytes:
    return png(16, colour, channels.astype(">u2").tobytes())


def deep_tiff(order: str, planes: bool = False, channels: np.ndarray = DEEP, extra: int | None = None) -> bytes:
    blocks = [channels[:, [index]] for index in range(channels.shape[1])] if planes else [channels]
    strips = [block.astype(order + "u2").tobytes() for block in blocks]
    return tiff_of_strips(strips, 16, 2, len(channels), channels.shape[1], order, planes, extra)


def deep_ppm(largest: int = 65535) -> bytes:
    return b"P6\n2 1\n%d\n" % largest + (DEEP if largest == 65535 else DEEP % 1024).astype(">u2").tobytes()


DEEP_FILES = {
    "a.png": (deep_png(), HIGH_BYTES),
    "a.ppm": (deep_ppm(), NEAREST),
    "10-bit.ppm": (deep_ppm(1023), [(0, 64, 64), (191, 0, 255)]),
    "text.ppm": (b"P3\n2 1\n65535\n" + b" ".join(b"%d" % value for value in DEEP.ravel().tolist()), NEAREST),
    "little.tif": (deep_tiff("<"), HIGH_BYTES),
    "big.tif": (deep_tiff(">"), HIGH_BYTES),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_16_bit_colour_becomes_8_bits_by_a_known_rule_and_is_counted(tmp_path, name):
    content, expected = DEEP_FILES[name]
    path = written(tmp_path / name, content)
    assert decoded(path) == expected
    assert kinds_of_file(path) == ["deep"]
    with Image.open(path) as opened:  # by a user of the API
        assert as_image(opened).tobytes() == decode(path).tobytes()


@pytest.mark.parametrize(
    "content",
    [
        deep_png(np.hstack([DEEP, CLEAR]), 6),
        *(deep_tiff(order, False, np.hstack([DEEP, CLEAR]), 2) for order in "<>"),
    ],
)
def test_16_bit_colour_with_alpha_is_laid_on_white(tmp_path, content):
    path = written(tmp_path / "a", content)
    assert decoded(path) == [HIGH_BYTES[0], WHITE]
    assert kinds_of_file(path) == ["alpha", "deep"]


@pytest.mark.parametrize("order", "<>")
def test_16_bits_in_planes_are_refused_and_not_read_as_if_they_had_8(tmp_path, order):
    inks = tiff_of_strips([bytes([255, 255, 0, 0])] * 4, 16, 5, 2, 4, order, planes=True)
    for content in (deep_tiff(order, True), deep_tiff(order, True, np.hstack([DEEP, CLEAR]), 2), inks):
        path = written(tmp_path / "a.tif", content)
        with pytest.raises(UnreadableImage):
            decode(path)
        with Image.open(path) as opened, pytest.raises(UnreadableImage):
            as_image(opened)


@pytest.mark.parametrize(
    "tiff",
    [
        tiff_of_strips([struct.pack("<3H", 0, 32768, 65535)], 16, 0, 3, 1),  # zero is white
        tiff_of_strips([bytes([0xFF, 0xF0, 0x00])], 12, 1, 2, 1),
        line([0, 7, 255], "int32"),
        line([0, 0.5, 1], "float32"),
        line([0, np.nan], "float32"),
    ],
    ids=["zero is white", "12 bit", "int32", "float32", "nan"],
)
def test_levels_without_a_known_white_are_refused_in_one_line(tmp_path, tiff):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff) if isinstance(tiff, bytes) else tiff.save(path)
    with pytest.raises(UnreadableImage, match="save it with 8 or 16 bits"):
        decode(path)


def test_an_image_in_memory_is_read_as_its_file_is(tmp_path):
    for number, image in enumerate([line([0, 65535], "uint16"), Image.new("RGBA", (2, 1))]):
        path = save(tmp_path / f"{number}.tif", image)
        assert as_image(image).tobytes() == decode(path).tobytes() == as_image(Image.open(path)).tobytes()


# -- kinds ------------------------------------------------------------------------------------------------------------


def test_what_is_lossy_is_counted_in_words(tmp_path):
    image = Image.new("RGBA", (2, 2))
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "turned.jpg", Image.new("RGB", (2, 2)), exif=turned)
    save(tmp_path / "moving.gif", Image.new("L", (2, 2)), save_all=True, append_images=[Image.new("L", (2, 2), 9)])
    paths = [save(tmp_path / f"{i}.png", image) for i in range(2)] + [tmp_path / "turned.jpg", tmp_path / "moving.gif"]
    sentences = kind_sentences(kind for path in paths for kind in kinds_of_file(path))
    assert sentences == [
        "2 images with transparency: laid on white",
        f"1 image {KINDS['frames']}",
        f"1 image {KINDS['rotated']}",
    ]


# -- files that are none, or too much ---------------------------------------------------------------------------------


def test_the_limit_of_pixels_and_its_key_are_named(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (20, 10)))
    assert decode(path, max_pixels=200).size == (20, 10)
    with pytest.raises(UnreadableImage, match=r"20 × 10 = 200 pixels are above max_pixels 199; raise that key"):
        decode(path, max_pixels=199)


def test_pillows_own_limit_names_the_key_and_a_higher_one_is_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = save(tmp_path / "a.png", Image.new("RGB", (20, 10)))
    with pytest.raises(UnreadableImage, match=r"exceeds limit of 100 pixels.*max_pixels"):
        decode(path)
    assert decode(path, max_pixels=MAX_PIXELS + 1).size == (20, 10)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_pngs_with_large_texts_and_profiles_are_read(tmp_path, name):
    packed = zlib.compress(b"x" * 3_000_000)
    body = {b"zTXt": b"k\0\0" + packed, b"iTXt": b"k\0\1\0\0\0" + packed, b"iCCP": b"k\0\0" + packed}[name]
    path = written(tmp_path / "a.png", png(8, 2, bytes(RED), chunk(name, body)))
    assert decoded(path) == [RED]
    assert kinds_of_file(path) == []


def test_a_decoder_is_never_a_program_that_the_file_starts(tmp_path):
    path = written(tmp_path / "a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match=r"^its content is of no format that Pillow decodes$"):
        decode(path)
    assert ".eps" not in image_suffixes()


def test_suffixes_are_those_that_pillow_decodes():
    assert {".jpg", ".jfif", ".gif", ".tga", ".jp2", ".pfm", ".qoi", ".psd", ".webp", ".ico"} <= image_suffixes()
    assert not {".pdf", ".mpg", ".h5", ".grib", ".emf"} & image_suffixes()


def test_too_little_memory_for_one_picture_names_that_picture(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: bytearray(2**62))
    with pytest.raises(DataError, match=r"a\.png is not a readable image \(there is too little memory to decode it\)"):
        open_image(path)


@pytest.mark.parametrize("size", [8, 224])
@pytest.mark.parametrize("shape", [(1, 17), (1, 400), (3, 100), (5, 333), (200, 11), (2999, 7), (40, 30), (61, 47)])
def test_thin_pictures_are_the_plain_pipeline_without_its_memory(shape, size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    plain = T.Compose([T.Resize(int(256 / 224 * size), T.InterpolationMode.BICUBIC), T.CenterCrop(size)])
    np.testing.assert_array_equal(view_pixels(image, size), np.asarray(plain(image)).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 20_000), (100_000, 1), (3, 1_000_000)])
def test_a_very_thin_picture_needs_little_more_memory_than_itself(size):
    image = Image.new("RGB", size, RED)
    forget_peak()
    before = peak_bytes()
    assert (view_pixels(image, 224) == np.reshape(RED, (3, 1, 1))).all()
    assert peak_bytes() - before < 100e6


@pytest.mark.parametrize(
    ("reads", "warns"), [("Image.open(path).getexif()", True), ("decode(path), kinds_of_file(path)", False)]
)
def test_no_warning_of_pillow_reaches_the_terminal(tmp_path, reads, warns):
    exif = Image.Exif()
    exif[0x010E] = "x" * 50
    exif = exif.tobytes()[:-30]
    path = save(tmp_path / "a.jpg", Image.new("RGB", (2, 2)), exif=exif)
    ours = "" if warns else "from utils.data.images import decode, kinds_of_file;"
    code = f"from PIL import Image; {ours} from pathlib import Path; path = Path({str(path)!r});"
    code += "Image.MAX_IMAGE_PIXELS = 3;"
    said = subprocess.run(
        [sys.executable, "-c", f"{code} {reads}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [word for word in ("DecompressionBombWarning", "larger than file") if word in said.stderr]
    assert found[:1] == ["DecompressionBombWarning"] if warns else not said.stderr  # of the file Pillow 11 says nothing


def test_our_own_bug_is_no_damaged_file(tmp_path, monkeypatch):
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    monkeypatch.setattr("utils.data.images._to_rgb", bug)
    with pytest.raises(ZeroDivisionError):
        decode(path)
