"""One HTML page with all tables and pictures; it needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.results.cells import HasTable, Row, Selections, Table
from utils.results.escape import html_text
from utils.results.metrics import GLOSSARY
from utils.results.tables import Section

Pictures = Mapping[str, Mapping[str, Sequence[tuple[str, Path]]]]

# The shadows at the sides of a box are painted behind covers that scroll with the table: a shadow is seen exactly where
# something is hidden.
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 75rem; margin: 0 auto; }
body { padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 2px solid #111; }
.box { overflow-x: auto; border: 1px solid #bbb; margin: .75rem 0; background:
  linear-gradient(to right, #fff 30%, #fff0) left / 3rem 100% no-repeat local,
  linear-gradient(to left, #fff 30%, #fff0) right / 3rem 100% no-repeat local,
  linear-gradient(to right, #0005, #0000) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, #0005, #0000) right / 1rem 100% no-repeat scroll, #fff; }
.hint { display: none; font-size: .85rem; color: #444; margin: .75rem 0 -.6rem; } figure .hint { margin: 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .2rem .6rem; text-align: left; white-space: nowrap; }
th { border-bottom: 1px solid #111; vertical-align: bottom; white-space: normal; } .n { text-align: right; }
tr.first td { border-top: 1px solid #bbb; }
td ins { text-decoration: underline; text-underline-offset: .15em; }
.notes { padding-left: 1.2rem; font-size: .9rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; }
img { width: 100%; height: auto; display: block; }
.wide img { min-width: 28rem; }
.whole { grid-column: 1 / -1; } .whole img { min-width: 60rem; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; overflow-wrap: anywhere; }
@media (max-width: 62rem) { .scrolls { display: block; } }
.short { display: none; }
@media (max-width: 40rem) {
  body { padding: .6rem; } table { font-size: .8rem; } th, td { padding: .2rem .3rem; }
  .label { display: none; } .short { display: table-cell; position: sticky; left: 0; background: #fff; }
  .short { white-space: normal; min-width: 8rem; max-width: 9rem; overflow-wrap: anywhere; }
  .short { border-right: 1px solid #bbb; }
}
@media (max-width: 32rem) { .wide .hint { display: block; } }
"""
# Without scripts the hints stand where a box is likely too narrow, with scripts where it is.
_SCRIPT = """
function hints() {
  for (const box of document.querySelectorAll(".hint + .box"))
    box.previousElementSibling.style.display = box.scrollWidth > box.clientWidth ? "block" : "none";
}
addEventListener("load", hints); addEventListener("resize", hints); addEventListener("toggle", hints, true);
"""
_HINT = '<p class="hint{}">Wide {}: scroll it sideways →</p>'
_WHOLE_WIDTH = 1400  # pixels of a picture that has the page's whole width for itself
_MARKS = {"": "{}", "best": "<strong>{}</strong>", "close": "<ins>{}</ins>"}


def as_html(
    sections: Sequence[Section],
    selections: Selections,
    pictures: Pictures,
    notes: Sequence[str],
    comparisons: Sequence[HasTable] = (),
) -> str:
    """Return the page.

    Args:
        sections: data sets and splits.
        selections: only the rows of these; None: all.
        pictures: section key -> group name ("" for the whole section) -> (caption, PNG file).
        notes: lines about files that do not count.
        comparisons: tables over all sections; they come first.
    """
    body = ["<h1>Runs</h1>", _list(notes)]
    for part in comparisons:
        body.append(_headed(part.table(selections)))
    for section in sections:
        body.append(_headed(section.table(selections)))
        for name, figures in pictures.get(section.key, {}).items():
            found = "".join(_figure(caption, path, wide=bool(name)) for caption, path in figures)
            if name:
                found = f'<div class="pictures wide">{found}</div>'
                body.append(f"<details><summary>{html_text(name)}</summary>{found}</details>")
            else:
                body.append(f'<div class="pictures">{found}</div>')
    terms = "".join(f"<dt>{html_text(t)}</dt><dd>{html_text(d)}</dd>" for t, d in GLOSSARY.items())
    body.append(f"<h2>Definitions</h2><dl>{terms}</dl>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Runs</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _headed(table: Table) -> str:
    return f"<h2>{html_text(table.title)}</h2>{_table(table)}{_list(table.notes)}"


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{html_text(line)}</li>" for line in lines)}</ul>' if lines else ""


def _table(table: Table) -> str:
    head = f'<th class="short">{html_text(", ".join(table.header[: table.labels]))}</th>'
    head += "".join(f"<th{_side(table, i)}>{html_text(name)}</th>" for i, name in enumerate(table.header))
    body = "".join(_row(table, row) for row in table.rows)
    hint = _HINT.format(" scrolls" if len(table.header) > 5 else "", "table")
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'{hint}<div class="box" tabindex="0" role="region" aria-label="{html_text(table.title)}">{inner}</div>'


def _row(table: Table, row: Row) -> str:
    """The cells; a narrow screen shows all labels in one cell, so that the first numbers are seen."""
    labels = ", ".join(html_text(cell.text) for cell in row.cells[: table.labels] if cell.text not in ("", "–"))
    texts = (_MARKS[cell.mark].format(html_text(cell.text)) for cell in row.cells)
    cells = "".join(f"<td{_side(table, i)}>{text}</td>" for i, text in enumerate(texts))
    return f'<tr{" class=first" if row.first else ""}><td class="short">{labels}</td>{cells}</tr>'


def _side(table: Table, column: int) -> str:
    return ' class="n"' if column >= table.labels else ' class="label"'


def _figure(caption: str, path: Path, *, wide: bool) -> str:
    content = path.read_bytes()
    data = base64.b64encode(content).decode()
    whole = ' class="whole"' if int.from_bytes(content[16:20], "big") > _WHOLE_WIDTH else ""  # a PNG's width in pixels
    image = f'<img alt="{html_text(caption)}" src="data:image/png;base64,{data}">'
    hint = _HINT.format("", "picture") if wide else ""
    return f'<figure{whole}>{hint}<div class="box">{image}</div><figcaption>{html_text(caption)}</figcaption></figure>'
