import importlib.util

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT


@pytest.fixture(scope="session")
def export_digits():
    spec = importlib.util.spec_from_file_location("export_digits", ROOT / "assets" / "source" / "export_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folders_hold_the_split_of_the_digits(export_digits, tmp_path):
    written = export_digits.export(tmp_path, range(7, 9))
    files = sorted(tmp_path.rglob("*.png"))
    folders = {path.parent.relative_to(tmp_path).as_posix() for path in files}
    assert folders == {f"{split}/{digit}" for split in ("train", "test") for digit in (7, 8)}
    with np.load(ROOT / "assets" / "digits.npz") as archive:
        labels = archive["labels"]
        first = archive["images"][labels == 7][0]
    assert written == len(files) == (labels == 7).sum() + (labels == 8).sum()
    pixels = np.asarray(Image.open(min((tmp_path / "train" / "7").iterdir())).convert("L"))
    np.testing.assert_array_equal(pixels, np.rint(first.astype(float) * 255 / 16))


def test_classes_are_a_range_and_others_are_refused(export_digits):
    assert [export_digits._digit_range(text) for text in ("0-7", "3")] == [range(8), range(3, 4)]
    for text in ("8-7", "5-10", "a"):
        with pytest.raises(ValueError):
            export_digits._digit_range(text)
