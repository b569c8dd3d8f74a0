"""Tables as text, Markdown and LaTeX (booktabs). ``utils.results.page`` makes the HTML page."""

from collections.abc import Sequence

from utils.results import escape
from utils.results.cells import Cell, HasTable, Selections, Table
from utils.results.metrics import GLOSSARY
from utils.results.tables import glossary_markdown

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
