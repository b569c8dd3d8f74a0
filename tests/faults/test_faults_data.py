"""Images that are broken, odd or out of reach: converted as PIL does, or named with file and class."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data import images as data_module
from utils.data.images import decode

RNG = np.random.default_rng(0)


@pytest.fixture
def own_data(run, data, tmp_path) -> Path:
    """The run has a copy of the data, to be broken."""
    folder = tmp_path / "own data"
    shutil.copytree(data, folder)
    run.keys["data_path"] = str(folder)
    return folder


def photo(path: Path, mode: str = "RGB", **options: object) -> Path:
    Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(mode).save(path, **options)
    return path


def palette_with_alpha(path: Path) -> Path:
    image = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).quantize(16)
    image.save(path, transparency=bytes(range(0, 256, 16)))
    return path


def sixteen_bit(path: Path) -> Path:
    Image.fromarray(RNG.integers(0, 2**16, (40, 50), dtype=np.uint16)).save(path)
    return path


def rotated_by_exif(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    return photo(path, exif=exif)


def one_pixel(path: Path) -> Path:
    Image.new("RGB", (1, 1), (10, 20, 30)).save(path)
    return path


CONVERTIBLE = {
    "cmyk.jpg": lambda path: photo(path, "CMYK"),
    "grey.jpg": lambda path: photo(path, "L"),
    "black and white.png": lambda path: photo(path, "1"),
    "alpha.png": lambda path: photo(path, "RGBA"),
    "palette with alpha.png": palette_with_alpha,
    "16 bit.png": sixteen_bit,
    "1x1.png": one_pixel,
    "rotated.jpg": rotated_by_exif,
}
BROKEN = {
    "truncated.jpg": lambda path: (photo(path), path.write_bytes(path.read_bytes()[:600])),
    "truncated.png": lambda path: (photo(path), path.write_bytes(path.read_bytes()[:600])),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("this is no image"),
    "header only.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_kind_of_image_is_read_in_its_own_size(tmp_path, name):
    path = CONVERTIBLE[name](tmp_path / name)
    found = decode(path)  # tests/data/test_images.py holds its pixels
    assert found.mode == "RGB"
    assert found.size == Image.open(path).size  # EXIF rotation is not applied, as torchvision does not


def test_a_run_on_every_convertible_kind_of_image(run, own_data):
    for name, write in CONVERTIBLE.items():
        write(own_data / "train" / "0" / name)
        write(own_data / "test" / "5" / name)
    assert run().code == 0


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_names_file_and_class_before_training(run, own_data, name):
    path = own_data / "train" / "3" / name
    BROKEN[name](path)
    error = run().error
    assert str(path) in error
    assert "class '3'" in error
    assert "start again" in error
    path.unlink()
    assert run().code == 0


def test_an_image_broken_between_two_starts_never_loses_finished_work(half, own_data, tree):
    half.keys["data_path"] = str(own_data)
    (own_data / "train" / "3" / "000.png").unlink()
    BROKEN["truncated.png"](own_data / "train" / "3" / "000.png")
    before = tree(half.checkpoints)
    error = half().error  # found when its feature is computed: another run by then
    assert "000.png" in error
    assert tree(half.checkpoints) == before and not list(half.folder.glob("tosca.*"))


def test_a_symbolic_link_that_leads_in_a_circle_is_followed_once(run, own_data, undisturbed):
    (own_data / "train" / "0" / "again").symlink_to(own_data / "train" / "0", target_is_directory=True)
    assert run().code == 0
    assert {k: v for k, v in run.end().items() if k.endswith(".pth")} == {
        k: v for k, v in undisturbed.items() if k.endswith(".pth")
    }


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("gone.jpg"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (os.mkfifo, "it is a device, pipe or socket"),
    ],
    ids=["broken link", "link to itself", "pipe"],
)
def test_what_is_named_like_an_image_but_is_no_file_is_named(run, own_data, make, reason):
    path = own_data / "train" / "0" / "photo.jpg"
    make(path)
    error = run().error
    assert f"{path} cannot be read" in error and reason in error


def test_an_unreadable_file_is_named(run, own_data, monkeypatch):
    path = own_data / "test" / "2" / "004.png"
    real = open

    def refusing(file: object, *args: object, **kwargs: object) -> object:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)  # root may read everything: mode bits would not do
    error = run().error
    assert f"{path} cannot be read (Permission denied)" in error


def test_a_decoder_that_trips_over_a_file_is_no_traceback(run, own_data, monkeypatch):
    def trip(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(data_module, "_identified", trip)
    assert "is not a readable image (division by zero)" in run(cache_dir="none").error


def test_more_pixels_than_pil_allows_are_named(run, own_data, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    error = run(cache_dir="none").error
    assert "exceeds limit of 200 pixels" in error and "max_pixels" in error
