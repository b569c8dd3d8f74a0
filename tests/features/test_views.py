"""What a loader does with an image: the release's transforms, to the last pixel, and a second look at its file."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

from tests.conftest import ROOT, FolderMaker, TinyExtractor, tiny_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.images import ImageFiles
from utils.data.transforms import ATTEMPTS, WORDS, Draws, Transforms, crop_and_flip
from utils.errors import DataError
from utils.features.bank import FeatureBank
from utils.features.extraction import load_views, view_jobs
from utils.features.rows import TEST_VIEW
from utils.seeds import derive_seed

SIZES = [(50, 40), (500, 375), (1, 1), (300, 7), (5, 400), (33, 97), (36, 36)]  # some can have no crop of the ratio


@pytest.mark.parametrize("size", SIZES)
def test_crops_and_flips_are_those_that_torchvision_draws(size: tuple[int, int]) -> None:
    image, transforms = Image.new("RGB", size), Transforms(8, 5)
    for view in range(200):
        torch.manual_seed(derive_seed("view", 5, view, "a/1.png"))
        top, left, height, width = T.RandomResizedCrop.get_params(image, [0.05, 1.0], [3 / 4, 4 / 3])
        expected = (left, top, left + width, top + height), bool(torch.rand(1) < 0.5)
        assert crop_and_flip(transforms.draws("a/1.png", view), *size) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [16, 31, 224])
def test_pixels_are_those_of_torchvision(size: tuple[int, int], side: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    resize = T.Resize(int(256 / 224 * side), InterpolationMode.BICUBIC)
    transforms = Transforms(side, 3)
    assert torch.equal(transforms.test(image), T.Compose([resize, T.CenterCrop(side), pil_to_tensor])(image))
    crop = T.RandomResizedCrop(side, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3))
    for view in range(4):
        torch.manual_seed(derive_seed("view", 3, view, "key"))
        expected = T.Compose([crop, T.RandomHorizontalFlip(0.5), pil_to_tensor])(image)
        assert torch.equal(transforms.view(image, "key", view), expected)


@pytest.mark.parametrize(("coin", "flip"), [((1 << 23) - 1, True), (1 << 23, False)])
def test_where_no_attempt_fits_an_image_of_fitting_ratio_is_taken_whole(coin: int, flip: bool) -> None:
    draws = Draws((1.0,) * ATTEMPTS, (1.3,) * ATTEMPTS, (coin,) * WORDS)  # as large as the image, but wider
    assert crop_and_flip(draws, 36, 36) == ((0, 0, 36, 36), flip)


def test_a_loader_process_needs_no_pytorch() -> None:
    """Importing it would cost each of them seconds and some hundred megabytes."""
    assert imported("utils.features.extraction, utils.data.loader") & {"torch", "multiprocessing"} == set()


def test_a_complete_bank_needs_nothing_that_decodes_or_computes() -> None:
    found = imported("utils.features.bank")
    assert not found & {"torch", "PIL.Image", "utils.data.loader", "utils.features.extraction"}


def imported(modules: str) -> set[str]:
    """What a new process has imported after ``modules``."""
    code = f"import sys; import {modules}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())


def test_an_image_is_decoded_once_for_all_its_views(
    tmp_path: Path, make_folder: FolderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(tiny_config(data_path=str(make_folder(tmp_path, classes=2, train=3, test=1))))
    decoded, load = [], ImageFiles.load
    monkeypatch.setattr(ImageFiles, "load", lambda self, index: decoded.append(self.keys[index]) or load(self, index))
    missing = {("train", view): np.ones(6, bool) for view in (TEST_VIEW, 0, 1)}
    pixels = [load_views(job) for job in view_jobs(data, Transforms(8, 0), missing, {})]
    assert sum(map(len, pixels)) == 18
    assert sorted(decoded) == sorted(data.train.keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_exchanged_between_hashing_and_reading_is_noticed(
    tmp_path: Path, make_folder: FolderMaker, workers: int
) -> None:
    data = load_dataset(tiny_config(data_path=str(make_folder(tmp_path / "images", classes=2, train=3, test=1))))
    known = fingerprint_splits(data, tmp_path / "cache")
    bank = FeatureBank(
        data,
        TinyExtractor(),
        image_size=8,
        augment_seed=0,
        fingerprints=known,
        cache_dir=tmp_path / "cache",
        num_workers=workers,
    )
    changed = data.train.path(4)
    kept, times = changed.read_bytes(), (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    changed.write_bytes(data.train.path(0).read_bytes())
    with pytest.raises(DataError, match=rf"{changed} was changed while the run was at work"):
        bank.fill([("train", 0)])
    changed.unlink()
    with pytest.raises(DataError, match=f"{changed.name}"):
        bank.fill([("train", 0)])
    changed.write_bytes(kept)
    os.utime(changed, ns=times)
    bank.fill([("train", 0)])
    assert bank.missing([("train", 0)]) == 0
