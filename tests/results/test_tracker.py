"""The trackers: what each package reads back, again after a resumed run, and the word when one is not installed."""

import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_config
from utils.errors import UserError
from utils.results.tracker import TensorBoard, Tracker, WeightsAndBiases, points, summary_numbers, tracking
from utils.runs.manifest import EpochStats, TaskRecord

RUN = {
    "results": {"sample": {"average": 85.0, "last": 80.0, "forgetting": 1.0, "backward_transfer": -1.0}},
    "details": {"sample": {"ece": 3.0}},
    "cost": {"Eval (ms/smp)": 2.5},
}


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def record(top1: float, epochs: tuple[EpochStats, ...] = ()) -> TaskRecord:
    results = {"sample": {"top1": top1, "top5": 99.0, "selection_accuracy": 50.0}, "oracle": {"top1": 97.0}}
    return TaskRecord(results, epochs=epochs)


def picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(folder / "curves.png")
    return folder / "curves.png"


def a_run(kind: type[Tracker], folder: Path, starts: list[list[TaskRecord]]) -> None:
    """Starts a run as often as there are lists of records; the last start finishes it."""
    for number, records in enumerate(starts, start=1):
        tracker = kind(folder / "run", tiny_config(l1=0.25), "a run")
        tracker.update(records[:1])
        tracker.update(records)
        if number == len(starts):
            tracker.finish(RUN, [picture(folder), folder / "absent.png"])
        tracker.close()


# -- what every tracker gets ------------------------------------------------------------------------------------------


def test_a_point_for_each_task_and_epoch():
    records = [record(90.0, (EpochStats(2.0, 50.0), EpochStats(1.0, 60.0))), record(80.0, (EpochStats(0.5, 70.0),))]
    found = points(records, 0)
    assert [(axis, step) for axis, step, _ in found] == [
        ("epoch", 1), ("epoch", 2), ("task", 1), ("epoch", 3), ("task", 2),
    ]  # fmt: skip
    assert found[3][2] == {"train/loss": 0.5, "train/accuracy": 70.0}
    shown = {"top1/sample": 80.0, "top5/sample": 99.0, "selection_accuracy/sample": 50.0, "top1/oracle": 97.0}
    assert found[4][2] == shown
    assert points(records, 1) == found[3:]


def test_what_is_not_defined_is_no_number():
    run = {**RUN, "results": {"sample": {**RUN["results"]["sample"], "forgetting": None}}}
    assert summary_numbers(run) == {
        "average/sample": 85.0, "last/sample": 80.0, "backward_transfer/sample": -1.0, "ece/sample": 3.0,
        "cost/Eval (ms/smp)": 2.5,
    }  # fmt: skip


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder)).Reload()
    curves = {tag: [(e.step, round(e.value, 3)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return curves, events.Tags()["images"]


def test_tensorboard_reads_curves_summary_and_pictures_back_once(tmp_path):
    pytest.importorskip("tensorboard")
    a_run(TensorBoard, tmp_path, [[record(90.0)], [record(90.0), record(80.0), record(70.0)]])
    curves, images = read_events(tmp_path / "run")
    assert curves["top1/sample"] == [(1, 90.0), (2, 80.0), (3, 70.0)]
    assert curves["top1/oracle"] == [(1, 97.0), (2, 97.0), (3, 97.0)]
    assert curves["summary/last/sample"] == [(0, 80.0)] and images == ["curves.png"]
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_run_writes_its_curves(digit_folder, run_main, tmp_path):
    pytest.importorskip("tensorboard")
    outcome = run_main(tmp_path, data_path=str(digit_folder), tracker="tensorboard", epochs=1)
    assert outcome.code == 0
    curves, _ = read_events(outcome.log_file().with_suffix(".tensorboard"))
    expected = outcome.json()["results"]["sample"]["top1_curve"]
    assert [value for _, value in curves["top1/sample"]] == pytest.approx(expected, abs=0.001)
    assert curves["summary/last/sample"][0][1] == pytest.approx(expected[-1], abs=0.001)


# -- Weights & Biases, offline ----------------------------------------------------------------------------------------


def wandb_records(folder: Path) -> list[Any]:
    """The records of the one offline run in a folder: blocks of 32 KiB, parts with their length and kind."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, part, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if position + 7 + length > len(data):
            break  # this one is not yet written to its end
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = messages.Record()
            message.ParseFromString(part)
            records.append(message)
            part = b""
    return records


def test_wandb_holds_config_curves_summary_and_pictures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    a_run(WeightsAndBiases, tmp_path, [[record(90.0)], [record(90.0), record(80.0)]])
    deadline = time.monotonic() + 30
    records = wandb_records(tmp_path / "run")
    while not any(r.HasField("exit") for r in records):  # wandb's own process writes the end after finish has returned
        assert time.monotonic() < deadline
        time.sleep(0.01)
        records = wandb_records(tmp_path / "run")
    history = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [(row["task"], row["top1/sample"]) for row in history] == [(1, 90.0), (2, 80.0)]
    (begun,) = [r.run for r in records if r.HasField("run")]
    assert {c.key: c.value_json for c in begun.config.update}["l1"] == "0.25" and begun.project == "tosca"
    summaries = [i for r in records if r.HasField("summary") for i in r.summary.update]
    assert ("last/sample", 80.0) in [("/".join(i.nested_key) or i.key, json.loads(i.value_json)) for i in summaries]
    assert [item.path for r in records if r.HasField("files") for item in r.files.files].count("curves.png") == 1


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "package", "install"),
    [("tensorboard", "torch.utils.tensorboard", "tensorboard"), ("wandb",) * 3],
)
def test_the_package_that_is_missing_is_named_before_any_work(
    digit_folder, run_main, tmp_path, capsys, monkeypatch, tracker, package, install
):
    monkeypatch.setitem(sys.modules, package, None)
    outcome = run_main(tmp_path, data_path=str(digit_folder), tracker=tracker)
    assert outcome.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install {install}" in line and "tracker=none" in line
    assert not outcome.checkpoints.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    tracker = TensorBoard(tmp_path / "file" / "run", tiny_config(), "a run")
    with pytest.raises(UserError, match="tracker=none does without"):
        tracker.update([record(90.0)])


def test_without_a_tracker_nothing_is_written(tmp_path):
    with tracking(tiny_config(), tmp_path, "run") as tracker:
        tracker.update([record(90.0)])
        tracker.finish(RUN, [])
    assert type(tracker) is Tracker
    assert os.listdir(tmp_path) == []
