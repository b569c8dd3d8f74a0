"""How pictures look: readable in black and white. Importing this file needs matplotlib, an optional extra."""

import io
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis, YAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator

from utils.files import atomic_write
from utils.results.escape import terminal

# Okabe and Ito's colours and four of Tol's, apart also for the colour-blind; style and marker tell the lines apart
# without colour
COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#777777",
    "#882255",
    "#999933",
    "#332288",
    "#44AA99",
)
STYLES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
    (0, (1, 1)),
    (0, (3, 1)),
    (0, (6, 2, 2, 2)),
    (0, (2, 2)),
    (0, (10, 2)),
    (0, (4, 1, 1, 1)),
)
MARKERS = "osD^vXP*<>hp"
MAX_LINES = len(COLOURS)
GRID = "#dddddd"
RC: Any = {  # matplotlib types the names of its settings one by one
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


# Searched in turn for letters that the first one lacks, of those that are installed
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial",
)
_NAMED_DOMAINS = 12  # more do not fit below an axis: their numbers are shown then


def task_word(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return what a task of these runs' JSON is: ``task``, or ``domain`` in domain-incremental runs."""
    return "domain" if runs and all(run.get("domains") for run in runs) else "task"


def domain_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the domains in learned order, where all runs have the same few; else nothing."""
    orders = {tuple((run.get("domains") or [])[-len(run["task_sizes"]) :]) for run in runs}
    names = list(orders.pop()) if len(orders) == 1 else []
    return [shortened(terminal(name)) for name in names] if all(names) and len(names) <= _NAMED_DOMAINS else []


def shortened(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def name_ticks(axis: Axis, names: Sequence[str], first: int = 1) -> None:
    """Put domains' names below or beside an axis, from the place ``first`` on; without names nothing changes."""
    if names:
        upright = isinstance(axis, YAxis) or sum(map(len, names)) <= 30
        axis.set_ticks(range(first, first + len(names)), names, rotation=0 if upright else 90)


def save(figure: Figure, *paths: Path) -> None:
    """Write a picture in the format of each suffix, atomically; the same picture gives the same bytes.

    A letter that no font has is drawn as a box.
    """
    for path in paths:
        buffer = io.BytesIO()
        form = path.suffix[1:]
        undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}}.get(form, {})
        with rc_context({**RC, "font.family": _installed_fonts()}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format=form, dpi=150, bbox_inches="tight", metadata=undated)
        atomic_write(path, buffer.getbuffer())


@cache
def _installed_fonts() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


def save_both(figure: Figure, stem: Path) -> Path:
    """Write a picture as PNG and as PDF; return the PNG's path."""
    png = Path(f"{stem}.png")
    save(figure, png, Path(f"{stem}.pdf"))
    return png


def one_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    return figure, figure.add_subplot()


def draw_line(axes: Axes, index: int, label: str, curves: np.ndarray, *, first: int = 1) -> None:
    """Draw the mean of ``(seeds, points)`` in percent and, with several seeds, a band of one sample standard deviation.

    Args:
        axes: where.
        index: which look, below ``MAX_LINES``.
        label: for the legend.
        curves: percentages; the band is cut at 0 and 100, where no value can be.
        first: the number of the first point.
    """
    places, mean = np.arange(first, first + curves.shape[1]), curves.mean(axis=0)
    colour = COLOURS[index]
    axes.plot(
        places,
        mean,
        color=colour,
        linestyle=STYLES[index],
        marker=MARKERS[index],
        markersize=4.5 if len(places) <= 30 else 0,
        markerfacecolor="white" if index % 2 else colour,
        linewidth=1.4,
        label=label,
    )
    if len(curves) > 1:
        std = curves.std(axis=0, ddof=1)
        low, high = np.clip(mean - std, 0, 100), np.clip(mean + std, 0, 100)
        axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)


def finish_curves(axes: Axes, x: str, y: str) -> None:
    """Label the axes, keep percentages within 0 to 100, and put the legend below."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.set_xlim(left=max(axes.get_xlim()[0], 0.5))  # nothing is counted from 0
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 101))
    horizontal_grid(axes)
    labels = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, labels)) > 34 else 2
    axes.figure.legend(loc="outside lower center", ncols=columns, handlelength=3, frameon=False)


def horizontal_grid(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def panel_grid(panels: int) -> tuple[int, int]:
    """Return rows and columns for so many panels, at most two beside each other."""
    columns = min(panels, 2)
    return -(-panels // columns), columns
