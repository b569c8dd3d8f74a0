"""Sections of runs as text, Markdown, LaTeX (booktabs), CSV and one HTML page."""

import base64
import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from utils.results.metrics import GLOSSARY, SELECTION_NAMES
from utils.results.tables import MEASURES, MeanStd, Section, glossary_markdown

Selections = Sequence[str] | None


def selection_name(selection: str) -> str:
    return SELECTION_NAMES.get(selection, selection)


def _number(number: MeanStd | None, plus_minus: str = " ± ") -> str:
    """``93.12 ± 0.35``; without a deviation where there is one seed."""
    if number is None:
        return "–"
    return f"{number.mean:.2f}" + (f"{plus_minus}{number.std:.2f}" if number.count > 1 else "")


def header(section: Section) -> list[str]:
    return [*section.columns, "selection", *MEASURES.values(), "seeds"]


def _cells(section: Section, selections: Selections, plus_minus: str = " ± ") -> list[tuple[bool, list[str]]]:
    """Rows of text, each with whether it begins a group; a group's labels stand in its first row alone."""
    rows, before = [], None
    for group, selection, numbers in section.rows(selections):
        first = group is not before
        labels = [group.labels[column] if first else "" for column in section.columns]
        values = [_number(number, plus_minus) for number in numbers.values()]
        rows.append((first, [*labels, selection_name(selection), *values, str(len(group.runs))]))
        before = group
    return rows


# -- text and Markdown ------------------------------------------------------------------------------------------------


