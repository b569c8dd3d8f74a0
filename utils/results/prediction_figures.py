"""Pictures of the answers after the last task: class confusion, reliability, accuracy on each class, learning curves.

Importing this file needs matplotlib, an optional extra.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError
from utils.results import metrics
from utils.results.drawing import (
    GRID,
    RC,
    draw_line,
    finish_curves,
    horizontal_grid,
    one_panel,
    panel_grid,
    save_both,
    shortened,
    task_word,
)
from utils.results.escape import terminal
from utils.results.metrics import selection_name
from utils.results.predictions import Predictions, read_predictions
from utils.results.tables import Group
from utils.words import counted

_NAMED_CLASSES = 25  # more do not fit beside a matrix: their numbers are shown then
_FREQUENT = 15  # confusions that are listed by name
_FAINT = 0.4  # exponent of the greys: a few percent are visible beside 100
_SHOWN = "sample"
_CAPTIONS = {
    "classes": f"Class confusion after the last task, selection: {_SHOWN}; small shares are drawn darker than they are",
    "reliability": "Reliability: accuracy against the probability of the answer; ECE in percentage points",
    "per-class": "Accuracy on each class, worst first",
    "learning": "Loss and accuracy of each epoch while training",
}


def draw_predictions(group: Group, stem: Path) -> list[tuple[str, Path]]:
    """Draw what the run's ``.npz`` and JSON tell about classes; (caption, PNG) for each picture."""
    found = _predictions(group)
    figures = {
        "classes": class_confusion(found, _SHOWN) if found else None,
        "reliability": reliability(group),
        "per-class": class_accuracies(group),
        "learning": learning_curves(group),
    }
    return [(_CAPTIONS[name], save_both(figure, Path(f"{stem}-{name}"))) for name, figure in figures.items() if figure]


def _predictions(group: Group) -> list[Predictions]:
    """What the runs answered, where it lies beside their JSON; none unless all have the same classes."""
    found = []
    for run in group.runs:
        path = Path(run.path).with_suffix(".npz")
        if run.path and path.is_file():
            try:
                predictions = read_predictions(path)
            except UserError:
                continue
            if _SHOWN in predictions.selections:
                found.append(predictions)
    return found if len({tuple(sorted(p.class_names)) for p in found}) == 1 else []


# -- classes ----------------------------------------------------------------------------------------------------------


def class_confusion(runs: Sequence[Predictions], selection: str) -> Figure:
    """Draw the share of each class's images that got each answer, over all seeds, and name the most frequent mistakes.

    Classes stand in the order of the first run's tasks, so that mistakes within a task lie near the diagonal.
    """
    names = runs[0].class_names
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for run in runs:
        place = np.array([names.index(name) for name in run.class_names])  # class orders differ by seed
        predicted = run.selections[selection].predicted
        counts += metrics.class_confusion(place[run.true_class], place[predicted], len(names))
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = [terminal(name) for name in names]
    with rc_context(RC):
        figure = Figure(figsize=(11.5, 6.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        image = left.imshow(shares, cmap="Greys", norm=PowerNorm(_FAINT, 0, 100), interpolation="nearest")
        left.spines[:].set_visible(True)
        _class_ticks(left, shown)
        left.set_xlabel("answer")
        left.set_ylabel("true class")
        left.set_title(
            f"selection: {selection_name(selection)}, {counted(len(names), 'class')}, {counted(len(runs), 'seed')}"
        )
        figure.colorbar(
            image, ax=left, label="share of the class's images (%)", shrink=0.85, ticks=[0, 1, 5, 20, 50, 100]
        )
        _mistakes(right, shares, shown)
    return figure


def _class_ticks(axes: Axes, names: Sequence[str]) -> None:
    if len(names) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(names)), [shortened(name) for name in names], rotation=90)
        axes.set_yticks(range(len(names)), [shortened(name) for name in names])
        return
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axis.set_major_formatter(lambda position, _: str(int(position) + 1))


