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
from utils.results.read import read_runs
from utils.results.tables import make_sections
from utils.runs.setup import RunPaths

matplotlib = pytest.importorskip("matplotlib")

from matplotlib import rc_context  # noqa: E402 - it needs matplotlib
from matplotlib.text import Text  # noqa: E402 - it needs matplotlib

from utils.results import drawing, figures  # noqa: E402 - it needs matplotlib


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


def test_the_curve_is_the_mean_over_seeds_and_the_band_one_sample_deviation(two_seeds, finished_run):
    figure = figures.accuracy_curves(two_seeds, "sample")
    (axes,) = figure.axes
    curve = np.array(finished_run.json()["results"]["sample"]["top1_curve"])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), curve - 1)
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx((curve - 1).min() - np.sqrt(2))
    assert "sample" in axes.get_title() and "2 seeds" in axes.get_title()


@pytest.mark.parametrize("curves", [[[100.0, 99.0], [60.0, 97.0]], [[0.0, 1.0], [30.0, 2.0]]])
def test_bands_and_axes_never_leave_percentages(curves):
    _, axes = drawing.one_panel()
    drawing.draw_line(axes, 0, "x", np.array(curves))
    drawing.finish_curves(axes, "after task", "accuracy (%)")
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() >= 0 and heights.max() <= 100
    assert axes.get_ylim()[0] >= 0 and axes.get_ylim()[1] <= 101


@pytest.mark.parametrize("name", ["$x^2$", "a $ and $ b_1", r"$\\frac{$"])
def test_a_dollar_sign_in_a_name_is_drawn_as_it_is(name, tmp_path):
    """Matplotlib would read what stands between two of them as a formula, and stop at one that is none."""
    with rc_context(drawing.RC):
        figure, axes = drawing.one_panel()
        drawing.draw_line(axes, 0, name, np.array([[1.0, 2.0]]))
        axes.set_title(name)
        axes.set_xticks([1, 2], [name, "b"])
        drawing.finish_curves(axes, name, name)
    drawing.save(figure, tmp_path / "a.png", tmp_path / "a.pdf")
    texts = [text for text in figure.findobj(Text) if text.get_text() == name]
    assert len(texts) >= 5
    assert not any(text.get_parse_math() for text in texts)


def test_a_group_looks_the_same_in_every_picture(two_seeds, tmp_path):
    """Also where other groups lack the selection that a picture shows."""
    values = json.loads((tmp_path / "a.json").read_text())
    values["identity"]["model_name"] = values["config"]["model_name"] = "tosca_white"
    values["results"]["ridges"] = values["results"].pop("ridge")
    (tmp_path / "c.json").write_text(json.dumps(values))
    (section,), _ = make_sections(read_runs([tmp_path])[0])
    looks = {}
    for selection in ("sample", "ridge", "ridges"):
        for line in figures.accuracy_curves(section, selection).axes[0].lines:
            looks.setdefault(line.get_label(), set()).add((line.get_color(), line.get_marker()))
    assert len(looks) == 2 and all(len(found) == 1 for found in looks.values())


def test_no_axis_counts_from_zero(two_seeds):
    assert figures.accuracy_curves(two_seeds, "sample").axes[0].get_xlim()[0] >= 0.5


def test_letters_that_no_font_has_are_boxes_without_a_warning(tmp_path):
    figure, axes = drawing.one_panel()
    axes.set_title("\U0001f989 \U0010fffd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.save(figure, tmp_path / "a.png")


def test_lines_differ_without_their_colour():
    looks = set(zip(map(str, drawing.STYLES), drawing.MARKERS, strict=True))
    assert len(looks) == len(set(drawing.MARKERS)) == len(set(map(str, drawing.STYLES))) == drawing.MAX_LINES


def test_a_baseline_stands_in_other_selections_under_its_own_name(two_seeds, tmp_path):
    values = json.loads((tmp_path / "a.json").read_text())
    values["identity"]["model_name"] = values["config"]["model_name"] = "simplecil"
    values["results"] = {"sample": values["results"]["sample"]}
    values["selection_accuracy"], values["confusion"], values["entropy"], values["sparsity"] = {}, {}, {}, []
    (tmp_path / "c.json").write_text(json.dumps(values))
    (section,), _ = make_sections(read_runs([tmp_path])[0])
    labels = figures.accuracy_curves(section, "batch").axes[0].get_legend_handles_labels()[1]
    assert labels == ["tosca (tosca)", "simplecil [sample]"]
    assert figures.accuracy_curves(section, "unknown") is None


def test_of_many_methods_the_best_are_shown_and_it_says_so(finished_run, tmp_path):
    for index in range(drawing.MAX_LINES + 2):
        values = finished_run.json()
        values["identity"]["l1"] = index
        values["results"]["sample"]["top1_curve"] = [50.0 + index] * 3
        (tmp_path / f"{index}.json").write_text(json.dumps(values))
    (section,), _ = make_sections(read_runs([tmp_path])[0])
    (axes,) = figures.accuracy_curves(section, "sample").axes
    assert [line.get_ydata()[0] for line in axes.lines] == [52.0 + i for i in range(drawing.MAX_LINES)]
    assert f"the best {drawing.MAX_LINES} of {drawing.MAX_LINES + 2}" in axes.get_title()


def test_confusion_shows_the_share_of_each_true_task(two_seeds):
    group = two_seeds.groups[0]
    figure = figures.confusions(group, ["batch", "sample"])
    panels = [axes for axes in figure.axes if axes.images and axes.get_xlabel()]
    assert [axes.get_title() for axes in panels] == ["batch (class order)", "sample"]
    shares = np.asarray(panels[1].images[0].get_array())
    np.testing.assert_allclose(shares.sum(axis=1), 100)
    counts = np.array(group.runs[0].values["confusion"]["sample"])
    np.testing.assert_allclose(shares, 100 * counts / counts.sum(axis=1, keepdims=True))


def test_all_pictures_of_a_section_as_png_and_pdf_and_on_one_page(two_seeds, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "page.html"
    places = [tmp_path / f"{name}.json" for name in "ab"]
    for path in places:  # two selections are enough to see
        values = json.loads(path.read_text())
        values["results"] = {name: values["results"][name] for name in ("batch", "sample")}
        path.write_text(json.dumps(values))
    assert report_command.main([*map(str, places), "--out", str(out), "--html", str(page)]) == 0
    pngs = sorted(path for path in out.iterdir() if path.suffix == ".png")
    for what in ("accuracy-sample", "accuracy-batch", "matrix", "confusion"):
        assert any(what in path.name for path in pngs)
    for path in pngs:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    text = page.read_text(encoding="utf-8")
    assert text.count('src="') == text.count('src="data:image/png;base64,') == len(pngs)
    assert "http" not in text.split("</style>")[0]


def test_the_same_picture_gives_the_same_bytes(two_seeds, tmp_path):
    for suffix in (".png", ".pdf"):
        paths = [tmp_path / f"{i}{suffix}" for i in range(2)]
        for path in paths:
            drawing.save(figures.accuracy_curves(two_seeds, "sample"), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_each_run_leaves_a_picture_beside_its_json(finished_run):
    assert finished_run.log_file().with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in ("utils.results.figures", "utils.results.drawing", "utils.results.prediction_figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
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
