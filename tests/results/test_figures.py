"""Pictures: what is drawn, not how it looks; that a run gets one, and does without where matplotlib is absent."""

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import report as report_command
from utils.results import record as report
from utils.results.metrics import selection_name
from utils.results.read import read_runs
from utils.results.tables import make_sections
from utils.runs.setup import RunPaths

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.text import Text  # noqa: E402 - it needs matplotlib

from utils.results import figures  # noqa: E402 - it needs matplotlib


@pytest.fixture
def two_seeds(finished_run, tmp_path):
    """The section of a real run and of a second seed that is 2 points worse after every task."""
    values = finished_run.json()
    other = json.loads(json.dumps(values))
    other["seed"] = other["identity"]["seed"] = other["identity"]["augment_seed"] = 7
    for result in other["results"].values():
        result["top1_curve"] = [value - 2 for value in result["top1_curve"]]
    for name, run in (("a", values), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    (section,), _ = make_sections(read_runs([tmp_path])[0])
    return section


def looks_of(axes) -> dict[str, tuple]:
    return {line.get_label(): (line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}


def other_run(tmp_path, name: str, model: str, **changes) -> dict:
    """A copy of the real run that another method has given."""
    values = json.loads((tmp_path / "a.json").read_text())
    values["identity"]["model_name"] = values["config"]["model_name"] = model
    values |= changes
    (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return values


def section_in(folder):
    (section,), _ = make_sections(read_runs([folder])[0])
    return section


def test_the_first_picture_is_every_method_under_its_best_answer_against_the_classes_seen(two_seeds, tmp_path):
    values = other_run(tmp_path, "c", "simplecil", selection_accuracy={}, confusion={})
    values["results"] = {"sample": values["results"]["sample"]}
    (tmp_path / "c.json").write_text(json.dumps(values))
    section = section_in(tmp_path)
    figure = figures.methods_curves(section)
    single, batch = figure.axes
    group = section.groups[0]
    best = max(("sample", "lda", "ridge"), key=lambda name: group.number(name, "last").mean)
    assert list(looks_of(single)) == [f"tosca (flow tosca) [{best}]", "simplecil"]
    assert list(single.lines[0].get_xdata()) == [2, 4, 6] and single.get_xlabel() == "classes seen"
    assert figure.get_suptitle() == "imagefolder: 2 classes, then 2 (3 tasks)" == section.title
    assert len(batch.lines) == 1 and "tells the task" in batch.get_title()
    assert list(looks_of(batch).values()) == [looks_of(single)[f"tosca (flow tosca) [{best}]"]]
    assert single.get_ylim() == batch.get_ylim()
    assert figure.legends[0].get_title().get_text() == "line: mean over seeds; band: ± one standard deviation"


def test_a_curve_is_the_mean_over_seeds_and_the_band_one_sample_deviation(two_seeds, finished_run):
    figure = figures.selection_curves(two_seeds)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.lines}
    assert list(panels) == [selection_name(name) for name in two_seeds.groups[0].selections]
    assert len({axes.get_ylim() for axes in panels.values()}) == 1  # one scale
    curve = np.array(finished_run.json()["results"]["sample"]["top1_curve"])
    np.testing.assert_allclose(panels["sample"].lines[0].get_ydata(), curve - 1)
    (band,) = panels["sample"].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx((curve - 1).min() - np.sqrt(2))


@pytest.mark.parametrize("curves", [[[100.0, 99.0], [60.0, 97.0]], [[0.0, 1.0], [30.0, 2.0]]])
def test_bands_and_axes_never_leave_percentages(two_seeds, curves):
    for run, curve in zip(two_seeds.groups[0].runs, curves, strict=True):
        for result in run.values["results"].values():
            result["top1_curve"] = curve
    axes = figures.methods_curves(two_seeds).axes[0]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() >= 0 and heights.max() <= 100
    assert axes.get_ylim()[0] >= 0 and axes.get_ylim()[1] <= 101
    assert axes.get_xlim()[0] > 0


@pytest.mark.parametrize("name", ["$x^2$", "a $ and $ b_1", "\U0001f989 \U0010fffd"])
def test_names_are_drawn_as_they_are_and_without_a_warning(finished_run, tmp_path, name):
    """Matplotlib would read what stands between two dollar signs as a formula; a letter that no font has is a box."""
    run = finished_run.json()
    run["config"]["dataset"] = name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.run_curves(run)
        figures.save(figure, tmp_path / "a.png", tmp_path / "a.pdf")
    (title,) = [text for text in figure.findobj(Text) if name in text.get_text()]
    assert title.get_text() == f"tosca (flow tosca) on {name}, seed {run['seed']}" and not title.get_parse_math()


def test_a_group_looks_the_same_in_every_picture_also_without_colour(two_seeds, tmp_path):
    values = other_run(tmp_path, "c", "tosca_white")
    values["results"]["ridges"] = values["results"].pop("ridge")
    (tmp_path / "c.json").write_text(json.dumps(values))
    section = section_in(tmp_path)
    first = [look for _, look in sorted(looks_of(figures.methods_curves(section).axes[0]).items())]
    figure = figures.selection_curves(section)
    assert {look for axes in figure.axes for look in looks_of(axes).values()} == set(first)
    assert len({look[1:] for look in first}) == 2


def test_of_many_methods_the_best_are_shown_and_it_says_so(finished_run, tmp_path):
    count = figures.MAX_LINES + 2
    for index in range(count):
        values = finished_run.json()
        values["identity"]["l1"] = index
        for result in values["results"].values():
            result["last"], result["top1_curve"] = 50.0 + index, [50.0 + index] * 3
        (tmp_path / f"{index}.json").write_text(json.dumps(values))
    axes = figures.methods_curves(section_in(tmp_path)).axes[0]
    assert [line.get_ydata()[0] for line in axes.lines] == [52.0 + i for i in range(figures.MAX_LINES)]
    assert len({look[1:] for look in looks_of(axes).values()}) == figures.MAX_LINES
    assert f"the best {figures.MAX_LINES} of {count}" in axes.get_title()


def test_a_run_of_new_classes_alone_is_in_no_curve(two_seeds, tmp_path):
    base = {"base": {"reported_from_task": 2}}
    other_run(tmp_path, "c", "simplecil", **base)
    assert len(figures.methods_curves(section_in(tmp_path)).axes[0].lines) == 1


def test_shares_of_20_and_60_are_told_apart_with_and_without_colour():
    """By the lightness (CIE L*) of what is drawn, which a print in grey keeps."""
    colours = matplotlib.colormaps["viridis"](np.array([0.2, 0.6]))[:, :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    dark, light = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    assert light - dark > 25


def test_matrices_show_mean_accuracies_and_the_shares_of_each_true_task(two_seeds):
    group = two_seeds.groups[0]
    for kind in ("matrix", "confusion"):
        figure = figures.matrices(group, kind, "tosca on a set")
        assert figure.get_suptitle() == "tosca on a set"
        panels = {axes.get_title(): axes for axes in figure.axes if axes.images and axes.get_title()}
        assert list(panels) == ["batch (class order)", "sample", "lda", "ridge"]
        (image,) = panels["sample"].images
        assert image.get_cmap().name == "viridis" and image.get_clim() == (0, 100)  # one scale
        shown = np.asarray(image.get_array(), dtype=float)
        values = group.runs[0].values
        if kind == "matrix":
            matrix = np.array(values["results"]["sample"]["matrix"], dtype=float)
            np.testing.assert_allclose(shown[np.tril_indices(3)], matrix[np.tril_indices(3)])
        else:
            counts = np.array(values["confusion"]["sample"])
            np.testing.assert_allclose(shown, 100 * counts / counts.sum(axis=1, keepdims=True))


def test_all_pictures_of_a_section_as_png_and_pdf_and_on_one_page(two_seeds, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "page.html"
    places = [tmp_path / f"{name}.json" for name in "ab"]
    for path in places:  # two selections are enough to see
        values = json.loads(path.read_text())
        values["results"] = {name: values["results"][name] for name in ("batch", "sample")}
        path.write_text(json.dumps(values))
    assert report_command.main([*map(str, places), "--out", str(out), "--html", str(page)]) == 0
    pngs = sorted(path for path in out.iterdir() if path.suffix == ".png")
    assert [path.stem.rpartition("-")[2] for path in pngs] == ["accuracy", "selections", "confusion", "matrix"]
    for path in pngs:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    text = page.read_text(encoding="utf-8")
    assert text.count('src="') == text.count('src="data:image/png;base64,') == len(pngs)
    assert text.index("every method under its best selection") < text.index("every selection")
    assert "http" not in text.split("</style>")[0]


def test_the_same_picture_gives_the_same_bytes(finished_run, tmp_path):
    for suffix in (".png", ".pdf"):
        paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
        for path in paths:
            figures.save(figures.run_curves(finished_run.json()), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_each_run_leaves_a_picture_beside_its_json(finished_run):
    assert finished_run.log_file().with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.delitem(sys.modules, "utils.results.figures", raising=False)
    monkeypatch.delattr("utils.results.figures", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError


def test_without_matplotlib_a_run_says_so_and_goes_on(without_matplotlib, pictures, finished_run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    report.draw_curves(RunPaths(tmp_path, "run"), finished_run.json())
    assert "pip install matplotlib" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_tables_are_made_all_the_same(without_matplotlib, finished_run, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "page.html"
    logs = Path(finished_run.config["log_dir"])
    assert report_command.main([str(logs), "--out", str(out), "--html", str(page)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert sorted(path.suffix for path in out.iterdir()) == [".md", ".tex"]
    assert "<table>" in page.read_text(encoding="utf-8")
