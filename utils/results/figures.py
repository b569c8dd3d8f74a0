"""Pictures of runs, readable in black and white. Importing this file needs matplotlib, an optional extra."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from utils.files import atomic_write
from utils.results.comparison import BATCH, NOT_COMPARED, single_image
from utils.results.escape import terminal
from utils.results.metrics import selection_name
from utils.results.published import Entry
from utils.results.render import Picture
from utils.results.tables import Group, Section
from utils.words import counted, fixed

# Okabe and Ito's colours, apart also for the colour-blind; style and marker tell the lines apart without colour
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vXP*<>hp"
MAX_LINES = len(_MARKERS)
_FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Hiragino Sans", "Microsoft YaHei")
_RC: Any = {  # matplotlib types the names of its settings one by one
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
_FEW = 12  # a matrix of more tasks has no numbers in its cells; more domains are numbers on an axis, not names
Line = tuple[int, str, list[list[float]]]  # which look, label, and the curve of each seed
_SCALE = "viridis"  # its lightness grows evenly, so that it serves without colour, too


def save(figure: Figure, *paths: Path) -> None:
    """Write a picture in the format of each suffix, atomically; the same picture gives the same bytes.

    A letter that no installed font has is drawn as a box.
    """
    installed = {font.name for font in fontManager.ttflist}
    fonts = [name for name in _FONTS if name in installed]
    for path in paths:
        buffer = io.BytesIO()
        undated = {"Software": None} if path.suffix == ".png" else {"CreationDate": None}
        with rc_context({**_RC, "font.family": fonts}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format=path.suffix[1:], dpi=150, bbox_inches="tight", metadata=undated)
        atomic_write(path, buffer.getbuffer())


def _panels(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes], list[Axes]]:
    """A figure of panels with one scale, all of them, and those that have none below."""
    rows = -(-count // 3)
    columns = -(-count // rows)
    size, layout = (max(5.2, width * columns), height * rows + 0.3), ConstrainedLayoutEngine(h_pad=0.09)
    figure = Figure(figsize=size, layout=layout)
    figure.suptitle(terminal(title))
    panes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel())
    for axes in panes[count:]:
        axes.set_axis_off()
    lowest = panes[max(0, count - columns) : count]
    for axes in lowest:
        axes.tick_params(labelbottom=True)
    return figure, panes[:count], lowest


# -- curves -----------------------------------------------------------------------------------------------------------


def run_curves(run: Mapping[str, Any]) -> Figure:
    """One run: accuracy against the classes seen, a line for each selection."""
    c = run["config"]
    method = c["model_name"] + (f" (flow {c['flow']})" if "flow" in run["identity"] else "")
    lines = [(selection_name(name), [result["top1_curve"]]) for name, result in run["results"].items()]
    title = f"{method} on {c['dataset']}, seed {run['seed']}"
    return _curves(title, {"": [(place % MAX_LINES, *line) for place, line in enumerate(lines)]}, [run], 5.2, 3.8)


def methods_curves(section: Section) -> Figure:
    """Every method under its best selection that looks at one image at a time and, apart from that, under ``batch``."""
    kept, some = _kept(section)
    single, batch = [], []
    for place, group in enumerate(kept):
        name = _best_selection(group)
        label = group.name + (f" [{selection_name(name)}]" if group.chooses else "")
        single.append((place, label, _of(group, name)))
        batch += [(place, label, _of(group, BATCH))] if BATCH in group.selections else []
    panels = {f"each image by itself, best selection in brackets{some}": single}
    panels |= {"batch: the order of the test set tells the task": batch} if batch else {}
    return _curves(section.title, panels, _runs(kept), 4.6, 3.8)


def selection_curves(section: Section) -> Figure | None:
    """A panel for each selection, a line for each method that chooses by it; None: no method chooses."""
    kept, some = _kept(section)
    panels: dict[str, list[Line]] = {}
    for place, group in enumerate(kept):
        for name in group.selections if group.chooses else ():
            panels.setdefault(selection_name(name), []).append((place, group.name, _of(group, name)))
    return _curves(section.title + some, panels, _runs(kept), 3, 2.5) if panels else None


def _of(group: Group, selection: str) -> list[list[float]]:
    return [run.values["results"][selection]["top1_curve"] for run in group.runs]


def _runs(groups: Sequence[Group]) -> list[Mapping[str, Any]]:
    return [run.values for group in groups for run in group.runs]


def _kept(section: Section) -> tuple[list[Group], str]:
    """The groups that have curves, at most ``MAX_LINES``, in their order; and words for those that are left out."""
    groups = [group for group in section.groups if group.status != "new classes alone" and single_image(group)]
    best = sorted(groups, key=lambda group: -_last(group, _best_selection(group)))[:MAX_LINES]
    some = f" (the best {len(best)} of {len(groups)})" if len(best) < len(groups) else ""
    return [group for group in groups if group in best], some


def _best_selection(group: Group) -> str:
    return max(single_image(group), key=partial(_last, group))


def _last(group: Group, selection: str) -> float:
    number = group.number(selection, "last")
    return -math.inf if number is None else number.mean


def _curves(
    title: str, panels: Mapping[str, Sequence[Line]], runs: Sequence[Mapping[str, Any]], width: float, height: float
) -> Figure:
    """Panels of lines by their titles; percentages stay within 0 to 100; the legend is below, with what a band is.

    ``runs`` say how many classes each task brings, and what the domains are.
    """
    x, names = _places(runs[0]), _domain_names(runs)
    with rc_context(_RC):
        figure, panes, lowest = _panels(len(panels), width, height, title)
        legend: dict[str, Any] = {}
        for axes, (panel, lines) in zip(panes, panels.items(), strict=True):
            for place, label, curves in lines:
                line = _draw_line(axes, place, terminal(label), x, np.array(curves))
                legend.setdefault(line.get_label(), line)
            axes.set_title(panel)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(x) <= _FEW:
                axes.set_xticks(x, names or list(map(str, x)), rotation=30 if names else 0)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        for axes in lowest:
            axes.set_xlabel("domains seen" if runs[0].get("domains") else "classes seen")
        low, high = panes[0].get_ylim()
        panes[0].set_ylim(max(low, 0), min(high, 101))
        figure.supylabel("accuracy on all seen (%)", fontsize=9)
        bands = any(axes.collections for axes in panes)
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside lower center",
            ncols=1 if max(map(len, legend)) > 40 else 2,
            handlelength=3,
            frameon=False,
            title="line: mean over seeds; band: ± one standard deviation" if bands else None,
            title_fontsize=8,
        )
    return figure


def _draw_line(axes: Axes, place: int, label: str, x: Sequence[int], curves: np.ndarray) -> Any:
    """Draw the mean of ``(seeds, tasks)`` in percent and, with several seeds, a band of one sample standard deviation.

    ``place`` is which look, below ``MAX_LINES``; the band is cut at 0 and 100, where no value can be.
    """
    tasks, mean, colour = curves.shape[1], curves.mean(axis=0), _COLOURS[place % len(_COLOURS)]
    (line,) = axes.plot(
        x[:tasks],
        mean,
        color=colour,
        linestyle=_STYLES[place % len(_STYLES)],
        marker=_MARKERS[place],
        markersize=4.5 if tasks <= 30 else 0,
        markerfacecolor="white" if place % 2 else colour,
        linewidth=1.4,
        label=label,
    )
    if len(curves) > 1:
        std = curves.std(axis=0, ddof=1)
        low, high = np.clip(mean - std, 0, 100), np.clip(mean + std, 0, 100)
        axes.fill_between(x[:tasks], low, high, color=colour, alpha=0.15, linewidth=0)
    return line


def _places(run: Mapping[str, Any]) -> list[int]:
    """How many classes are seen after each task; domains all bring the same classes and are counted themselves."""
    sizes = run["task_sizes"]
    return list(range(1, len(sizes) + 1)) if run.get("domains") else list(accumulate(sizes))


def _domain_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The domains in learned order, where all runs have the same few; else nothing."""
    orders = {tuple((run.get("domains") or [])[-len(run["task_sizes"]) :]) for run in runs}
    names = [terminal(name) for name in orders.pop()] if len(orders) == 1 else []
    return [name if len(name) <= 22 else f"{name[:21]}…" for name in names] if len(names) <= _FEW else []


