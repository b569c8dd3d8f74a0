"""Sweeps: the grid and its errors, and a real one from start to end, interrupted, resumed and done."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import main
import trainer
from models import preparation
from tests.conftest import curves_drawn, fork
from utils.config.grid import make_grid
from utils.errors import ConfigError, NumericError
from utils.results import record
from utils.runs.checkpoint import MANIFEST, CheckpointFolder

KEYS = {"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": "glyphs_vit", "image_size": 32}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KEYS))
    return path


def test_the_grid_is_every_combination_in_folders_of_their_own(config_file):
    cells = make_grid([config_file], ["epochs=3", "log_dir=my/logs"], ["flow=tosca,tosca_r", "l1=0,0.0005"])
    names = ["flow=tosca,l1=0", "flow=tosca,l1=0.0005", "flow=tosca_r,l1=0", "flow=tosca_r,l1=0.0005"]
    assert [cell.name for cell in cells] == names
    assert [(c.config.flow, c.config.l1) for c in cells[1:3]] == [("tosca", 0.0005), ("tosca_r", 0.0)]
    assert {cell.config.epochs for cell in cells} == {3}
    assert [cell.config.log_dir for cell in cells] == [str(Path("my/logs") / name) for name in names]
    assert [cell.config.checkpoint_dir for cell in cells] == [str(Path("tosca") / name) for name in names]


def test_equal_values_are_one_cell_however_they_are_written_and_a_key_may_be_given_twice(config_file):
    assert [cell.name for cell in make_grid([config_file], [], ["l1=0,0.0", "l1=0e3,1"])] == ["l1=0", "l1=1"]


def test_a_folder_s_name_has_no_separator(config_file):
    (cell,) = make_grid([config_file], [], ["backbone_type=hf-hub:someone/vit"])
    assert cell.name == "backbone_type=hf-hub_someone_vit"


def test_what_cannot_be_swept_is_an_override_for_all_cells(config_file):
    cells = make_grid([config_file], [], ["l1=0,1", "seed=1993,1994", "log_dir=my/logs"])
    assert [(cell.name, cell.config.seed) for cell in cells] == [("l1=0", (1993, 1994)), ("l1=1", (1993, 1994))]
    assert cells[0].config.log_dir == str(Path("my/logs/l1=0"))
    (cell,) = make_grid([config_file], [], ["seed=1,2"])
    assert (cell.name, cell.config.seed, cell.config.log_dir) == ("", (1, 2), "logs")


@pytest.mark.parametrize(
    ("overrides", "sweep_texts", "message"),
    [
        ([], ["flwo=tosca"], "the nearest known key is 'flow'"),
        ([], ["flow=tosca,tsoca_r"], "did you mean"),
        ([], ["l1=0,-1"], "l1 must be at least 0"),
        ([], ["l1"], "key=v1,v2"),
        ([], ["l1=0,"], "key=v1,v2"),
        ([], ["log_dir=a,b"], "does not change what a run computes"),
        (["epochs=0"], ["l1=0,1"], "epochs must be at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(config_file, overrides, sweep_texts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_grid([config_file], overrides, sweep_texts)
    assert "\n" not in str(caught.value)


def test_the_command_line_gives_all_that_is_swept_and_overridden(config_file, monkeypatch):
    monkeypatch.setattr(trainer, "run", lambda cells, **_: seen.extend(cells))
    seen: list[Any] = []
    flags = ["--sweep", "flow=tosca,tosca_r", "--sweep", "l1=0", "lr=1,2", "seed=3"]
    assert main.main([f"--config={config_file}", *flags]) == 0
    assert [cell.name for cell in seen][0::3] == ["flow=tosca,l1=0,lr=1", "flow=tosca_r,l1=0,lr=2"]
    assert main.main([f"--config={config_file}", "--sweep", "seed=3,4"]) == 0  # nothing is swept: a run as any other
    assert seen[-1].config.seed == (3, 4)


# -- a real sweep -----------------------------------------------------------------------------------------------------

GRID = ("--sweep", "flow=tosca,calibrator", "l1=0,0.001")
CELLS = ["flow=calibrator,l1=0", "flow=calibrator,l1=0.001", "flow=tosca,l1=0", "flow=tosca,l1=0.001"]


def written(folder: Path) -> dict[str, int]:
    """When each file of the runs was written last; logs and locks, which grow every time, apart."""
    files = (path for part in ("tosca", "logs") for path in (folder / part).rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files if path.suffix != ".log" and ".lock" not in path.name}


def test_a_sweep_stops_resumes_finishes_and_then_has_nothing_to_do(
    digit_folder, run_main, tmp_path, capsys, monkeypatch
):
    keys = {"data_path": str(digit_folder), "cache_dir": str(tmp_path / "bank"), "epochs": 1, "seed": [1, 2]}
    keys |= {"augment_seed": 0}
    loads, learned = [], []
    load, run_seed = preparation.load_backbone, trainer.run_seed

    def stop_at_the_fourth(setup, seed):
        if len(learned) == 3:
            raise KeyboardInterrupt
        learned.append(setup.config.flow)
        return run_seed(setup, seed)

    monkeypatch.setattr(preparation, "load_backbone", lambda *args: loads.append(1) or load(*args))
    monkeypatch.setattr(trainer, "run_seed", stop_at_the_fourth)
    assert run_main(tmp_path, *GRID, **keys).code == 130
    assert len(loads) == 1  # all cells share one backbone

    monkeypatch.setattr(trainer, "run_seed", run_seed)
    capsys.readouterr()
    assert run_main(tmp_path, *GRID, **keys).code == 0
    told = capsys.readouterr().out
    assert told.count("This run is finished") == 3
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == CELLS
    assert sorted(path.name for path in (tmp_path / "tosca").iterdir()) == CELLS
    runs = [json.loads(path.read_text()) for path in (tmp_path / "logs").rglob("*.json")]
    assert [run["status"] for run in runs] == ["finished"] * 8
    assert sum(run["backbone_forwards"] for run in runs) == max(run["backbone_forwards"] for run in runs) > 0
    table = told[told.rindex("selection accuracy  seeds") :].partition("further columns")[0]
    assert table.count(" sample ") == table.count(" oracle (true task) ") == 4

    before = written(tmp_path)
    assert run_main(tmp_path, *GRID, **keys).code == 0
    assert capsys.readouterr().out.count("This run is finished") == 8
    assert written(tmp_path) == before


# -- killed -----------------------------------------------------------------------------------------------------------

KILLED_GRID = ("--sweep", "l1=0,0.001")
WITHOUT_TIMES = ("seconds", "cost", "sha256")


def end_of(folder: Path) -> dict[str, Any]:
    """What a sweep left in checkpoints and logs: bytes, or values but for times; logs and locks apart."""
    found: dict[str, Any] = {}
    for path in [*(folder / "tosca").rglob("*"), *(folder / "logs").rglob("*")]:
        if path.suffix == ".json" or path.name == MANIFEST:
            values = json.loads(path.read_text().replace(str(folder), ""))
            found[str(path.relative_to(folder))] = {k: v for k, v in values.items() if k not in WITHOUT_TIMES}
        elif path.is_file() and path.suffix != ".log" and "lock" not in path.name:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def killed_keys(make_folder, tmp_path_factory) -> dict[str, Any]:
    """Two tasks of tiny data, over a bank that is full before the first sweep."""
    folder = tmp_path_factory.mktemp("killed")
    data = make_folder(folder / "data", classes=4, train=3, test=2)
    return {"data_path": str(data), "cache_dir": str(folder / "bank"), "epochs": 1, "image_size": 16}


@pytest.fixture(scope="module")
def unkilled(run_main, killed_keys, tmp_path_factory) -> dict[str, Any]:
    """The end of a sweep that nothing disturbs."""
    assert run_main(tmp_path_factory.mktemp("fill"), **killed_keys).code == 0
    folder = tmp_path_factory.mktemp("unkilled")
    with curves_drawn():
        assert run_main(folder, *KILLED_GRID, **killed_keys).code == 0
    return end_of(folder)


def kill_me(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after_commits(run_main: Any, folder: Path, keys: dict[str, Any], commits: int) -> None:
    """Start the sweep in a process that is killed between commit number ``commits`` and the JSON that follows it."""
    if not (pid := fork()):
        try:
            committed: list[int] = []
            commit, write = CheckpointFolder.commit, record.write_run_json

            def count(*args: Any, **kwargs: Any) -> Any:
                committed.append(1)
                return commit(*args, **kwargs)

            CheckpointFolder.commit = count  # this is a process of its own
            trainer.record.write_run_json = lambda *args: (
                kill_me() if len(committed) == commits else write(*args)  # of four: two tasks in each of two cells
            )
            run_main(folder, *KILLED_GRID, **keys)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("commits", "status"),
    [(1, ["running"]), (2, ["running"]), (3, ["finished", "running"]), (4, ["finished", "running"])],
    ids=["half-way through the first cell", "after its last commit", "half-way through the last", "after the last"],
)
def test_a_sweep_killed_before_the_json_of_a_task_ends_as_one_that_nobody_killed(
    run_main, killed_keys, unkilled, tmp_path, pictures, commits, status
):
    killed_after_commits(run_main, tmp_path, killed_keys, commits)
    left = [json.loads(path.read_text())["status"] for path in (tmp_path / "logs").rglob("*.json")]
    assert sorted(left) == status
    for path in (tmp_path / "logs").rglob("*.json"):  # a write of a report may have begun, too
        path.with_name(f".{path.stem}.json.999999999.partial").touch()
    for path in (tmp_path / "tosca").rglob(MANIFEST):  # and what a commit replaces may not have been removed yet
        path.with_name("classifier0.pth").touch()
    assert run_main(tmp_path, *KILLED_GRID, **killed_keys).code == 0
    found = end_of(tmp_path)
    assert {Path(name).suffix for name in found} >= {".json", ".png", ".npz", ".pth"}
    assert found.keys() == unkilled.keys()
    assert [name for name in found if found[name] != unkilled[name]] == []


def test_a_cell_that_diverges_does_not_stop_the_others(digit_folder, run_main, tmp_path, capsys, monkeypatch):
    run_seed = trainer.run_seed

    def diverge(setup, seed):
        if setup.config.lr == 5:
            raise NumericError("loss is nan")
        return run_seed(setup, seed)

    monkeypatch.setattr(trainer, "run_seed", diverge)
    outcome = run_main(tmp_path, "--sweep", "lr=5,0.025", data_path=str(digit_folder), epochs=1)
    assert outcome.code == 2
    assert "1 of 2 runs are missing: lr=5, seed 1993: loss is nan" in capsys.readouterr().err
    (cell,) = [folder for folder in (tmp_path / "logs").iterdir() if list(folder.rglob("*.json"))]
    assert cell.name == "lr=0.025"


def test_other_data_or_backbone_is_loaded_anew(config_file, monkeypatch):
    prepared = []

    def prepare(config, ranks, before=None):
        prepared.append(before is not None and config.shares_backbone_with(before.config))
        return trainer.Setup(config, None, None, {}, ranks)

    monkeypatch.setattr(trainer, "prepare", prepare)
    monkeypatch.setattr(trainer, "run_seed", lambda *_, **__: None)
    monkeypatch.setattr(trainer.run_log, "log_sweep", lambda *_: None)
    logging.getLogger("sweep").setLevel(logging.INFO)
    trainer.run(make_grid([config_file], [], ["normalize=false,true", "l1=0,1"]))
    assert prepared == [False, True, False, True]
