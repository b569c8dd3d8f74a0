"""Two processes under torchrun on one bank, with gloo on the CPU, against one process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from main import main
from tests.conftest import ROOT, TINY, FolderMaker

# one image a batch makes the filling last long enough to be hit
KEYS: dict[str, Any] = {
    **TINY,
    "init_cls": 3,
    "increment": 3,
    "seed": [1, 2],
    "augment_seed": 7,
    "feature_batch_size": 1,
}


def _config(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    own = {"cache_dir": str(folder / "cache"), "checkpoint_dir": str(folder / "tosca"), "log_dir": str(folder / "logs")}
    path = folder / "config.json"
    path.write_text(json.dumps({**KEYS, **own, **keys}))
    return path


def _torchrun(config: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    return subprocess.Popen(
        [*command, f"--config={config}"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _second_rank(process: subprocess.Popen) -> psutil.Process | None:
    for child in psutil.Process(process.pid).children():
        try:
            if child.environ().get("RANK") == "1":
                return child
        except psutil.Error:
            continue
    return None


def _features(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "cache").rglob("*.npy"))}


def _results(folder: Path, seed: int) -> dict[str, Any]:
    (path,) = folder.glob(f"logs/**/{seed}_*.json")
    run = json.loads(path.read_text())
    return {name: run[name] for name in ("status", "results", "confusion", "entropy", "class_order")}


@pytest.mark.skipif(os.name != "posix", reason="kills a process by signal")
def test_two_ranks_give_what_one_gives_bit_for_bit_also_after_one_of_them_died(
    tmp_path: Path, make_folder: FolderMaker
) -> None:
    data = str(make_folder(tmp_path / "data", train=60, test=5))
    two = _config(tmp_path / "two", data_path=data)
    killed = _torchrun(two)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "two").rglob("*.filling.npy")):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0]
        time.sleep(0.05)
    _second_rank(killed).kill()
    output = killed.communicate(timeout=60)[0]  # it ends, and says so
    assert killed.returncode != 0
    assert "Traceback" not in output.partition("torch/distributed")[0]
    half_filled = list((tmp_path / "two").rglob("*.filling.npy"))
    assert half_filled, "the rank was killed too late to prove anything"

    resumed = _torchrun(two)
    output = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, output
    assert output.count("Backbone: ") == 2  # once for each seed: rank 1 does not repeat the log

    assert main([f"--config={_config(tmp_path / 'one', data_path=data)}"]) == 0
    one = _features(tmp_path / "one")
    assert len(one) == 3 and not any("filling" in name for name in one)
    assert _features(tmp_path / "two") == one
    for seed in KEYS["seed"]:
        assert _results(tmp_path / "two", seed) == _results(tmp_path / "one", seed)


def test_several_devices_in_one_process_point_to_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--config={_config(tmp_path, device=['0', '1'])}"]) == 2
    assert "torchrun --nproc_per_node=2 main.py" in capsys.readouterr().err
