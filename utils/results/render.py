"""Tables as typed cells, and the one loop that writes them as text, Markdown, LaTeX (booktabs) or an HTML page."""

import base64
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from utils.results import escape
from utils.results.metrics import MeanStd
from utils.words import fixed

Mark = Literal["", "best", "close"]
TERMINAL_WIDTH = 120


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and whether it is the best of its column or not significantly worse than that."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """What every markup shows.

    Attributes:
        key: for labels and file names, such as ``cub-10-10``.
        header: one text for each column.
        labels: how many of the first columns hold words; the others hold numbers.
        rows: of cells; words that stand in the row above as well are written once.
        notes: what a reader must know, a line each.
    """

    key: str
    title: str
    header: tuple[str, ...]
    labels: int
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    caption: str
    path: Path


# -- numbers ----------------------------------------------------------------------------------------------------------


def signed(value: float | None, digits: int = 2) -> str:
    """Write a number with a true minus sign; a dash for None."""
    return fixed(value, digits).replace("-", "−")


def number_text(number: MeanStd | None, digits: int = 2) -> str:
    """Write ``93.12 ± 0.35``; without a deviation where there is one seed."""
    if number is None:
        return "–"
    return signed(number.mean, digits) + (f" ± {number.std:.{digits}f}" if number.count > 1 else "")


def significant_text(number: MeanStd | None) -> str:
    """Write mean ± deviation with four significant digits of the mean, in plain digits."""
    size = math.floor(math.log10(abs(number.mean))) if number and number.mean else 0
    return number_text(number, max(0, 3 - size))


def interval_text(
    mean: float | None, half_width: float | None, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> str:
    """Write a 95 % interval, ``[92.25, 93.99]``, cut at ``bounds``; a dash where there is none."""
    if mean is None or half_width is None:
        return "–"
    return f"[{signed(max(bounds[0], mean - half_width))}, {signed(min(bounds[1], mean + half_width))}]"


# -- markup -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Markup:
    """How a kind of file writes tables: what makes text safe in it, and templates.

    Attributes:
        best, close: around a cell with that mark.
        label, number: of a cell of words and of a number.
        between: stands between two cells.
        rule_end: how the line below the head ends in a column of numbers.
        group: stands before a group of rows.
        picture: of a caption and the base64 of a PNG; empty leaves pictures out.
    """

    escape: Callable[[str], str]
    best: str
    close: str
    table: str
    label: str = "{}"
    number: str = "{}"
    between: str = "  "
    row: str = "{}\n"
    rule_end: str = "-"
    group: str = ""
    note: str = "- {}\n"
    definition: str = "{}: {}\n"
    document: str = "{body}{definitions}"
    picture: str = ""


def write(
    parts: Sequence[Table | Picture], markup: Markup, terms: Mapping[str, str] | None = None, title: str = ""
) -> str:
    """Return the tables (and pictures) in their order, then the definitions of ``terms``."""
    body = (_table(part, markup) if isinstance(part, Table) else _picture(part, markup) for part in parts)
    defined = (markup.definition.format(*map(markup.escape, term)) for term in (terms or {}).items())
    return markup.document.format(title=markup.escape(title), body="".join(body), definitions="".join(defined))


def _picture(picture: Picture, markup: Markup) -> str:
    if not markup.picture:
        return ""
    return markup.picture.format(markup.escape(picture.caption), base64.b64encode(picture.path.read_bytes()).decode())


def _table(table: Table, markup: Markup) -> str:
    """Fill the templates; every cell is padded to the width of its column."""
    marks = {"": "{}", "best": markup.best, "close": markup.close}
    lines = [tuple(map(Cell, table.header)), *_without_repeats(table)]
    texts = [[marks[cell.mark].format(markup.escape(cell.text)) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]

    def row(cells: Sequence[str]) -> str:
        padded = [
            markup.label.format(text.ljust(width)) if place < table.labels else markup.number.format(text.rjust(width))
            for place, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return markup.row.format(markup.between.join(padded).rstrip())

    rule = ["-" * w if i < table.labels else "-" * (w - 1) + markup.rule_end for i, w in enumerate(widths)]
    head, *body = map(row, texts)
    grouped = not all(cells[0].text for cells in lines)
    begins = [markup.group if grouped and i and cells[0].text else "" for i, cells in enumerate(lines[1:])]
    return markup.table.format(
        title=markup.escape(table.title),
        key=escape.plain_name(table.key),
        columns="l" * table.labels + "r" * (len(table.header) - table.labels),
        head=head,
        rule=row(rule),
        rows="".join(map("".join, zip(begins, body, strict=True))),
        notes="".join(markup.note.format(markup.escape(note)) for note in table.notes),
    )


def _without_repeats(table: Table) -> list[tuple[Cell, ...]]:
    rows, above = [], tuple[Cell, ...]()
    for row in table.rows:
        alike = [cell == other for cell, other in zip(row, above, strict=False)][: table.labels]
        repeated = (*alike, False).index(False)
        rows.append((*[Cell("")] * repeated, *row[repeated:]))
        above = row
    return rows


TEXT = Markup(escape.terminal, "*{}*", "_{}_", "{title}\n{rule}{head}{rule}{rows}{rule}{notes}\n", group="\n")
MARKDOWN = Markup(
    escape.markdown,
    "**{}**",
    "<ins>{}</ins>",  # what viewers of Markdown show underlined
    "## {title}\n\n{head}{rule}{rows}\n{notes}\n",
    between=" | ",
    row="| {} |\n",
    rule_end=":",
    definition="- **{}**: {}\n",
    document="{body}## Definitions\n\n{definitions}",
)
LATEX = Markup(
    escape.latex,
    r"\textbf{{{}}}",
    r"\underline{{{}}}",
    "\\begin{{table}}\n\\centering\n\\caption{{{title}. Mean and sample standard deviation over seeds.\n{notes}}}\n"
    "\\label{{tab:{key}}}\n\\resizebox{{\\linewidth}}{{!}}{{%\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head}"
    "\\midrule\n{rows}\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}\n\n",
    between=" & ",
    row="{} \\\\\n",
    group="\\addlinespace\n",
    note="{}\n",
    definition="% {}: {}\n",
    document="% \\usepackage[T1]{{fontenc}} and \\usepackage{{booktabs,graphicx}} in the preamble, then \\input this"
    " file\n\n{body}{definitions}",
)
HTML = Markup(
    escape.html_text,
    "<strong>{}</strong>",
    "<ins>{}</ins>",
    '<h2>{title}</h2>\n<div class="box"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}</tbody></table></div>\n'
    "<ul>\n{notes}</ul>\n",
    label="<td>{}</td>",
    number='<td class="n">{}</td>',
    between="",
    row="<tr>{}</tr>\n",
    note="<li>{}</li>\n",
    definition="<dt>{}</dt><dd>{}</dd>\n",
    document="""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; }}
