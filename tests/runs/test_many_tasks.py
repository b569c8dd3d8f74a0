"""Many tasks of one class: killed half-way they end as if nothing had happened, and predict and report."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import main
import predict
import report
from models.api.classifier import ContinualClassifier
from tests.conftest import TINY, fork, handlers_restored
from utils.results import record as report_files

TRAIN, TEST = 2, 1


def make_classes(root: Path, classes: int) -> Path:
    """Small images, a colour of its own for each class: ``train/<class>/*.png`` and ``test/<class>/*.png``."""
    colours = np.random.default_rng(0).integers(0, 256, (classes, 3), dtype=np.uint8)
    for label in range(classes):
        for index in range(TRAIN + TEST):
            path = root / ("train" if index < TRAIN else "test") / f"{label:03d}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([label, index]).integers(-20, 20, (8, 8, 3))
            Image.fromarray((colours[label] + noise).clip(0, 255).astype(np.uint8)).save(path)
    return root


def config_file(folder: Path, **keys: Any) -> Path:
    folder.mkdir()
    own = {"checkpoint_dir": str(folder / "tosca"), "log_dir": str(folder / "logs"), "init_cls": 1, "increment": 1}
    path = folder / "config.json"
    path.write_text(json.dumps({**TINY, "epochs": 1, "train_views": 0, "feature_batch_size": 64, **own, **keys}))
    return path


def run(config: Path) -> int:
    with handlers_restored():
        return main.main([f"--config={config}"])


def run_killed_after(config: Path, tasks: int) -> None:
    """Run in a copy of this process that ends without a word in the report of task ``tasks``, after its commit."""
    child = fork()
    if child == 0:
        write, calls = report_files.write_run_json, iter(range(tasks + 1))  # two calls come before the first task

        def killing(*arguments: Any) -> dict[str, Any]:
            if next(calls, None) is None:
                os._exit(9)
            return write(*arguments)

        report_files.write_run_json = killing
        run(config)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def facts(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("*_vit_tiny_patch16_224.json")
    values = json.loads(path.read_text())
    return {name: values[name] for name in ("status", "results", "confusion", "entropy", "details", "sparsity")}


def check_many_tasks(tmp_path: Path, tasks: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_classes(tmp_path / "data", tasks)
    keys = {"data_path": str(data), "cache_dir": str(tmp_path / "cache")}
    whole, killed = config_file(tmp_path / "whole", **keys), config_file(tmp_path / "killed", **keys)
    assert run(whole) == 0
    run_killed_after(killed, tasks // 2)
    (path,) = killed.parent.rglob("*_vit_tiny_patch16_224.json")
    stopped = json.loads(path.read_text())
    assert (stopped["status"], len(stopped["results"]["sample"]["top1_curve"])) == ("running", tasks // 2 - 1)
    assert run(killed) == 0
    assert f"after task {tasks // 2} of {tasks}" in capsys.readouterr().out
    assert facts(killed.parent) == facts(whole.parent)
    for name in (f"task{tasks - 1}.pth", f"classifier{tasks - 1}.pth"):
        assert (killed.parent / "tosca" / name).read_bytes() == (whole.parent / "tosca" / name).read_bytes()

    image = str(data / "test" / "000" / f"{TRAIN}.png")
    assert predict.main(["--checkpoint", str(killed.parent / "tosca"), "--json", image]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[0])
    expected = ContinualClassifier.load(whole.parent / "tosca").predict([image]).classes
    assert [answer["class"]] == expected
    assert report.main([str(killed.parent / "logs"), "--out", str(tmp_path / "tables"), "--no-pictures"]) == 0
    assert "sample" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="copies the process")
def test_thirty_two_tasks_of_one_class_killed_half_way_then_resumed_predict_and_report(tmp_path, capsys):
    check_many_tasks(tmp_path, 32, capsys)  # more than FEW_TASKS


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="copies the process")
def test_three_hundred_tasks_of_one_class_killed_half_way_then_resumed_predict_and_report(tmp_path, capsys):
    check_many_tasks(tmp_path, 300, capsys)
