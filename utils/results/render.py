"""Tables as text, Markdown, LaTeX (booktabs) and CSV. ``utils.results.page`` makes the HTML page."""

import csv
import io
from collections.abc import Sequence

from utils.results import escape
from utils.results.cells import Cell, HasTable, MeanStd, Selections, Table
from utils.results.comparison import COMPARED, Comparison
from utils.results.cost import COLUMNS, PUBLISHED_COLUMNS, CostTable
from utils.results.metrics import GLOSSARY
from utils.results.tables import MEASURES, Section, glossary_markdown

# -- text and Markdown ------------------------------------------------------------------------------------------------

_PLAIN_MARKS = {"": ("", ""), "best": ("*", "*"), "close": ("_", "_")}
_STYLED_MARKS = {"": ("", ""), "best": ("\x1b[1m", "\x1b[22m"), "close": ("\x1b[4m", "\x1b[24m")}


def as_text(parts: Sequence[HasTable], selections: Selections = None, *, styled: bool = False) -> str:
    """Return tables for the terminal.

    Args:
        parts: what to show.
        selections: only the rows of these; None: all.
        styled: mark cells by bold and underlined type; else by ``*`` and ``_`` around them.
    """
    return "\n".join(text for part in parts for text in _text_table(part.table(selections), styled))


def _text_table(table: Table, styled: bool) -> tuple[str, str]:
    shown = [[Cell(escape.terminal(name)) for name in table.header]]
    shown += [[Cell(escape.terminal(cell.text), cell.mark) for cell in row.cells] for row in table.rows]
    plain = table.marked and not styled
    widths = [max(len(c.text) + (2 if plain and c.mark else 0) for c in column) for column in zip(*shown, strict=True)]
    marks = _STYLED_MARKS if styled else _PLAIN_MARKS

    def line(cells: Sequence[Cell]) -> str:
        texts = []
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            before, after = marks[cell.mark]
            space = " " * (width - len(cell.text) - (0 if styled else len(before + after)))
            text = before + cell.text + after
            texts.append(text + space if index < table.labels else space + text)
        return "  ".join(texts).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = []
    for index, (row, cells) in enumerate(zip(table.rows, shown[1:], strict=True)):
        body += ["", line(cells)] if row.first and index else [line(cells)]
    notes = [escape.terminal(note) for note in table.notes]
    if plain:
        notes = [note.replace("Bold:", "*x*:").replace("Underlined:", "_x_:") for note in notes]
    lines = [escape.terminal(table.title), rule, line(shown[0]), rule, *body, rule]
    return "\n".join(lines), "".join(f"{note}\n" for note in notes)


def glossary_text() -> str:
    return "\n".join(f"{term}: {definition}" for term, definition in GLOSSARY.items())


_MARKDOWN_MARKS = {"": "{}", "best": "**{}**", "close": "<ins>{}</ins>"}


def as_markdown(parts: Sequence[HasTable], selections: Selections = None) -> str:
    """Return tables and definitions as Markdown; ``<ins>`` is what Markdown viewers show underlined."""
    texts = []
    for table in (part.table(selections) for part in parts):
        rule = ["---" if i < table.labels else "---:" for i in range(len(table.header))]
        rows = [[escape.markdown(name) for name in table.header], rule]
        rows += [[_MARKDOWN_MARKS[c.mark].format(escape.markdown(c.text)) for c in row.cells] for row in table.rows]
        texts.append(f"## {escape.markdown(table.title)}\n")
        texts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
        texts.append("".join(f"- {escape.markdown(note)}\n" for note in table.notes))
    return "\n".join([*(text for text in texts if text), "## Definitions\n", glossary_markdown()])


# -- LaTeX ------------------------------------------------------------------------------------------------------------

_LATEX_MARKS = {"": "{}", "best": r"\textbf{{{}}}", "close": r"\underline{{{}}}"}


def as_latex(parts: Sequence[HasTable], selections: Selections = None) -> str:
    """Return tables for ``\\input``; they need the packages booktabs and graphicx."""
    texts = ["% \\usepackage{booktabs,graphicx} in the preamble, then \\input this file\n"]
    texts += [_latex_table(part.table(selections)) for part in parts]
    texts.append("".join(f"% {term}: {definition}\n" for term, definition in GLOSSARY.items()))
    return "\n".join(texts)