.box {{ overflow-x: auto; }} thead, dt {{ font-weight: 600; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
td {{ padding: .2rem .6rem; border-bottom: 1px solid #ccc; white-space: nowrap; }} .n {{ text-align: right; }}
figure {{ margin: 1.5rem 0; }} img {{ max-width: 100%; }} ul, figcaption {{ font-size: .9rem; }}
</style></head><body>
<h1>{title}</h1>
{body}<h2>Definitions</h2>
<dl>
{definitions}</dl>
</body></html>
""",
    picture='<figure><img alt="{0}" src="data:image/png;base64,{1}"><figcaption>{0}</figcaption></figure>\n',
)


# -- the terminal -----------------------------------------------------------------------------------------------------


def as_text(tables: Sequence[Table], terms: Mapping[str, str] | None = None) -> str:
    """Return tables for a terminal: no line is longer than ``TERMINAL_WIDTH``."""
    lines = write([part for table in tables for part in _narrow(table)], TEXT, terms).splitlines()
    return "\n".join(line if len(line) <= TERMINAL_WIDTH else textwrap.fill(line, TERMINAL_WIDTH) for line in lines)


def _narrow(table: Table) -> list[Table]:
    """Shorten words where the labels leave no room for numbers, and go on below with the columns that do not fit."""
    lines = [tuple(map(Cell, table.header)), *table.rows]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    if sum(widths[: table.labels]) > TERMINAL_WIDTH - 40:
        longest = (TERMINAL_WIDTH - 40) // table.labels
        widths[: table.labels] = [min(width, longest) for width in widths[: table.labels]]
    labels = list(range(table.labels))
    blocks = [labels]
    for column in range(table.labels, len(widths)):
        if blocks[-1] != labels and sum(widths[i] for i in [*blocks[-1], column]) > TERMINAL_WIDTH:
            blocks.append(labels)
        blocks[-1] = [*blocks[-1], column]
    parts = []
    for block in blocks:
        head, *rows = (tuple(_shortened(line[i], widths[i] - 2) for i in block) for line in lines)
        title = table.title if block is blocks[0] else f"{table.title} (further columns)"
        notes = table.notes if block is blocks[-1] else ()
        parts.append(replace(table, title=title, header=tuple(c.text for c in head), rows=tuple(rows), notes=notes))
    return parts


def _width(cell: Cell) -> int:
    """With the marks around it and the space before the next column."""
    return len(escape.terminal(cell.text)) + 2 + 2 * bool(cell.mark)


def _shortened(cell: Cell, longest: int) -> Cell:
    shown = escape.terminal(cell.text)
    kept = longest // 2  # of each end: keys often differ in the last letters alone
    return cell if len(shown) <= longest else replace(cell, text=f"{shown[:kept]}…{shown[kept + 1 - longest :]}")
