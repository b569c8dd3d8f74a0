"""Ranks of torchrun on one bank, with gloo on the CPU, against one process; two agents stand for two nodes.

An agent is a copy of this process that runs torchrun's own command line; its ranks are processes of their own.
"""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed.run as torchrun

from main import main
from tests.conftest import ROOT, TINY, FolderMaker, fork, handlers_restored

# one image a batch makes the filling last long enough to be hit
KEYS: dict[str, Any] = {
    **TINY,
    "init_cls": 3,
    "increment": 3,
    "seed": [1, 2],
    "augment_seed": 7,
    "feature_batch_size": 1,
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="copies the process and kills by signal")


def _config(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    own = {"cache_dir": str(folder / "cache"), "checkpoint_dir": str(folder / "tosca"), "log_dir": str(folder / "logs")}
    path = folder / "config.json"
    path.write_text(json.dumps({**KEYS, **own, **keys}))
    return path


@dataclass(frozen=True)
class Agent:
    """A running ``torchrun``."""

    pid: int
    output_file: Path

    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def end(self, seconds: float) -> int:
        """Wait for its end; return its exit code."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1])

    def kill_node(self) -> None:
        """SIGKILL it and its ranks, as when a machine loses its power."""
        for process in [psutil.Process(self.pid), *self.ranks()]:
            process.kill()
        assert self.end(10) == -signal.SIGKILL


def _torchrun(config: Path, name: str, *options: str) -> Agent:
    output = config.with_name(f"{name}.txt")
    child = fork()
    if child == 0:
        try:
            os.chdir(ROOT)
            target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
            torchrun.main([*options, "main.py", f"--config={config}"])
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, flush=True)
            os._exit(1)
    return Agent(child, output)


def _two_nodes(config: Path) -> tuple[Agent, Agent]:
    """As docs/scale.md starts two nodes, one rank on each; the first is the head.

    Between machines torchrun tells the head by its name; here both have that name, and the faster one would be it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
    first, second = (_torchrun(config, f"node{n}", *options, f"--rdzv_conf=is_host={int(n == 0)}") for n in (0, 1))
    return first, second


def _wait_for_filling(folder: Path, agent: Agent) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.rglob("*.filling.npy")):
        assert time.monotonic() < deadline and psutil.pid_exists(agent.pid), agent.output()
        time.sleep(0.02)


def _features(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "cache").rglob("*.npy"))}


def _results(folder: Path, seed: int) -> dict[str, Any]:
    (path,) = folder.glob(f"logs/**/{seed}_*.json")
    run = json.loads(path.read_text())
    return {name: run[name] for name in ("status", "results", "confusion", "entropy", "class_order")}


@dataclass(frozen=True)
class Reference:
    """What one process makes of the data under two seeds."""

    data: Path
    folder: Path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, make_folder: FolderMaker) -> Reference:
    folder = tmp_path_factory.mktemp("one")
    data = make_folder(folder / "data", train=15, test=3)
    with handlers_restored():
        assert main([f"--config={_config(folder / 'run', data_path=str(data))}"]) == 0
    return Reference(data, folder / "run")


@pytest.mark.parametrize("head_dies", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_nodes_give_what_one_process_gives_bit_for_bit_also_after_one_of_them_died(
    tmp_path: Path, one_process: Reference, head_dies: bool
) -> None:
    config = _config(tmp_path / "two", data_path=str(one_process.data))
    head, other = _two_nodes(config)
    stays, dies = (other, head) if head_dies else (head, other)
    _wait_for_filling(config.parent, dies)
    dies.kill_node()
    assert stays.end(60) != 0  # it ends, and says so; without its head, torchrun may be the first to say it
    says = ["another process of this torchrun has ended", *["RendezvousConnectionError"] * head_dies]
    assert any(line in stays.output() for line in says), stays.output()
    assert list(config.parent.rglob("*.filling.npy")), "the node was killed too late to prove anything"

    first, second = _two_nodes(config)
    assert (first.end(120), second.end(60)) == (0, 0), first.output() + second.output()
    output = first.output() + second.output()
    assert output.count("Backbone: ") == 2  # once for each seed: rank 1 does not repeat the log
    features = _features(one_process.folder)
    assert len(features) == 3 and not any("filling" in name for name in features)
    assert _features(config.parent) == features
    for seed in KEYS["seed"]:
        assert _results(config.parent, seed) == _results(one_process.folder, seed)


@pytest.mark.slow
def test_two_ranks_continue_a_saved_run_as_one_process_does(tmp_path: Path, one_process: Reference) -> None:
    for split in ("train", "test"):
        (tmp_path / "more" / split).mkdir(parents=True)
        for label in ("0", "1", "2"):
            (tmp_path / "more" / split / f"new{label}").symlink_to(one_process.data / split / label)
    base = str(one_process.folder / "tosca" / "seed1")
    keys = {"data_path": str(tmp_path / "more"), "seed": [1], "continue_from": base}
    one, two = _config(tmp_path / "one", **keys), _config(tmp_path / "two", **keys)
    assert main([f"--config={one}"]) == 0
    agent = _torchrun(two, "agent", "--standalone", "--nproc_per_node=2")
    assert agent.end(120) == 0, agent.output()
    assert _features(two.parent) == _features(one.parent)
    assert _results(two.parent, 1) == _results(one.parent, 1)


@pytest.mark.slow
def test_a_rank_that_dies_ends_its_node_and_the_same_command_goes_on(tmp_path: Path, one_process: Reference) -> None:
    config = _config(tmp_path / "two", data_path=str(one_process.data))
    options = ("--standalone", "--nproc_per_node=2")
    killed = _torchrun(config, "killed", *options)
    _wait_for_filling(config.parent, killed)
    next(rank for rank in killed.ranks() if rank.environ().get("RANK") == "1").kill()
    assert killed.end(60) != 0
    assert list(config.parent.rglob("*.filling.npy")), "the rank was killed too late to prove anything"
    resumed = _torchrun(config, "resumed", *options)
    assert resumed.end(120) == 0, resumed.output()
    assert _features(config.parent) == _features(one_process.folder)
    for seed in KEYS["seed"]:
        assert _results(config.parent, seed) == _results(one_process.folder, seed)


def test_rank_0_trains_the_first_session_and_all_extract(tmp_path: Path, one_process: Reference) -> None:
    session = {"first_session": "adapter", "first_session_epochs": 1, "first_session_lr": 0.5}
    keys = {"data_path": str(one_process.data), "seed": [1], "model_name": "aper", "feature_batch_size": 4, **session}
    one, two = _config(tmp_path / "one", **keys), _config(tmp_path / "two", **keys)
    assert main([f"--config={one}"]) == 0
    agent = _torchrun(two, "agent", "--standalone", "--nproc_per_node=2")
    assert agent.end(120) == 0, agent.output()
    adapters = [path.read_bytes() for path in sorted(tmp_path.rglob("first_session.pth"))]
    assert len(adapters) == 2 and adapters[0] == adapters[1]
    features = _features(one.parent)
    assert len(features) == 4 and _features(two.parent) == features  # plain and adapted, train and test
    assert _results(two.parent, 1) == _results(one.parent, 1)


def test_several_devices_in_one_process_point_to_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--config={_config(tmp_path, device=['0', '1'])}"]) == 2
    assert "torchrun --nproc_per_node=2 main.py" in capsys.readouterr().err
