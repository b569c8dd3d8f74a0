"""Parts of a page that a command writes, between two marks, and the growth laws that such pages state."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from utils.files import atomic_write

PAGE_HELP = "replace the part of this page that this command makes"


def add_write_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--write PAGE``."""
    parser.add_argument("--write", type=Path, metavar="PAGE", help=PAGE_HELP)


def marks(command: str) -> tuple[str, str]:
    """The lines before and after the part of a page that ``python -m <command>`` makes."""
    return f"<!-- made by {command}: begin -->", f"<!-- made by {command}: end -->"


def publish(page: Path | None, command: str, lines: Sequence[str]) -> None:
    """Replace the part of ``page`` that ``command`` makes; print it where no page is given.

    Raises:
        ValueError: the page lacks the marks.
    """
    if page is None:
        print("\n".join(lines), flush=True)
        return
    text = page.read_text(encoding="utf-8")
    begin, end = marks(command)
    if begin not in text or end not in text:
        raise ValueError(f"{page} lacks the lines {begin!r} and {end!r}")
    before, rest = text.split(begin)
    part = "\n".join([begin, *lines, end])
    atomic_write(page, (before + part + rest.split(end)[1]).encode())


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of values ~ sizes^p between the two largest sizes; NaN where that is not defined."""
    if len(sizes) < 2 or min(*values[-2:], *sizes[-2:]) <= 0:
        return math.nan
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
