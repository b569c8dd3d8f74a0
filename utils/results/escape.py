"""Text from runs made safe for where it is shown: terminal, Markdown, LaTeX, HTML, CSV and file names.

Names of data sets, methods and settings come from JSON files that anybody may have written.
"""

import hashlib
import html
import re
import unicodedata

_LATEX = {
    **{character: f"\\{character}" for character in "_%&#${}"},
    **{character: f"${character}$" for character in "<>"},
    **{character: f"{{{character}}}" for character in "[*"},  # else options of the row before
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    '"': "''",
    "–": "--",
    "…": r"\ldots{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "†": r"$\dagger$",
    "Ā": r"$\bar{A}$",
}
# the letters beyond ASCII that fonts of the encoding T1 have
_T1 = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿŒœŠšŽž"
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
    """Return ``text`` with all that LaTeX would take for a command escaped, and no letter that T1 lacks.

    A_T is set in maths, as Ā is; any other letter stands as its number.
    """
    escaped = "".join(_LATEX.get(c) or (c if c.isascii() or c in _T1 else f"U+{ord(c):04X}") for c in terminal(text))
    return re.sub(r"(?<![\w\\])A\\_T(?!\w|\\_)", "$A_T$", escaped)


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
    kept = re.sub(r"[^A-Za-z0-9._=]+", "-", text).strip("-").lstrip(".")[:60]
    if kept and kept == text:
        return kept
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{kept}-{digest}" if kept else digest
