"""The tracker: what TensorBoard reads back, again after a resumed run, and the word when it is not installed."""

import json
import sys

import pytest

from utils.config import load_config
from utils.results.tracker import TensorBoard, Tracker, tracking
from utils.runs.manifest import TaskRecord


def record(top1: float) -> TaskRecord:
    return TaskRecord({"sample": {"top1": top1, "top5": 99.0, "selection_accuracy": 50.0}, "oracle": {"top1": 97.0}})


def read_back(folder) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, round(e.value, 3)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_point_for_each_task_and_selection(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(tmp_path / "events")
    tracker.update([record(90.0)])
    tracker.update([record(90.0), record(80.0)])
    tracker.close()
    curves = read_back(tmp_path / "events")
    assert curves["top1/sample"] == [(1, 90.0), (2, 80.0)]
    assert curves["selection_accuracy/sample"] == [(1, 50.0), (2, 50.0)]
    assert curves["top1/oracle"] == [(1, 97.0), (2, 97.0)]
    assert "selection_accuracy/oracle" not in curves


def test_a_resumed_run_has_every_point_once(tmp_path):
    pytest.importorskip("tensorboard")
    for start in ([record(90.0)], [record(90.0), record(80.0), record(70.0)]):
        tracker = TensorBoard(tmp_path)
        tracker.update(start)
        tracker.close()
    assert read_back(tmp_path)["top1/sample"] == [(1, 90.0), (2, 80.0), (3, 70.0)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_writes_its_curves(digit_folder, run_main, tmp_path):
    pytest.importorskip("tensorboard")
    outcome = run_main(tmp_path, data_path=str(digit_folder), tracker="tensorboard", epochs=1)
    assert outcome.code == 0
    curves = read_back(outcome.log_file().with_suffix(".tensorboard"))
    expected = outcome.json()["results"]["sample"]["top1_curve"]
    assert [value for _, value in curves["top1/sample"]] == pytest.approx(expected, abs=0.001)


def test_the_package_that_is_missing_is_told_before_any_work(digit_folder, run_main, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = run_main(tmp_path, data_path=str(digit_folder), tracker="tensorboard")
    assert outcome.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install tensorboard" in line
    assert not outcome.checkpoints.exists()


def test_without_a_tracker_nothing_is_written(tmp_path):
    path = tmp_path / "config.json"
    keys = {"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": "x"}
    path.write_text(json.dumps(keys))
    with tracking(load_config(path), tmp_path / "events") as tracker:
        tracker.update([record(90.0)])
    assert type(tracker) is Tracker
    assert not (tmp_path / "events").exists()
