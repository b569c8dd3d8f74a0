"""The first run of a newcomer: data and weights that ship with the repository, nothing downloaded."""

import json
from pathlib import Path

import pytest

import main

DEMO = Path(main.DEMO)


@pytest.fixture(scope="module")
def run_demo(tmp_path_factory):
    """Runs the demo with some keys replaced, all on one feature bank; returns its JSON."""
    root = tmp_path_factory.mktemp("demo")

    def run(*overrides: str) -> dict:
        place = root / str(len(list(root.iterdir())))
        folders = [f"{key}={place / key}" for key in ("log_dir", "checkpoint_dir")]
        assert main.main([*overrides, *folders, f"cache_dir={root / 'bank'}", "device=cpu"]) == 0
        (path,) = (place / "log_dir").rglob("*.json")
        return json.loads(path.read_text())

    return run


def test_the_demo_learns_the_digits_without_being_told_the_task(run_demo):
    run = run_demo()
    assert json.loads(DEMO.read_text())["selection"] == "sample"
    assert run["task_sizes"] == [2, 2, 2, 2, 2]
    assert run["results"]["sample"]["last"] >= 80
    assert run["results"]["oracle"]["last"] >= 95
    assert run["results"]["lda"]["last"] > run["results"]["sample"]["last"]
    # the release's evaluation lives on the order of the test set
    assert run["results"]["batch_shuffled"]["last"] < run["results"]["batch"]["last"] - 20


def test_the_shipped_backbone_separates_digits_that_it_has_never_seen(run_demo):
    run = run_demo("model_name=simplecil", "train_views=0")
    assert run["results"]["sample"]["last"] >= 85
