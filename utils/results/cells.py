"""A table as data: cells of text with a mark, rows, notes. ``utils.results.render`` writes them down."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from utils.words import fixed

Mark = Literal["", "best", "close"]
Selections = Sequence[str] | None


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and whether it is the best of its column or not significantly worse than that."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Row:
    """The cells of one line; ``first`` says whether it begins a group of lines."""

    cells: tuple[Cell, ...]
    first: bool = False


@dataclass(frozen=True)
class Table:
    """What every format shows.

    Attributes:
        key: for labels and file names, such as ``cub-10-10``.
        header: one text for each column.
        labels: how many of the first columns hold words; the others hold numbers.
        notes: what a reader must know, a line each.
    """

    key: str
    title: str
    header: tuple[str, ...]
    labels: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def marked(self) -> bool:
        """Whether any cell has a mark."""
        return any(cell.mark for row in self.rows for cell in row.cells)


class HasTable(Protocol):
    """What can be shown as a table: with only the rows of some selections, or (None) with all."""

    def table(self, selections: Selections = None) -> Table: ...


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation over ``count`` seeds, and half the width of the mean's 95 % interval."""

    mean: float
    std: float
    count: int
    half_width: float | None = None


def number_text(number: MeanStd | None, digits: int = 2) -> str:
    """Write ``93.12 ± 0.35``; without a deviation where there is one seed, and never ``-0.00``."""
    if number is None:
        return "–"
    deviation = f" ± {number.std:.{digits}f}" if number.count > 1 else ""
    return fixed(number.mean, digits) + deviation


def interval_text(number: MeanStd | None) -> str:
    """Write the 95 % interval over seeds of a percentage, ``[92.25, 93.99]``, cut where no percentage can be."""
    if number is None or number.half_width is None:
        return "–"
    low, high = max(0.0, number.mean - number.half_width), min(100.0, number.mean + number.half_width)
    return f"[{fixed(low, 2)}, {fixed(high, 2)}]"


def significant_text(number: MeanStd | None) -> str:
    """Write mean ± deviation with four significant digits of the mean, in plain digits."""
    if number is None:
        return "–"
    size = math.floor(math.log10(abs(number.mean))) if number.mean else 0
    return number_text(number, max(0, 3 - size))


def p_text(p: float | None) -> str:
    """Write a p value; ``<0.0001`` for what is smaller."""
    if p is None:
        return "–"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"
