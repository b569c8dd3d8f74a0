"""Several files at once, and runs side by side: the same files, the same bits, and nothing lost when one ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import main
from tests.conftest import ROOT, TINY
from tests.runs.test_sweep import end_of
from utils.config.grid import make_grid
from utils.data.loader import as_done
from utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def keys(make_folder, tmp_path_factory) -> dict[str, Any]:
    """Two tasks of tiny data, and the bank that all tests share."""
    folder = tmp_path_factory.mktemp("jobs")
    data = make_folder(folder / "data", classes=4, train=3, test=2)
    return {**TINY, "data_path": str(data), "cache_dir": str(folder / "bank"), "epochs": 1, "image_size": 16}


@pytest.fixture
def configs(keys, tmp_path) -> list[str]:
    """Two files: ``one.json`` and ``two.json``, which differ in the penalty."""
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, l1 in zip(paths, (0, 0.001), strict=True):
        path.write_text(json.dumps({**keys, "l1": l1}))
    return list(map(str, paths))


def places(folder: Path) -> list[str]:
    return [f"checkpoint_dir={folder / 'tosca'}", f"log_dir={folder / 'logs'}"]


# -- several files ----------------------------------------------------------------------------------------------------


def test_each_file_has_a_folder_of_its_own_and_is_swept(configs):
    first, second = map(Path, configs)
    cells = make_grid([first, second], ["seed=1,2", "log_dir=my"], ["epochs=1,2"])
    assert [cell.name for cell in cells] == ["one/epochs=1", "one/epochs=2", "two/epochs=1", "two/epochs=2"]
    assert [cell.config.log_dir for cell in cells] == [str(Path("my") / cell.name) for cell in cells]
    assert {cell.config.seed for cell in cells} == {(1, 2)}
    assert [cell.name for cell in make_grid([first, second, first], [], [])] == ["one", "two"]


def test_files_of_one_name_are_refused(configs, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "one.json"
    twin.write_text(Path(configs[0]).read_text())
    with pytest.raises(ConfigError, match="would write to one folder"):
        make_grid([Path(configs[0]), twin], [], [])


@pytest.fixture
def with_missing(configs, keys, tmp_path) -> list[str]:
    """The two files with one between them whose data is not there."""
    missing = tmp_path / "gone.json"
    missing.write_text(json.dumps({**keys, "data_path": str(tmp_path / "nowhere")}))
    return [configs[0], str(missing), configs[1]]


def test_a_file_whose_data_is_missing_is_told_at_the_end_and_the_others_are_done(with_missing, tmp_path, capsys):
    assert main.main(["--config", *with_missing, *places(tmp_path)]) == 2
    assert "1 of 3 runs are missing: gone: " in capsys.readouterr().err.splitlines()[-1]
    runs = [json.loads(path.read_text()) for path in (tmp_path / "logs").rglob("*.json")]
    assert sorted(run["config"]["l1"] for run in runs) == [0, 0.001]
    assert {run["status"] for run in runs} == {"finished"}
    assert main.main(["--config", *with_missing, *places(tmp_path)]) == 2
    assert capsys.readouterr().out.count("This run is finished") == 2


def test_an_image_that_cannot_be_read_leaves_the_other_files_their_runs(configs, keys, tmp_path, make_folder, capsys):
    data = make_folder(tmp_path / "damaged", classes=4, train=3, test=2)
    (data / "train" / "0" / "000.png").write_bytes(b"no picture")
    Path(configs[0]).write_text(json.dumps({**keys, "data_path": str(data)}))
    for jobs in ("1", "2"):
        assert main.main(["--config", *configs, "--jobs", jobs, *places(tmp_path)]) == 2
        assert "1 of 2 runs are missing: one, seed 1993: " in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_in_any_file_is_told_before_the_first_starts(configs, tmp_path, capsys):
    Path(configs[1]).write_text('{"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": "x", "lr": -1}')
    assert main.main(["--config", *configs, *places(tmp_path)]) == 2
    assert "two.json: lr must be" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_dry_run_adds_up_what_the_files_lack_and_counts_no_feature_twice(with_missing, tmp_path, capsys):
    new = [*places(tmp_path), f"cache_dir={tmp_path / 'empty'}"]
    assert main.main(["--config", *with_missing, "--dry-run", "--jobs", "2", *new, "seed=1,2"]) == 2
    told = capsys.readouterr()
    once = 12 + 8 + 2 * 12  # the test transform of all images, and one view of each training image for each seed
    assert f"All together: {once} forward passes, " in told.out
    assert "Memory: about " in told.out and "2 runs side by side" in told.out
    assert "1 of 3 cannot start: gone: " in told.err


def test_the_data_of_all_files_is_checked(with_missing, keys, tmp_path, capsys, make_folder):
    assert main.main(["--config", *with_missing, "--check-data"]) == 2
    told = capsys.readouterr()
    assert told.out.count("12 images of 4 classes") == 1  # both good files have the same data
    assert "nowhere" in told.err
    other = make_folder(tmp_path / "other", classes=2)
    Path(with_missing[1]).write_text(json.dumps({**keys, "data_path": str(other)}))
    assert main.main(["--config", *with_missing, "--check-data", "--json"]) == 0
    assert [found["classes"]["train"] for found in json.loads(capsys.readouterr().out)] == [4, 2]


# -- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["{one}", "seed=1,2"],
        ["{one}", "--sweep", "l1=0,0.001"],
        ["{one}", "{two}"],
        ["{one}", "model_name=simplecil", "first_session_epochs=1", "--sweep", "first_session=none,adapter"],
    ],
    ids=["seeds", "sweep", "files", "first session"],
)
def test_runs_side_by_side_leave_the_same_bits_in_the_same_files(configs, tmp_path, capsys, pictures, arguments):
    given = [text.format(one=configs[0], two=configs[1]) for text in arguments]
    for folder, jobs in (("filled", "1"), ("alone", "1"), ("beside", "2")):  # the first fills the bank
        assert main.main(["--config", *given, "--jobs", jobs, *places(tmp_path / folder)]) == 0
    assert capsys.readouterr().out.count(": finished\n") == 2
    alone, beside = end_of(tmp_path / "alone"), end_of(tmp_path / "beside")
    assert alone.keys() == beside.keys() and len(alone) > 8
    assert [name for name in alone if alone[name] != beside[name]] == []
    logs = sorted(path.relative_to(tmp_path / "beside") for path in (tmp_path / "beside").rglob("*.log"))
    assert len(logs) == 2
    for log in logs:
        text = (tmp_path / "beside" / log).read_text()
        assert "CNN top1 curve" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "0"], "--jobs 0: a number from 1 on"),
        (["--jobs", "2", "cache_dir=none"], "above 1 not with cache_dir=none"),
    ],
)
def test_jobs_that_cannot_be_are_refused_before_anything_is_touched(configs, tmp_path, capsys, arguments, words):
    assert main.main(["--config", configs[0], "--fresh", *arguments, *places(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def pid_or_end(job: str) -> int:
    if job == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "long":
        time.sleep(600)
    return os.getpid()


def test_a_killed_process_is_named_and_a_new_one_goes_on():
    jobs = ["a", "end", "b", "c", "d"]
    found = dict(as_done(pid_or_end, jobs, workers=2))
    assert found.keys() == set(jobs)
    ended = found.pop("end")
    assert isinstance(ended, DataError) and "its process ended (signal 9)" in str(ended) and "--jobs" in str(ended)
    assert all(isinstance(pid, int) and pid != os.getpid() for pid in found.values())


def started(configs: list[str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "main.py"), "--config", *configs, *places(folder), "--jobs", "2", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def wait_for(found: Callable[[], Any]) -> Any:
    for _ in range(3000):
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_all_and_the_next_start_goes_on(configs, tmp_path, capsys):
    long = "epochs=3000"
    process = started(configs, tmp_path, long, "train_views=1")
    two = wait_for(lambda: len(found := children(process.pid)) == 2 and found)
    wait_for(lambda: len(list((tmp_path / "logs").rglob("*.log"))) == 2)
    os.kill(two[0], signal.SIGKILL)  # one is killed: a line names it, and the other goes on
    wait_for(lambda: children(process.pid) == [two[1]])
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "its process ended (signal 9)" in out and ("one, seed 1993" in out or "two, seed 1993" in out)
    assert "start the same command again to go on" in err
    wait_for(lambda: not Path(f"/proc/{two[1]}").exists())
    assert main.main(["--config", *configs, *places(tmp_path), "--jobs", "2"]) == 0
    assert capsys.readouterr().out.count(": finished\n") == 2
