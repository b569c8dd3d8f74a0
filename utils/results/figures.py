"""Pictures of runs, readable in black and white. Importing this file needs matplotlib, an optional extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from utils.results.drawing import (
    MAX_LINES,
    RC,
    domain_names,
    draw_line,
    finish_curves,
    name_ticks,
    one_panel,
    panel_grid,
    save_both,
    task_word,
)
from utils.results.metrics import selection_name
from utils.results.tables import Group, Section
from utils.words import fixed

_NUMBERED_TASKS = 12  # a matrix of more tasks has no numbers in its cells


# -- curves -----------------------------------------------------------------------------------------------------------


def run_curves(run: dict[str, Any]) -> Figure:
    """One run: accuracy after each task, a line for each selection."""
    c = run["config"]
    with rc_context(RC):
        figure, axes = one_panel()
        for index, (name, result) in enumerate(run["results"].items()):
            draw_line(axes, index % MAX_LINES, selection_name(name), np.array([result["top1_curve"]]))
        method = f"{c['model_name']} ({c['flow']})" if c["model_name"] == "tosca" else c["model_name"]
        axes.set_title(f"{method} on {c['dataset']}, seed {run['seed']}")
        finish_curves(axes, f"after {task_word([run])}", "accuracy on all classes seen (%)")
        name_ticks(axes.xaxis, domain_names([run]))
    return figure


def accuracy_curves(section: Section, selection: str) -> Figure | None:
    """Accuracy after each task, a line and a band (± std over seeds) for each group; None: nothing to show.

    A method without modules answers ``sample`` only; it stands in every picture, under that name.
    """
    shown = []
    for place, group in enumerate(section.groups):
        modules = len(group.selections) > 1
        name = selection if selection in group.selections else "sample"
        if name in group.selections and (name == selection or not modules):
            label = group.name if modules or selection == "sample" else f"{group.name} [sample]"
            curves = np.array([run.values["results"][name]["top1_curve"] for run in group.runs])
            shown.append(_Curves(place, label, name == selection, curves))
    if not any(curves.own for curves in shown):
        return None
    with rc_context(RC):
        figure, axes = one_panel()
        kept = _best(shown)
        _draw_lines(axes, section, kept)
        axes.set_title(f"selection: {selection_name(selection)}, {_seeds(section)}{_left_out(kept, shown)}")
        _finish_by_task(axes, section, "accuracy on all classes seen (%)")
    return figure


class _Curves(NamedTuple):
    """The curves of a group in one picture."""

    place: int  # of the group in its section
    label: str
    own: bool  # whether they are of the selection that the picture shows
    values: np.ndarray  # (seeds, tasks)


def _draw_lines(axes: Axes, section: Section, kept: Sequence[_Curves]) -> None:
    """A line for each; a group looks the same in all pictures of a section that has looks enough for its groups."""
    enough = len(section.groups) <= MAX_LINES
    for index, curves in enumerate(kept):
        draw_line(axes, curves.place if enough else index, curves.label, curves.values)


def _finish_by_task(axes: Axes, section: Section, y: str) -> None:
    runs = [run.values for group in section.groups for run in group.runs]
    finish_curves(axes, f"after {task_word(runs)}", y)
    name_ticks(axes.xaxis, domain_names(runs))


def _best(shown: list[_Curves]) -> list[_Curves]:
    """At most ``MAX_LINES``, those of the highest last accuracy, in the order given."""
    ranked = sorted(range(len(shown)), key=lambda i: -shown[i].values[:, -1].mean())[:MAX_LINES]
    return [shown[i] for i in sorted(ranked)]


def _seeds(section: Section) -> str:
    counts = sorted({len(group.runs) for group in section.groups})
    return f"{'–'.join(map(str, counts[:1] + counts[1:][-1:]))} seed{'s' if counts != [1] else ''}"


def _spread(section: Section) -> str:
    return "; mean ± std over seeds" if any(len(group.runs) > 1 for group in section.groups) else ""


def _left_out(kept: Sequence[object], shown: Sequence[object]) -> str:
    return f" (the best {len(kept)} of {len(shown)})" if len(kept) < len(shown) else ""


# -- matrices ---------------------------------------------------------------------------------------------------------


def accuracy_matrices(group: Group, selections: Sequence[str]) -> Figure:
    """Mean over seeds of the accuracy on each task after each task, a panel for each selection."""
    panels = {}
    for name in selections:
        matrices = [run.values["results"][name]["matrix"] for run in group.runs]
        panels[name] = np.array(matrices, dtype=float).mean(axis=0)
    runs = [run.values for run in group.runs]
    word = task_word(runs)
    return _matrices(panels, f"on {word}", f"after {word}", "accuracy (%)", domain_names(runs))


def confusions(group: Group, selections: Sequence[str]) -> Figure:
    """Share of each true task's images for which each module was chosen, over all seeds, after the last task."""
    panels = {}
    for name in selections:
        counts = np.sum([run.values["confusion"][name] for run in group.runs], axis=0)
        panels[name] = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    runs = [run.values for run in group.runs]
    word = task_word(runs)
    return _matrices(panels, "chosen module", f"true {word}", f"share of the {word}'s images (%)", domain_names(runs))


