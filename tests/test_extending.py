"""docs/extending.md is true: its code, dropped into a copy of the tree, trains, sweeps, reports and predicts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
# commands run one after the other in one process, so that PyTorch loads once
LOSS = "In place of `loss_of`"
DRIVER = """
import json, sys
import main, predict, report
commands = {"main": main.main, "predict": predict.main, "report": report.main}
for name, *arguments in json.loads(sys.argv[1]):
    assert commands[name](arguments) == 0, (name, arguments)
"""


def blocks() -> dict[str, str]:
    """The Python code of the page by the line that stands before it."""
    return dict(re.findall(r"^([^\n]+):\n\n```python\n(.*?)```", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository with the code of the page in it, and nothing else changed."""
    copy = tmp_path_factory.mktemp("copy") / "tree"
    skipped = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "logs", "tosca", "data", ".venv", "tests")
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: skipped(folder, names) if Path(folder) == ROOT else [])
    code = blocks()
    named = {"`models/pnorm.py`", "Above `DATASETS`", "In `DATASETS`", "Above `FLOWS`", "In `FLOWS`", LOSS}
    assert set(code) == named
    (copy / "models" / "pnorm.py").write_text(code["`models/pnorm.py`"], encoding="utf-8")
    for variable, path in (("DATASETS", "utils/data/datasets.py"), ("FLOWS", "backbone/luca.py")):
        text = (copy / path).read_text(encoding="utf-8")
        (opening,) = re.findall(rf"^{variable}\b.*\{{\n", text, re.M)
        above, entry = code[f"Above `{variable}`"], code[f"In `{variable}`"]
        (copy / path).write_text(text.replace(opening, f"{above}\n\n{opening}{entry}"), encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def listed(make_folder, tmp_path_factory) -> Path:
    """Images and the ``labels.csv`` of the data set that the page adds."""
    root = make_folder(tmp_path_factory.mktemp("listed"), classes=4, train=4, test=3)
    files = sorted(root.rglob("*.png"))
    lines = [f"{path.relative_to(root)},{path.parent.name},{path.parent.parent.name}" for path in files]
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return root


def test_a_method_a_data_set_and_a_flow_of_the_page_do_all_that_ours_do(tree, listed, tmp_path):
    places = {"checkpoint_dir": str(tmp_path / "tosca"), "log_dir": str(tmp_path / "logs")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, **places, "dataset": "listed", "data_path": str(listed)}))
    config, method = f"--config={path}", "model_name=pnorm"
    single = [f"checkpoint_dir={tmp_path / 'one'}", f"log_dir={tmp_path / 'single'}"]
    image = str(next((listed / "test").rglob("*.png")))
    commands = [
        ["main", config, method, "power=3", *single],
        ["predict", "--checkpoint", str(tmp_path / "one"), image],
        ["main", config, method, "--sweep", "power=1,2"],
        ["main", config, "--sweep", "flow=tosca,residual"],
        ["predict", "--checkpoint", str(tmp_path / "tosca" / "flow=residual"), image],
        ["report", str(tmp_path / "logs"), "--out", str(tmp_path / "tables"), "--no-pictures"],
    ]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "listed has" not in run.stdout + run.stderr  # its counts are those of the entry
    runs = [json.loads(p.read_text()) for p in (tmp_path / "logs").rglob("*.json")]
    assert sorted((r["identity"]["model_name"], r["identity"].get("power"), r["identity"]["flow"]) for r in runs) == [
        ("pnorm", 1.0, "tosca"),
        ("pnorm", 2.0, "tosca"),
        ("tosca", None, "residual"),
        ("tosca", None, "tosca"),
    ]
    table = (tmp_path / "tables" / "tables.md").read_text()
    lines = table.splitlines()
    first = next(number for number, line in enumerate(lines) if "pnorm" in line)  # what repeats above is blank
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[first : first + 2]]
    assert {cell for row in rows for cell in row} >= {"pnorm", "1", "2"}
    assert "residual" in table


def test_help_and_mistakes_know_the_method_of_the_page(tree, tmp_path):
    def said(*arguments: str) -> str:
        command = [sys.executable, "main.py", *arguments]
        found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        return found.stdout + found.stderr

    assert re.search(r"pnorm +nearest class mean in a p-norm\n +power=1.0: the p of the norm", said("--help"))
    assert "power must be above 0, got 0" in said("model_name=pnorm", "power=0")
    assert "key 'power' belongs to pnorm, but model_name is 'tosca'" in said("power=2")
    assert "the nearest known key is 'power'" in said("model_name=pnorm", "powre=2")


def test_a_loss_of_the_page_is_the_one_that_trains(tree, listed, tmp_path):
    training = tree / "models" / "training.py"
    plain = training.read_text(encoding="utf-8")
    edited, count = re.subn(r"def loss_of\(.*?(?=\n\n\nclass )", lambda _: blocks()[LOSS].strip(), plain, flags=re.S)
    assert count == 1
    curves, logs = [], []
    try:
        for name, text in (("plain", plain), ("edited", edited)):
            training.write_text(text, encoding="utf-8")
            places = {"checkpoint_dir": str(tmp_path / name), "log_dir": str(tmp_path / f"logs_{name}")}
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({**TINY, **places, "dataset": "listed", "data_path": str(listed)}))
            command = [sys.executable, "main.py", f"--config={path}"]
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            logs.append(done.stdout)
            (run,) = (tmp_path / f"logs_{name}").rglob("*.json")
            curves.append([epoch["loss"] for task in json.loads(run.read_text())["epochs"] for epoch in task])
    finally:
        training.write_text(plain, encoding="utf-8")
    assert curves[0] != curves[1]
    assert ["fast training step differs" in log for log in logs] == [False, True]
