"""The feature bank, with an extractor whose features are the pixels themselves, so that every row can be checked."""

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import FolderMaker, fork, tiny_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.splits import Dataset
from utils.data.transforms import Transforms
from utils.errors import BankError, DataError, NumericError
from utils.features import __main__ as bank_command
from utils.features.bank import FeatureBank
from utils.features.extraction import LOADED_TOGETHER
from utils.features.rows import TEST_VIEW, View
from utils.hardware import default_batch_size
from utils.ranks import Ranks

SIZE = 4
ALL: list[View] = [("train", TEST_VIEW), ("test", TEST_VIEW), ("train", 0), ("train", 1)]
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="starts processes by fork")


@dataclass
class Pixels:
    """An image's feature is its pixels."""

    name: str = "pixels"
    weights_sha256: str = "1" * 64
    feature_dim: int = 3 * SIZE**2
    precision: str = "fp32"
    normalize: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pooling: str = "token"
    variant: dict[str, str] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    kill_at: int | None = None  # the process dies in this forward pass

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if len(self.batches) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return images.flatten(1).float()


@pytest.fixture
def data(tmp_path: Path, make_folder: FolderMaker) -> Dataset:
    """Three classes of 4 training and 3 test images."""
    return _dataset(make_folder(tmp_path / "images", classes=3, train=4, test=3))


def _dataset(folder: Path) -> Dataset:
    return load_dataset(tiny_config(data_path=str(folder)))


def _bank(data: Dataset, cache_dir: Path | None, extractor: Pixels | None = None, **options: object) -> FeatureBank:
    options = {"batch_size": 5, "num_workers": 0, "image_size": SIZE, "augment_seed": 3, **options}
    fingerprints = fingerprint_splits(data, cache_dir)
    return FeatureBank(data, extractor or Pixels(), fingerprints=fingerprints, cache_dir=cache_dir, **options)


def _everything(bank: FeatureBank) -> dict[View, np.ndarray]:
    return {want: bank.read(*want, np.arange(len(bank.data.split(want[0])))) for want in ALL}


# -- what a row holds -------------------------------------------------------------------------------------------------


def test_every_row_is_its_own_image_under_its_own_view(data: Dataset, tmp_path: Path) -> None:
    bank = _bank(data, tmp_path / "cache")
    bank.fill(ALL)
    transforms = Transforms(SIZE, 3)
    for (split, view), found in _everything(bank).items():
        images = data.split(split)
        for row, key in enumerate(images.keys):
            image = images.load(row)
            pixels = transforms.test(image) if view == TEST_VIEW else transforms.view(image, key, view)
            assert np.array_equal(found[row], pixels.flatten().numpy())


def test_views_depend_on_seed_view_and_image_alone(data: Dataset, tmp_path: Path) -> None:
    plain, other = _bank(data, tmp_path / "a"), _bank(data, None, batch_size=7, num_workers=2)
    plain.fill(ALL)
    for want in reversed(ALL):
        torch.manual_seed(len(want))
        other.fill([want])
    for want, found in _everything(plain).items():
        assert np.array_equal(found, _everything(other)[want])
    reseeded = _bank(data, None, augment_seed=4)
    reseeded.fill(ALL)
    assert np.array_equal(_everything(reseeded)["train", TEST_VIEW], _everything(plain)["train", TEST_VIEW])
    views = [_everything(plain)["train", 0], _everything(plain)["train", 1], _everything(reseeded)["train", 0]]
    assert all((a != b).any(axis=1).all() for a, b in ((views[0], views[1]), (views[0], views[2])))


def test_every_forward_pass_has_the_same_shape(data: Dataset) -> None:
    extractor = Pixels()
    bank = _bank(data, None, extractor, batch_size=7)
    bank.fill(ALL)
    assert bank.forwards == 12 * 3 + 9
    assert extractor.batches == [7] * 7  # 45 images: the last batch is padded


# -- computed once ----------------------------------------------------------------------------------------------------


def test_a_second_run_and_another_seed_compute_only_what_is_new(data: Dataset, tmp_path: Path) -> None:
    assert _filled(data, tmp_path) == 45
    assert _filled(data, tmp_path) == 0
    assert _filled(data, tmp_path, augment_seed=9) == 24  # two views of 12 images; the test view is shared


def _filled(data: Dataset, cache_dir: Path, extractor: Pixels | None = None, **options: object) -> int:
    bank = _bank(data, cache_dir, extractor, **options)
    assert (expected := bank.missing(ALL)) >= 0
    bank.fill(ALL)
    assert bank.missing(ALL) == 0 and bank.forwards == expected
    return bank.forwards


@pytest.mark.parametrize(
    "changed",
    [
        {"weights_sha256": "2" * 64},
        {"precision": "bf16"},
        {"normalize": True},
        {"name": "other"},
        {"variant": {"numerics": "other"}},
    ],
)
def test_another_backbone_never_reads_these_features(data: Dataset, tmp_path: Path, changed: dict) -> None:
    _filled(data, tmp_path)
    assert _filled(data, tmp_path, replace(Pixels(), **changed)) == 45
    assert _filled(data, tmp_path, Pixels(feature_dim=3 * 36), image_size=6) == 45
    assert _filled(data, tmp_path) == 0  # and the first ones are still there


def test_a_changed_image_is_computed_again(data: Dataset, tmp_path: Path) -> None:
    _filled(data, tmp_path)
    Image.new("RGB", (9, 9)).save(data.train.path(2))
    assert _filled(data, tmp_path) == 36  # the training split; the test split is as it was


# -- interrupted, at once, out of space --------------------------------------------------------------------------------


