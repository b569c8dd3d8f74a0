"""Text from runs made safe for where it is shown: terminal, Markdown, LaTeX, CSV, HTML and file names.

Names of data sets, methods and settings come from JSON files that anybody may have written.
"""

import hashlib
import html
import unicodedata

_LATEX = {
    "\\": r"\textbackslash{}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "…": r"\ldots{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    '"': "''",
}
_LATEX_TERMS = {"Ā": r"$\bar{A}$", "A_T": "$A_T$"}
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def terminal(text: str) -> str:
    """Return ``text`` on one line without characters that steer a terminal or reverse the writing direction."""
    return "".join(c if _is_shown(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _is_shown(character: str) -> bool:
    # Cc: control, Cf: format (such as right-to-left overrides), Cs: half of a pair, Zl and Zp: line ends
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def markdown(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, in a cell of a table too."""
    return "".join("\\" + c if c in "\\|*_<>`[]#&~!" else c for c in terminal(text))


def latex(text: str) -> str:
    """Return ``text`` with everything that LaTeX would take for a command escaped."""
    return _LATEX_TERMS.get(text) or "".join(_LATEX.get(c, c) for c in terminal(text))


def csv_cell(value: object) -> object:
    """Return ``value`` so that a spreadsheet never takes text for a formula; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return "'" + value
    return value


def html_text(text: str) -> str:
    """Return ``text`` for an HTML page, within an element or an attribute."""
    return html.escape(terminal(text))


def plain_name(text: str) -> str:
    """Return ``text`` as a plain part of a file name or a label: ``[A-Za-z0-9._=-]`` alone, and never hidden.

    Texts that differ only in what is left out get different names: a few digits of a hash are appended then.
    """
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._=") else "-" for c in text)
    short = "-".join(part for part in kept.split("-") if part).lstrip(".")[:60]
    lossless = text.replace(" (", "-").replace(", ", "-").replace(")", "").replace(" ", "-")
    if short and short == lossless:
        return short
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{short}-{digest}" if short else digest