# -- matrices ---------------------------------------------------------------------------------------------------------

KINDS = {  # caption, axes and scale
    "matrix": ("accuracy on each {0} after each {0}", "on {0}", "after {0}", "accuracy (%)"),
    "confusion": (
        "which module was chosen for the images of each {0}",
        "chosen module",
        "true {0}",
        "share of the {0}'s images (%)",
    ),
}


def matrices(group: Group, kind: str, title: str) -> Figure | None:
    """A picture of one of ``KINDS``, a panel for each selection; None where no run has the numbers.

    Of accuracies it shows the mean over seeds, of chosen modules each true task's shares over all seeds.
    """
    panels, runs = {}, _runs([group])
    for name in (name for name in group.selections if name == BATCH or name not in NOT_COMPARED):
        found = [run["results"][name]["matrix"] if kind == "matrix" else run["confusion"].get(name) for run in runs]
        if all(found):
            panels[name] = values = np.array(found, dtype=float).mean(axis=0)
            if kind == "confusion":
                panels[name] = 100 * values / np.maximum(values.sum(axis=1, keepdims=True), 1e-9)
    if not panels:
        return None
    _, x, y, what = (text.format(_task_word(group)) for text in KINDS[kind])
    names = _domain_names(runs)
    tasks = len(next(iter(panels.values())))
    ticks = range(tasks) if tasks <= _FEW else [round(tick) for tick in np.linspace(0, tasks - 1, 6)]
    with rc_context(_RC):
        figure, panes, lowest = _panels(len(panels), 2.9, 2.7, title)
        for axes in lowest:
            axes.set_xlabel(x)
        for axes, (name, values) in zip(panes, panels.items(), strict=True):
            image = axes.imshow(values, cmap=_SCALE, vmin=0, vmax=100)
            axes.spines[:].set_visible(True)
            axes.set_title(selection_name(name) if group.chooses else "")
            axes.set_xticks(ticks, names or [str(tick + 1) for tick in ticks], rotation=90 if names else 0)
            axes.set_yticks(ticks, names or [str(tick + 1) for tick in ticks])
            for (row, column), value in np.ndenumerate(values) if tasks <= _FEW else ():
                if not np.isnan(value):
                    size, dark = 9 if tasks <= 6 else 6, sum(colormaps[_SCALE](value / 100)[:3]) < 1.5
                    tone = "white" if dark else "black"
                    axes.text(column, row, fixed(value, 0), ha="center", va="center", color=tone, fontsize=size)
        figure.supylabel(y, fontsize=9)
        figure.colorbar(image, ax=panes, label=what, shrink=0.8, aspect=30)
    return figure


