"""python -m utils.features: list and remove."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, FolderMaker, TinyExtractor, tiny_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.features import __main__ as bank
from utils.features.bank import FeatureBank
from utils.features.rows import TEST_VIEW


@pytest.fixture
def cache(tmp_path: Path, make_folder: FolderMaker) -> Path:
    """Two banks, of training (test transform and two views of seed 5) and test images."""
    data = load_dataset(tiny_config(data_path=str(make_folder(tmp_path / "images", classes=2, train=3, test=2))))
    folder = tmp_path / "cache"
    filled = FeatureBank(
        data,
        TinyExtractor(),
        image_size=8,
        augment_seed=5,
        fingerprints=fingerprint_splits(data, folder),
        cache_dir=folder,
        num_workers=0,
    )
    filled.fill([("train", TEST_VIEW), ("test", TEST_VIEW), ("train", 0), ("train", 1)])
    return folder


def _run(cache: Path, *arguments: str) -> int:
    return bank.main(["--cache-dir", str(cache), *arguments])


def test_list_shows_every_bank_with_its_size_and_contents(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "imagefolder-test-other").mkdir()
    (cache / "imagefolder-test-other" / "manifest.json").write_text("{")
    assert _run(cache, "list") == 0
    text = capsys.readouterr().out
    train = next(path for path in bank.banks(cache) if "-train-" in path.name)
    size = sum(path.stat().st_size for path in train.iterdir())
    assert f"{train.name}\n    {size / 1000:.1f} kB: final features of the train images" in text
    assert "test transform; augmented views of seed 5: 2" in text
    assert "6 images of 8 px, not normalised, through tiny" in text
    assert "unknown contents" in text
    assert f"3 banks in {cache}" in text


def test_remove_removes_what_it_names_and_nothing_else(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (next(p for p in bank.banks(cache) if f"-{split}-" in p.name) for split in ("train", "test"))
    note = train / "note.txt"
    note.write_text("mine")
    assert _run(cache, "remove", train.name) == 0
    assert capsys.readouterr().out.startswith(f"Removed {train.name} (")
    assert bank.banks(cache) == [test] and note.exists()
    assert not list(train.glob("*.npy"))
    assert np.isfinite(np.load(test / "test.npy")).all()


@pytest.mark.parametrize("name", ["nothing", "../cache", "hashes", "."])
def test_an_unknown_name_removes_nothing(cache: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(cache.rglob("*"))
    known = bank.banks(cache)[0].name
    assert _run(cache, "remove", known, name) == 2
    error = capsys.readouterr().err
    assert repr(name) in error and error.count("\n") == 1
    assert sorted(cache.rglob("*")) == before


def test_a_bank_that_a_run_fills_is_not_removed(
    tmp_path: Path, make_folder: FolderMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a real filling, which the other process is made to wait in."""
    images, cache = make_folder(tmp_path / "images", classes=2, train=3, test=2), tmp_path / "cache"
    code = f"""
import sys, pathlib
from tests.conftest import TinyExtractor, tiny_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.features.bank import FeatureBank
class Waiting(TinyExtractor):
    def __call__(self, images):
        print(flush=True); sys.stdin.read()
        return super().__call__(images)
data, cache = load_dataset(tiny_config(data_path={str(images)!r})), pathlib.Path({str(cache)!r})
known = fingerprint_splits(data, cache)
bank = FeatureBank(data, Waiting(), image_size=8, augment_seed=5, fingerprints=known, cache_dir=cache, num_workers=0)
bank.fill([("train", 0)])
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe) as run:
        run.stdout.readline()
        (target,) = bank.banks(cache)
        before = sorted(target.iterdir())
        assert _run(cache, "remove", target.name) == 2
        assert f"is in use by process {run.pid}" in capsys.readouterr().err
        assert sorted(target.iterdir()) == before
        run.stdin.close()
    assert run.returncode == 0
    assert _run(cache, "remove", target.name) == 0
    assert [path.name for path in target.iterdir()] == ["lock"]