def as_text(sections: Sequence[Section], selections: Selections = None) -> str:
    """For the terminal."""
    parts = []
    for section in sections:
        rows = _cells(section, selections)
        table = [header(section), *(cells for _, cells in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        labels = len(section.columns) + 1
        lines = [
            "  ".join(c.ljust(w) if i < labels else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in table
        ]
        rule = "-" * len(lines[0])
        body = [
            line
            for i, ((first, _), line) in enumerate(zip(rows, lines[1:], strict=True))
            for line in (["", line] if first and i else [line])
        ]
        parts.append("\n".join([section.title, rule, lines[0].rstrip(), rule, *(b.rstrip() for b in body), rule]))
        parts.append("".join(f"{note}\n" for note in section.notes))
    return "\n".join(parts)


def glossary_text() -> str:
    return "\n".join(f"{term}: {definition}" for term, definition in GLOSSARY.items())


def as_markdown(sections: Sequence[Section], selections: Selections = None) -> str:
    parts = []
    for section in sections:
        head = header(section)
        labels = len(section.columns) + 1
        rule = ["---" if i < labels else "---:" for i in range(len(head))]
        rows = [head, rule, *(cells for _, cells in _cells(section, selections))]
        parts.append(f"## {_markdown(section.title)}\n")
        parts.append("".join(f"| {' | '.join(map(_markdown, row))} |\n" for row in rows))
        parts.append("".join(f"- {_markdown(note)}\n" for note in section.notes))
    return "\n".join([*(p for p in parts if p), "## Definitions\n", glossary_markdown()])


def _markdown(text: str) -> str:
    return "".join("\\" + c if c in "\\|*_<" else c for c in text)


# -- LaTeX ------------------------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$", "±": r"$\pm$", "<": "$<$", ">": "$>$",
}  # fmt: skip
_LATEX_TERMS = {"Ā": r"$\bar{A}$", "A_T": "$A_T$"}


def latex(text: str) -> str:
    """``text`` with everything that LaTeX would take for a command escaped."""
    return _LATEX_TERMS.get(text) or "".join(_LATEX.get(c, c) for c in text)


def as_latex(sections: Sequence[Section], selections: Selections = None) -> str:
    """Tables for ``\\input``; they need the packages booktabs and graphicx."""
    parts = ["% \\usepackage{booktabs,graphicx} in the preamble, then \\input this file\n"]
    for section in sections:
        rows = _cells(section, selections, r" $\pm$ ")
        columns = "l" * (len(section.columns) + 1) + "r" * (len(MEASURES) + 1)
        caption = f"{section.title}. Mean and sample standard deviation over seeds, in percent."
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex(' '.join([caption, *section.notes]))}}}"]
        lines += [rf"\label{{tab:{section.key}}}", r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [r"\toprule", " & ".join(map(latex, header(section))) + r" \\", r"\midrule"]
        labels = len(section.columns) + 1
        for index, (first, cells) in enumerate(rows):
            texts = [*map(latex, cells[:labels]), *(cell.replace("–", "--") for cell in cells[labels:])]
            lines.append((r"\addlinespace" + "\n" if first and index else "") + " & ".join(texts) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
        parts.append("\n".join(lines) + "\n")
    parts.append("".join(f"% {term}: {definition}\n" for term, definition in GLOSSARY.items()))
    return "\n".join(parts)


# -- CSV --------------------------------------------------------------------------------------------------------------


def as_csv(sections: Sequence[Section], selections: Selections = None) -> str:
    """All sections in one table with unrounded numbers; settings that a section does not vary stay empty."""
    extras = list(dict.fromkeys(c for s in sections for c in s.columns if c not in ("method", "flow")))
    fixed = ["dataset", "scenario", "init_cls", "increment", "tasks", "tasks_done", "status", "method", "flow"]
    extras = [column for column in extras if column not in fixed]
    measures = [f"{m}_{part}" for m in MEASURES for part in ("mean", "std")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*fixed, "backbone", "weights_sha256", *extras, "selection", "seeds", "seed_list", *measures])
    for section in sections:
        for group, selection, numbers in section.rows(selections):
            run = group.runs[0]
            i = run.identity
            place = [i[k] for k in fixed[:4]]
            place += [len(run.values["task_sizes"]), run.tasks_done, run.values["status"], i["model_name"]]
            place += [i.get("flow", ""), run.values["backbone"]["name"], i["weights_sha256"]]
            labels = [group.labels.get(column, "") for column in extras]
            values = [v for n in numbers.values() for v in ((n.mean, n.std if n.count > 1 else "") if n else ("", ""))]
            seeds = " ".join(map(str, group.seeds))
            writer.writerow([*place, *labels, selection, len(group.runs), seeds, *values])
    return buffer.getvalue()


TABLE_FILES: Mapping[str, Callable[[Sequence[Section], Selections], str]] = {
    "tables.md": as_markdown,
    "tables.tex": as_latex,
    "tables.csv": as_csv,
}


# -- HTML -------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 2px solid #111; } h3 { font-size: 1rem; }
.box { overflow-x: auto; border: 1px solid #bbb; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .2rem .6rem; text-align: left; white-space: nowrap; }
th { border-bottom: 1px solid #111; } .n { text-align: right; } tr.first td { border-top: 1px solid #bbb; }
.notes { padding-left: 1.2rem; font-size: .9rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .85rem; } img { width: 100%; height: auto; }
.wide img { min-width: 30rem; } summary { cursor: pointer; padding: .4rem 0; font-weight: 600; overflow-wrap: anywhere; }
@media (max-width: 40rem) { th, td { padding: .2rem .35rem; } td:first-child { white-space: normal; min-width: 5.5rem; } }
"""  # noqa: E501


def as_html(
    sections: Sequence[Section],
    selections: Selections,
    pictures: Mapping[str, Mapping[str, Sequence[tuple[str, Path]]]],
    notes: Sequence[str],
) -> str:
    """One page that needs no other file.

    Args:
        pictures: section key -> group name ("" for the whole section) -> (caption, PNG file).
        notes: lines about files that do not count.
    """
    body = ["<h1>Runs</h1>", _html_list(notes)]
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", _html_table(section, selections), _html_list(section.notes)]
        for name, figures in pictures.get(section.key, {}).items():
            found = "".join(_html_figure(caption, path) for caption, path in figures)
            if name:
                found = f'<div class="pictures wide">{found}</div>'
                body.append(f"<details><summary>{html.escape(name)}</summary>{found}</details>")
            else:
                body.append(f'<div class="pictures">{found}</div>')
    terms = "".join(f"<dt>{html.escape(t)}</dt><dd>{html.escape(d)}</dd>" for t, d in GLOSSARY.items())
    body.append(f"<h2>Definitions</h2><dl>{terms}</dl>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Runs</title><style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_list(lines: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _html_table(section: Section, selections: Selections) -> str:
    labels = len(section.columns) + 1

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = ['class="n"' if i >= labels else "" for i in range(len(cells))]
        return "".join(f"<{tag} {s}>{html.escape(c)}</{tag}>" for s, c in zip(sides, cells, strict=True))

    body = "".join(
        f"<tr{' class=first' if first else ''}>{row('td', cells)}</tr>" for first, cells in _cells(section, selections)
    )
    head = row("th", header(section))
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_figure(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="box">{image}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