def _task_word(group: Group) -> str:
    return "domain" if group.runs[0].values.get("domains") else "task"


# -- a whole section --------------------------------------------------------------------------------------------------


def draw_section(section: Section, folder: Path) -> list[Picture]:
    """All pictures of a section, as PNG and PDF: first the methods against each other."""
    drawn = []

    def add(name: str, caption: str, figure: Figure) -> None:
        path = folder / f"{section.key}-{name}.png"
        save(figure, path, path.with_suffix(".pdf"))
        drawn.append(Picture(f"{section.short_title}: {caption}", path))

    if _kept(section)[0]:
        add("accuracy", "every method under its best selection", methods_curves(section))
    if selections := selection_curves(section):
        add("selections", "every selection", selections)
    for group in section.groups:
        title = f"{group.name} on {section.short_title}, {counted(len(group.runs), 'seed')}"
        for kind, (caption, *_) in KINDS.items():
            if figure := matrices(group, kind, title):
                add(f"{group.key}-{kind}", f"{group.name}, {caption.format(_task_word(group))}", figure)
    return drawn


# -- published curves -------------------------------------------------------------------------------------------------


def draw_published(entries: Sequence[Entry], folder: Path) -> list[Picture]:
    """For each entry with a whole curve and runs a picture, as PNG and PDF: the published one dashed behind ours."""
    drawn = []
    for entry in entries:
        if entry.runs and len(entry.curve) > 1:
            runs = [run.values for run in entry.runs]
            lines: list[Line] = [
                (_STYLES.index("--"), f"published, {entry.selection} (read from a figure)", [entry.curve])
            ]
            for place, name in enumerate(entry.selections):
                curves = [run["results"][name]["top1_curve"] for run in runs]
                lines.append((len(_STYLES) * place, f"here, {selection_name(name)}", curves))
            path = folder / f"published-{entry.data_set}-{entry.method}.png"
            figure = _curves(f"{entry.method} on {entry.data_set}", {"": lines}, runs, 5.2, 3.8)
            save(figure, path, path.with_suffix(".pdf"))
            drawn.append(Picture(f"{entry.data_set}: {entry.method} against the published curve", path))
    return drawn
