"""A checkpoint that the first version of the format wrote: it loads, counts as finished and predicts as it did."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import main
from models.api.classifier import ContinualClassifier
from utils.runs.checkpoint import CheckpointFolder

SAVED = Path(__file__).parent / "format1"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the old run; its config names folders below the current one."""
    folder = shutil.copytree(SAVED, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def test_every_fact_of_an_old_manifest_is_read(old):
    manifest = CheckpointFolder(old / "tosca").read_manifest()
    values = json.loads((SAVED / "tosca" / "run.manifest").read_bytes())
    assert manifest.finished
    assert [record.epochs for record in manifest.tasks] == [(), ()]  # nobody kept them then
    found = manifest.to_json()
    for name in ("identity", "config", "seed", "backbone", "class_order", "task_sizes", "row_class", "files"):
        assert found[name] == values[name], name
    for record, expected in zip(found["tasks"], values["tasks"], strict=True):
        assert {name: record[name] for name in expected} == expected


def test_an_old_run_counts_as_finished_and_its_results_are_the_same(old, capsys):
    before = {path.name: path.read_bytes() for path in (old / "tosca").iterdir()}
    assert main.main(["--config=config.json"]) == 0
    assert "This run is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (old / "tosca").iterdir() if path.name != ".lock"} == before
    (path,) = (old / "logs").rglob("*.json")
    found, expected = json.loads(path.read_bytes()), json.loads((SAVED / "run.json").read_bytes())
    for name in ("status", "identity", "selection_accuracy", "confusion", "entropy", "sparsity", "seconds"):
        assert found[name] == expected[name], name
    for name, result in expected["results"].items():  # later versions add measures
        assert {key: found["results"][name][key] for key in result} == result


def test_an_old_run_predicts_as_it_did(old):
    expected = [json.loads(line) for line in (SAVED / "predictions.jsonl").read_text().splitlines()]
    model = ContinualClassifier.load(old / "tosca")
    found = model.predict([line["file"] for line in expected], top_k=3)
    assert found.classes == [line["class"] for line in expected]
    assert found.module.tolist() == [line["module"] for line in expected]
    probabilities = torch.tensor([[answer["probability"] for answer in line["top"]] for line in expected])
    torch.testing.assert_close(found.probabilities, probabilities, rtol=0, atol=1e-4)


def test_an_old_run_can_be_continued(old, run_main):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("4", "5"):
            shutil.copytree(old / "data" / split / "0", old / "more" / split / name)
            assert len(list((old / "more" / split / name).iterdir())) == count
    keys = json.loads((old / "config.json").read_text())
    grown = run_main(old / "new", **{**keys, "pretrained": True, "data_path": "more", "continue_from": "tosca"})
    assert grown.code == 0
    assert len(CheckpointFolder(grown.checkpoints).read_manifest().tasks) == 3