def _in_process(work: Callable[[], int]) -> int:
    """The id of a copy of this process that ends with what ``work`` returns."""
    if process := fork():
        return process
    code = 99
    try:
        code = work()
    finally:
        os._exit(code)


def _fill(bank: FeatureBank) -> int:
    bank.fill(ALL)
    return bank.forwards


def _exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@needs_fork
def test_after_kill_9_at_most_a_batch_is_computed_again(data: Dataset, tmp_path: Path) -> None:
    killed = _in_process(lambda: _fill(_bank(data, tmp_path, Pixels(kill_at=5))))  # 4 batches of 5 images are done
    assert _exit_code(killed) == -signal.SIGKILL
    bank = _bank(data, tmp_path)
    assert 45 - 20 <= bank.missing(ALL) <= 45 - 20 + bank.batch_size
    bank.fill(ALL)
    whole = _bank(data, None)
    whole.fill(ALL)
    for want, found in _everything(whole).items():
        assert np.array_equal(_everything(bank)[want], found)


@needs_fork
def test_two_processes_at_once_share_the_work(data: Dataset, tmp_path: Path) -> None:
    processes = [_in_process(lambda: _fill(_bank(data, tmp_path, batch_size=1))) for _ in range(2)]
    assert sorted(map(_exit_code, processes)) == [0, 45]  # how many forward passes each of them made
    bank = _bank(data, tmp_path)
    assert bank.missing(ALL) == 0 and all(np.isfinite(found).all() for found in _everything(bank).values())


def test_a_batch_larger_than_all_memory_is_refused_before_anything_is_written(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"feature_batch_size 9000000000000000000 needs .* lower feature_batch_size"):
        _bank(data, tmp_path, batch_size=9 * 10**18).fill(ALL)
    assert not list(tmp_path.rglob("*.npy"))


def test_none_keeps_everything_in_memory(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    bank = _bank(data, None)
    bank.fill(ALL)
    bank.fill(ALL)
    assert bank.forwards == 45 and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BankError, match="cache_dir=none"):
        _bank(data, None, ranks=Ranks(0, 2))


def test_litter_of_a_killed_process_is_removed(data: Dataset, tmp_path: Path) -> None:
    bank = _bank(data, tmp_path)
    bank.fill([("train", TEST_VIEW)])
    (folder,) = tmp_path.glob("*-train-*")
    litter = folder / ".augmented-3-0000.filling.npy.999.partial"
    litter.write_bytes(b"half")
    bank.fill(ALL)
    assert not litter.exists()


# -- what may be wrong ------------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_named_and_what_is_done_stays(tmp_path: Path, make_folder: FolderMaker) -> None:
    data = _dataset(make_folder(tmp_path / "images", classes=3, train=20, test=3))
    path = data.train.path(50)
    path.write_bytes(path.read_bytes()[:60])
    for workers in (0, 1):
        bank = _bank(data, tmp_path, num_workers=workers)
        with pytest.raises(DataError, match=rf"{path.name} .*class"):
            bank.fill([("train", TEST_VIEW)])
        assert 10 <= bank.missing([("train", TEST_VIEW)]) <= 10 + LOADED_TOGETHER + bank.batch_size


def test_a_feature_that_is_not_finite_stops_the_filling_and_names_the_image(data: Dataset) -> None:
    class Broken(Pixels):
        def __call__(self, images: Tensor) -> Tensor:
            features = super().__call__(images)
            features[2, 0] = float("inf")
            return features

    with pytest.raises(NumericError, match=rf"{data.test.keys[2]}.*not finite"):
        _bank(data, None, Broken()).fill([("test", TEST_VIEW)])


# -- shares and defaults ----------------------------------------------------------------------------------------------


def test_ranks_have_disjoint_images_that_are_all_images(data: Dataset, tmp_path: Path) -> None:
    """Whatever the others have written by the time when one begins: shares go by row, not by place."""
    shares = []
    with _bank(data, tmp_path)._rows["train"].lock():
        _bank(data, tmp_path)._rows["train"].prepare(0)
        for rank in range(3):
            bank = _bank(data, tmp_path, ranks=Ranks(rank, 3))
            kept: list[tuple[str, int, int]] = []
            count, batches = bank._extract([("train", 0)], lambda places, features, kept=kept: kept.extend(places))
            assert sum(batches) == count == len(kept)
            shares.append(sorted(row for _, _, row in kept))
            bank._rows["train"].write(0, shares[-1], np.zeros((4, 3 * SIZE**2), np.float32))
    assert shares == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_base_patch16_224.augreg", "local-dir:/a b/" + "ö" * 300, "a\\b?*"])
def test_a_bank_of_any_backbone_has_a_name_that_every_system_takes(
    data: Dataset, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _bank(data, tmp_path, Pixels(name=name)).fill([("test", TEST_VIEW)])
    assert bank_command.main(["--cache-dir", str(tmp_path), "list"]) == 0
    shown = capsys.readouterr().out
    assert f"through {name}" in shown and f"1 bank in {tmp_path}" in shown
    (folder,) = (path.parent.relative_to(tmp_path) for path in tmp_path.rglob("manifest.json"))
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,150}", str(folder))


def test_small_images_come_in_larger_batches_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert [default_batch_size(cpu, size) for size in (32, 98, 224, 2000)] == [64, 41, 8, 1]


def test_the_probe_keeps_nothing(data: Dataset, tmp_path: Path) -> None:
    bank = _bank(data, tmp_path)
    assert bank.probe(ALL, seconds=0.0) > 0
    assert bank.missing(ALL) == 45 and bank.forwards == 0