def _mistakes(axes: Axes, shares: np.ndarray, names: Sequence[str]) -> None:
    """List the most frequent mistakes as bars with both names, and their numbers in the order of learning."""
    wrong = shares.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_FREQUENT]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place] > 0]
    values = [wrong[pair] for pair in pairs]
    labels = [f"{shortened(names[t])} ({t + 1}) → {shortened(names[p])} ({p + 1})" for t, p in pairs]
    axes.barh(range(len(pairs)), values, color="#777777", height=0.6)
    axes.set_yticks(range(len(pairs)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the true class's images (%)")
    axes.set_title("most frequent mistakes" if pairs else "no mistakes")
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def class_accuracies(group: Group) -> Figure | None:
    """Draw the accuracies on the classes from worst to best, a line for each selection; None: the runs have none."""
    shown = _with_details(group)
    if not shown:
        return None
    with rc_context(RC):
        figure, axes = one_panel()
        for index, name in enumerate(shown):
            of_runs = [run.values["details"][name]["per_class"] for run in group.runs]
            curves = np.array([sorted(v for v in of_run if v is not None) for of_run in of_runs])
            draw_line(axes, index, selection_name(name), curves)
        axes.set_title(f"accuracy on each class, {counted(len(group.runs), 'seed')}")
        finish_curves(axes, "classes, worst first", "accuracy (%)")
    return figure


def _with_details(group: Group) -> list[str]:
    """The selections of single images of which every run tells per-class accuracy and reliability."""
    if not all(run.values.get("details") for run in group.runs):
        return []
    names = [n for n in group.selections if n not in ("batch", "batch_shuffled", "oracle")]
    lengths = {
        len([v for v in run.values["details"].get(n, {}).get("per_class", []) if v is not None])
        for run in group.runs
        for n in names
    }
    return names[:4] if len(lengths) == 1 and lengths != {0} else []


# -- reliability ------------------------------------------------------------------------------------------------------


def reliability(group: Group) -> Figure | None:
    """Draw accuracy against probability, images of all seeds together, a panel for each selection; None: no data."""
    shown = _with_details(group)
    if not shown:
        return None
    with rc_context(RC):
        rows, columns = panel_grid(len(shown))
        figure = Figure(figsize=(0.6 + 2.9 * columns, 3.0 * rows), layout=ConstrainedLayoutEngine(h_pad=0.09))
        panes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panes, shown, strict=False):
            bins = pooled([run.values["details"][name]["reliability"] for run in group.runs])
            _reliability_panel(axes, bins)
            ece = metrics.expected_calibration_error(bins)
            axes.set_title(f"{selection_name(name)}, ECE {0.0 if ece is None else ece:.1f}")
        for axes in panes[len(shown) :]:
            axes.set_axis_off()
        figure.legend(*panes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def pooled(of_runs: Sequence[Sequence[dict[str, float | None]]]) -> list[metrics.ReliabilityBin]:
    """The bins of the images of all runs together."""
    pooled = []
    for same in zip(*of_runs, strict=True):
        counts = [int(b["count"] or 0) for b in same]
        total = sum(counts)
        means = [
            sum(n * (b[key] or 0.0) for n, b in zip(counts, same, strict=True)) / total if total else None
            for key in ("probability", "accuracy")
        ]
        pooled.append(metrics.ReliabilityBin(total, *means))
    return pooled


def _reliability_panel(axes: Axes, bins: Sequence[metrics.ReliabilityBin]) -> None:
    """Bars: share of the images in a bin; points: their accuracy; the diagonal is perfect."""
    total = max(sum(b.count for b in bins), 1)
    width = 100 / len(bins)
    centres = (np.arange(len(bins)) + 0.5) * width
    shares = [100 * b.count / total for b in bins]
    axes.bar(centres, shares, width=width * 0.9, color="#dddddd", label="share of images")
    axes.plot([0, 100], [0, 100], color="#777777", linestyle="--", linewidth=1)
    known = [(b.probability, b.accuracy) for b in bins if b.probability is not None and b.accuracy is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color="black", marker="o", markersize=4, linewidth=1.2, label="accuracy")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    axes.set_xlabel("probability of the answer (%)")
    axes.set_ylabel("accuracy (%)")


# -- learning ---------------------------------------------------------------------------------------------------------


def learning_curves(group: Group) -> Figure | None:
    """Draw loss and training accuracy of every epoch, task after task, as means over seeds; None: no epochs kept."""
    of_runs = [run.values.get("epochs") or [] for run in group.runs]
    shapes = {tuple(len(task) for task in tasks) for tasks in of_runs}
    if len(shapes) != 1 or not sum(lengths := shapes.pop()):
        return None
    ends = np.cumsum(lengths)
    with rc_context(RC):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        panes = figure.subplots(2, 1, sharex=True)
        for axes, key, label in zip(panes, ("loss", "accuracy"), ("loss", "training accuracy (%)"), strict=True):
            curves = np.array([[epoch[key] for task in tasks for epoch in task] for tasks in of_runs], dtype=float)
            mean = curves.mean(axis=0)
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                axes.plot(np.arange(start, end) + 1, mean[start:end], color="black", linewidth=1.2)
            for end in ends[:-1]:
                axes.axvline(end + 0.5, color=GRID, linewidth=0.8)
            axes.set_ylabel(label)
            horizontal_grid(axes)
        panes[0].set_ylim(bottom=0)
        panes[1].set_ylim(top=101)
        panes[1].set_xlim(0.5, sum(lengths) + 0.5)
        word = task_word([run.values for run in group.runs])
        panes[1].set_xlabel(f"epoch, {word} after {word}")
        panes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        panes[0].set_title(f"learning, {counted(len(group.runs), 'seed')}")
    return figure
