"""The tutorial's notebook runs from top to bottom; Jupyter is not needed for that."""

import json

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # no figure stands in it without having been computed
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_a_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(ROOT))
    first, *others = code_cells()
    names: dict = {}
    exec(first.replace("(Path.cwd(), *Path.cwd().parents)", f"(Path({str(ROOT)!r}),)"), names)
    for cell in others:
        exec(cell, names)
    assert names["tested"]["sample"]["top1"] > 95 and len(names["tested"]["ridge"]["per_task"]) == 2
    assert names["found"] > 0.9 * len(names["nines"]) and len(names["loaded"].class_names) == 10
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["tutorial_files"]
