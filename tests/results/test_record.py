"""What a run leaves beside its log: the JSON that docs/outputs.md describes, and the answers to each test image."""

import json
import re

import numpy as np

from tests.conftest import ROOT
from utils.results import metrics, record

KINDS = {"text": str, "number": (int, float), "object": dict, "list": list, "true or false": bool}


def described(heading: str) -> dict[str, tuple[str, bool]]:
    """The names in a table of docs/outputs.md with the kind of their values, and whether they may be null or absent."""
    text = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8").partition(heading)[2].partition("\n\n|")[2]
    rows = [line.split(" | ") for line in ("|" + text.partition("\n\n")[0]).splitlines()[2:]]
    found = {}
    for names, kind, *_ in rows:
        for name in re.findall("`(.*?)`", names):
            found[name] = (kind.replace(" or null", "").replace(" (or absent)", ""), "null" in kind)
    return found


def check(values: dict, heading: str, absent: tuple[str, ...] = ()) -> None:
    kinds = described(heading)
    assert list(values) == [name for name in kinds if name not in absent]
    for name, value in values.items():
        kind, null = kinds[name]
        assert isinstance(value, KINDS[kind]) or (null and value is None), (name, kind, value)


def test_the_json_is_what_the_documentation_says(finished_run):
    values = finished_run.json()
    check(values, "### The JSON", absent=("base", "domains"))
    for result in values["results"].values():
        check(result, "Each selection in `results`")
    for result in values["details"].values():
        check(result, "Each selection in `details`")
    for epoch in (epoch for task in values["epochs"] for epoch in task):
        check(epoch, "Each epoch in `epochs`")


def test_the_json_of_one_task_has_no_forgetting(run_main, make_folder, tmp_path):
    data = make_folder(tmp_path / "data", classes=2, train=1, test=1)
    outcome = run_main(tmp_path, data_path=str(data))
    result = outcome.json()["results"]["sample"]
    assert (result["forgetting"], result["backward_transfer"]) == (None, None)
    assert "Forgetting (CNN): –" in outcome.log() and "-0.0" not in outcome.log()
    check(result, "Each selection in `results`")


def test_a_run_writes_the_answers_of_its_last_task(finished_run):
    values = finished_run.json()
    with np.load(finished_run.log_file().with_suffix(".npz"), allow_pickle=False) as archive:
        arrays = dict(archive)
    names, true = arrays.pop("class_names"), arrays.pop("true_class")
    assert names.tolist() == values["class_order"]
    for file, label in zip(arrays.pop("files"), true, strict=True):
        assert str(file).startswith(f"{names[label]}/")
    for name, result in values["results"].items():
        hits, probability = arrays[f"{name}.class"] == true, arrays[f"{name}.probability"]
        assert metrics.percent(hits) == result["last"]
        assert 0 < probability.min() <= probability.max() <= 1
        if name in values["confusion"]:
            assert metrics.confusion(true // 2, arrays[f"{name}.module"], 3) == values["confusion"][name]
        assert result["backward_transfer"] == metrics.backward_transfer(result["matrix"])
        assert values["details"][name] == {
            "per_class": metrics.group_accuracies(hits, true, len(names)),
            "ece": metrics.expected_calibration_error(probability, hits),
        }


def test_the_same_answers_give_the_same_bytes(tmp_path):
    answers = {"files": np.array(["a", "b"]), "true_class": np.array([0, 1]), "sample.class": np.array([0, 1])}
    for name in ("a.npz", "b.npz"):
        record.write_answers(tmp_path / name, answers)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_only_the_last_task_carries_details(finished_run):
    from utils.runs.checkpoint import CheckpointFolder

    manifest = CheckpointFolder(finished_run.checkpoints).read_manifest()
    assert [bool(task.details) for task in manifest.tasks] == [False, False, True]
    assert json.loads(json.dumps(manifest.tasks[-1].details)) == finished_run.json()["details"]