def _matrices(panels: dict[str, np.ndarray], x: str, y: str, what: str, names: Sequence[str]) -> Figure:
    with rc_context(RC):
        rows, columns = panel_grid(len(panels))
        figure = Figure(figsize=(0.6 + 2.9 * columns, 3 * rows), layout=ConstrainedLayoutEngine(h_pad=0.09))
        panes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, values) in zip(panes, panels.items(), strict=False):
            image = _matrix(axes, values)
            name_ticks(axes.xaxis, names, first=0)
            name_ticks(axes.yaxis, names, first=0)
            axes.set_title(selection_name(name))
            axes.set_xlabel(x)
            axes.set_ylabel(y)
        for axes in panes[len(panels) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(panes), label=what, shrink=0.8, aspect=30)
    return figure


def _matrix(axes: Axes, values: np.ndarray) -> Any:
    """Greys, dark for 100; few tasks: the numbers as well."""
    tasks = len(values)
    image = axes.imshow(values, cmap="Greys", vmin=0, vmax=100)
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axis.set_major_formatter(lambda position, _: str(int(position) + 1))
    if tasks <= _NUMBERED_TASKS:
        axes.set_xticks(range(tasks))
        axes.set_yticks(range(tasks))
        size = 9 if tasks <= 6 else 6
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                tone = "white" if value > 55 else "black"
                axes.text(column, row, fixed(value, 0), ha="center", va="center", color=tone, fontsize=size)
    return image


# -- a whole section --------------------------------------------------------------------------------------------------


def draw_section(section: Section, folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """All pictures of a section, as PNG and PDF; group name ("": the section's own) -> (caption, PNG file)."""
    every = list(dict.fromkeys(name for group in section.groups for name in group.selections))
    drawn: dict[str, list[tuple[str, Path]]] = {"": []}
    word = task_word([run.values for group in section.groups for run in group.runs])
    for name in every:
        if figure := accuracy_curves(section, name):
            caption = f"Accuracy after each {word}, selection: {selection_name(name)}{_spread(section)}"
            drawn[""].append((caption, save_both(figure, folder / f"{section.key}-accuracy-{name}")))
    for group in section.groups:
        drawn[group.name] = _draw_group(group, folder / f"{section.key}-{group.key}")
    return drawn


def _draw_group(group: Group, stem: Path) -> list[tuple[str, Path]]:
    drawn = []
    word = task_word([run.values for run in group.runs])
    names = [n for n in group.selections if n not in ("batch_shuffled", "oracle")]
    if whole := [n for n in names if all(run.values["results"][n]["matrix"] for run in group.runs)]:
        figure = accuracy_matrices(group, whole)
        drawn.append((f"Accuracy on each {word} after each {word}", save_both(figure, Path(f"{stem}-matrix"))))
    if chosen := [n for n in names if all(n in run.values["confusion"] for run in group.runs)]:
        figure = confusions(group, chosen)
        drawn.append(
            (f"Which module was chosen for the images of each {word}", save_both(figure, Path(f"{stem}-confusion")))
        )
    return drawn
