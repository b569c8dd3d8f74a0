"""The feature bank, with an extractor whose features are the pixels themselves, so that every row can be checked."""

import json
import os
import shutil
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
from utils.data import fingerprints
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.splits import Dataset
from utils.data.transforms import Transforms
from utils.errors import BankError, DataError, NumericError
from utils.features.arrays import TEST_VIEW, View
from utils.features.bank import FeatureBank
from utils.features.views import LOADED_TOGETHER, MissingViews
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


def test_filling_leaves_the_global_random_numbers_as_they_were(data: Dataset) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    _bank(data, None).fill(ALL)
    assert torch.equal(torch.rand(1), expected)


def test_every_forward_pass_has_the_same_shape(data: Dataset) -> None:
    extractor = Pixels()
    bank = _bank(data, None, extractor)
    bank.fill(ALL)
    assert bank.forwards == 12 * 3 + 9
    assert extractor.batches == [5] * 9  # 45 images, the last batch padded where needed


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
    assert _filled(data, tmp_path) == 0  # and the first ones are still there


def test_another_image_size_never_reads_these_features(data: Dataset, tmp_path: Path) -> None:
    _filled(data, tmp_path)
    assert _filled(data, tmp_path, Pixels(feature_dim=3 * 36), image_size=6) == 45


def test_a_changed_image_is_computed_again_even_with_its_old_size_and_time(data: Dataset, tmp_path: Path) -> None:
    bank = _bank(data, tmp_path)
    bank.fill(ALL)
    path = data.train.path(2)
    before, content = path.stat(), path.read_bytes()
    pixels = np.array(Image.open(path))
    pixels[10, 10] ^= 255
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0")[: max(len(content), path.stat().st_size)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _filled(data, tmp_path) == 36  # the training split; the test split is as it was


def test_hashes_of_unchanged_files_are_remembered(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in (data.train, data.test):
        for row in range(len(split)):
            os.utime(split.path(row), (1e9, 1e9))
    first = fingerprint_splits(data, tmp_path / "cache")
    hashed, content = [], fingerprints.content_of_file
    monkeypatch.setattr(fingerprints, "content_of_file", lambda path: hashed.append(path) or content(path))
    assert fingerprint_splits(data, tmp_path / "cache") == first
    assert hashed == []


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


def test_too_little_space_is_an_error_before_the_first_forward_pass(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = Pixels()
    bank = _bank(data, tmp_path, extractor)
    need = 4 * extractor.feature_dim * 45
    assert bank.bytes_needed(ALL) == need
    usage = shutil.disk_usage(tmp_path)._replace(free=need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BankError, match=r"needs 8.6 kB .* 8.6 kB are free"):
        bank.fill(ALL)
    assert extractor.batches == [] and not list(tmp_path.rglob("*.npy"))


def test_a_batch_larger_than_all_memory_is_refused_before_anything_is_written(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"feature_batch_size 9000000000000000000 needs .* lower feature_batch_size"):
        _bank(data, tmp_path, batch_size=9 * 10**18).fill(ALL)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: you tried")])
def test_a_forward_pass_that_does_not_fit_is_one_line(data: Dataset, error: RuntimeError) -> None:
    class Large(Pixels):
        def __call__(self, images: Tensor) -> Tensor:
            raise error

    with pytest.raises(
        BankError, match=r"a forward pass of 5 images does not fit the memory of cpu; lower feature_bat"
    ):
        _bank(data, None, Large()).fill(ALL)


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
    litter = folder / "augmented-3-0000.filling.999.partial"
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


def test_a_damaged_array_is_an_error_that_says_what_to_do(data: Dataset, tmp_path: Path) -> None:
    bank = _bank(data, tmp_path)
    bank.fill(ALL)
    (path,) = tmp_path.glob("*-test-*/test.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(BankError, match=r"damaged .* remove it"):
        bank.read("test", TEST_VIEW, np.arange(3))
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(BankError, match=rf"python -m utils.features remove {path.parent.name}"):
        bank.read("test", TEST_VIEW, np.arange(len(data.test)))
    with pytest.raises(BankError, match="not filled yet"):
        bank.read("train", 7, np.arange(3))


def test_more_loader_processes_than_images_and_cpus(data: Dataset) -> None:
    bank = _bank(data, None, num_workers=50)
    bank.fill([("test", TEST_VIEW)])
    assert bank.forwards == 9


# -- shares and defaults ----------------------------------------------------------------------------------------------


def test_ranks_have_disjoint_images_that_are_all_images(data: Dataset) -> None:
    missing = {("train", 0): np.ones(12, bool), ("train", 1): np.arange(12) != 5, ("test", TEST_VIEW): np.ones(9, bool)}
    shares = [MissingViews(data, Transforms(SIZE, 0), missing, ranks=Ranks(rank, 3)) for rank in range(3)]
    assert sum(share.count for share in shares) == 12 + 11 + 9
    places = [place for share in shares for job in share.jobs() for place in job.places]
    assert len(places) == len(set(places)) == 12 + 11 + 9
    assert sorted(row for job in shares[2].jobs() for row in job.rows if job.split == "train") == [2, 5, 8, 11]
    assert ("train", 0, 5) in places and ("train", 1, 5) not in places


def test_the_manifest_says_what_the_bank_holds(data: Dataset, tmp_path: Path) -> None:
    _bank(data, tmp_path).fill(ALL)
    (path,) = tmp_path.glob("*-train-*/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["images"] == 12 and manifest["backbone"] == "pixels" and "train images" in manifest["what"]
    assert sorted(p.name for p in path.parent.glob("*.npy")) == [
        "augmented-3-0000.npy",
        "augmented-3-0001.npy",
        "test.npy",
    ]


def test_small_images_come_in_larger_batches_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert [default_batch_size(cpu, size) for size in (32, 98, 224, 2000)] == [64, 41, 8, 1]


def test_the_probe_keeps_nothing(data: Dataset, tmp_path: Path) -> None:
    bank = _bank(data, tmp_path)
    assert bank.probe(ALL, seconds=0.0) > 0
    assert bank.missing(ALL) == 45 and bank.forwards == 0