def _latex_table(table: Table) -> str:
    columns = "l" * table.labels + "r" * (len(table.header) - table.labels)
    caption = " ".join([f"{table.title}. Mean and sample standard deviation over seeds.", *table.notes])
    label = escape.plain_name(table.key)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape.latex(caption)}}}"]
    lines += [rf"\label{{tab:{label}}}", r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{columns}}}"]
    lines += [r"\toprule", " & ".join(map(escape.latex, table.header)) + r" \\", r"\midrule"]
    for index, row in enumerate(table.rows):
        texts = [_LATEX_MARKS[cell.mark].format(escape.latex(cell.text)) for cell in row.cells]
        lines.append((r"\addlinespace" + "\n" if row.first and index else "") + " & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


# -- CSV --------------------------------------------------------------------------------------------------------------


def as_csv(sections: Sequence[Section], selections: Selections = None) -> str:
    """All sections in one table with unrounded numbers; settings that a section does not vary stay empty."""
    extras = list(dict.fromkeys(c for s in sections for c in s.columns if c not in ("method", "flow")))
    fixed = ["dataset", "scenario", "init_cls", "increment", "tasks", "tasks_done", "status", "method", "flow"]
    extras = [column for column in extras if column not in fixed]
    measures = [f"{m}_{part}" for m in MEASURES for part in ("mean", "std", "low95", "high95")]
    lines: list[list[object]] = [
        [*fixed, "backbone", "weights_sha256", *extras, "selection", "seeds", "seed_list", *measures]
    ]
    for section in sections:
        for group, selection, numbers in section.rows(selections):
            run = group.runs[0]
            i = run.identity
            place = [i[k] for k in fixed[:4]]
            place += [len(run.values["task_sizes"]), run.tasks_done, run.values["status"], i["model_name"]]
            place += [i.get("flow", ""), run.values["backbone"]["name"], i["weights_sha256"]]
            labels = [group.labels.get(column, "") for column in extras]
            values = [value for number in numbers.values() for value in csv_numbers(number)]
            seeds = " ".join(map(str, group.seeds))
            lines.append([*place, *labels, selection, len(group.runs), seeds, *values])
    return csv_text(lines)


def csv_numbers(number: MeanStd | None) -> tuple[object, object, object, object]:
    """Return mean, deviation and both ends of the 95 % interval, unrounded; empty where there is none."""
    if number is None:
        return "", "", "", ""
    half = number.half_width
    ends = ("", "") if half is None else (number.mean - half, number.mean + half)
    return number.mean, number.std if number.count > 1 else "", *ends


def cost_csv(tables: Sequence[CostTable]) -> str:
    """Return what every group of runs cost, with unrounded numbers."""
    names = list(dict.fromkeys(column for table in tables for column in table.section.columns))
    measures = [f"{name} {part}" for name in (*COLUMNS, *PUBLISHED_COLUMNS) for part in ("mean", "std")]
    lines: list[list[object]] = [["data_set", *names, "seeds", *measures]]
    for table in tables:
        for group, numbers in table.rows():
            values = [value for number in numbers.values() for value in csv_numbers(number)[:2]]
            labels = [group.labels.get(name, "") for name in names]
            lines.append([table.section.short_title, *labels, len(group.runs), *values])
    return csv_text(lines)


def comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    """Return every comparison that was made, with unrounded numbers."""
    names = list(dict.fromkeys(name for comparison in comparisons for name in comparison.labels))
    numbers = ["shared_seeds", "difference", "low95", "high95", "p_t", "p_wilcoxon", "p_t_holm"]
    lines: list[list[object]] = [["data_set", "measure", *(f"best_{n}" for n in names), *names, *numbers]]
    for comparison in comparisons:
        for pair in comparison.pairs:
            words: list[object] = []
            for entry in (pair.best, pair.other):
                of_entry = dict(zip(comparison.labels, entry.row, strict=True))
                words += [of_entry.get(name, "") for name in names]
            d = pair.difference
            ends = (
                (None, None)
                if d.mean is None or d.half_width is None
                else (d.mean - d.half_width, d.mean + d.half_width)
            )
            values = (d.count, d.mean, *ends, d.p_t, d.p_wilcoxon, pair.p_holm)
            measure = COMPARED[pair.measure]
            lines.append([pair.best.column, measure, *words, *("" if v is None else v for v in values)])
    return csv_text(lines)


def csv_text(lines: Sequence[Sequence[object]]) -> str:
    """Return lines of values as CSV in which no text is a formula."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([escape.csv_cell(value) for value in line] for line in lines)
    return buffer.getvalue()
