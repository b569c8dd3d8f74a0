"""--dry-run: says what a run would do, writes nothing but the images' hashes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FolderMaker, Outcome, tiny_config
from trainer import dry_run
from utils.config.config import Config
from utils.config.grid import SweepCell


@pytest.fixture
def folder(tmp_path: Path, make_folder: FolderMaker) -> Path:
    """6 classes of 4 training and 3 test images: three tasks of two classes."""
    return make_folder(tmp_path / "images")


def planned(config: Config) -> dict[str, Any]:
    (plan,) = dry_run([SweepCell("", config)])
    return plan


def _config(folder: Path, **keys: object):
    out = folder.parent / "out"
    own = {"checkpoint_dir": str(out / "tosca"), "log_dir": str(out / "logs"), "cache_dir": str(out / "cache")}
    return tiny_config(data_path=str(folder), **{**own, "train_views": 2, **keys})


def test_it_counts_what_is_missing_over_all_seeds(folder: Path) -> None:
    once = 24 + 18  # the test transform, of training and of test images
    assert planned(_config(folder))["forwards"] == once + 2 * 24
    assert planned(_config(folder, seed=[1, 2, 3]))["forwards"] == once + 3 * 2 * 24
    assert planned(_config(folder, seed=[1, 2, 3], augment_seed=1))["forwards"] == once + 2 * 24
    assert planned(_config(folder, seed=[1, 2], cache_dir="none"))["forwards"] == 2 * (once + 2 * 24)
    plan = planned(_config(folder, seed=[1, 2]))
    assert plan["bytes"] == plan["forwards"] * 192 * 4 and plan["seconds"] > 0


def test_it_writes_only_what_the_cache_remembers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        planned(_config(folder))
    written = [path for path in (folder.parent / "out").rglob("*") if path.is_file()]
    assert {path.parent.name for path in written} <= {"hashes", "backbones"}
    assert "task 3: 2 classes" in caplog.text and "8 training and 6 test images" in caplog.text
    assert "an estimate from a short probe" in caplog.text


def test_after_a_run_nothing_is_missing_and_its_files_are_those_named(
    folder: Path, run_main: Callable[..., Outcome]
) -> None:
    keys = {"data_path": str(folder), "cache_dir": str(folder.parent / "cache")}
    out = folder.parent / "out"
    own = {**keys, "checkpoint_dir": str(out / "tosca"), "log_dir": str(out / "logs")}
    plan = planned(tiny_config(**own))
    run = run_main(out, **keys)
    assert run.json()["backbone_forwards"] == plan["forwards"]
    files = {Path(path) for path in plan["files"]}
    written = {path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert written - files == {out / "config.json"}
    assert {path.suffix for path in files - written} <= {".png"}  # needs matplotlib
    again = planned(tiny_config(**own))
    assert again["forwards"] == again["bytes"] == 0 and again["seconds"] is None


def test_it_stops_at_what_a_run_would_stop_at(
    folder: Path, run_main: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(folder.parent / "out", "--dry-run", data_path=str(folder), init_cls=7).code == 2
    assert "init_cls 7" in capsys.readouterr().err
