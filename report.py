"""Tables and pictures from the JSON files of runs: python report.py [FOLDER or JSON ...]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.files import atomic_write
from utils.results import render
from utils.results.metrics import SELECTION_NAMES
from utils.results.read import newest_of_each, read_runs
from utils.results.tables import Section, make_sections


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Mean ± std over seeds of all runs found, as tables (terminal, Markdown, LaTeX, CSV) and pictures."
    )
    parser.add_argument("places", nargs="*", type=Path, metavar="FOLDER or JSON", help="where runs are (default: logs)")
    parser.add_argument("--out", type=Path, default=Path("tables"), help="folder of the files (default: tables)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also one self-contained page")
    parser.add_argument(
        "--selection",
        nargs="+",
        choices=SELECTION_NAMES,
        metavar="NAME",
        help=f"only these rows of the tables: {', '.join(SELECTION_NAMES)}",
    )
    parser.add_argument("--no-pictures", action="store_true", help="tables only")
    args = parser.parse_args(argv)
    try:
        _report(args)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(args: argparse.Namespace) -> None:
    runs, skipped = read_runs(args.places or [Path("logs")])
    runs, old = newest_of_each(runs)
    sections, empty = make_sections(runs)
    print(render.as_text(sections, args.selection))
    print(render.glossary_text() + "\n")
    notes = [*skipped, *old, *empty]
    for note in notes:
        print(note)
    for name, make in render.TABLE_FILES.items():
        _write(args.out / name, make(sections, args.selection))
    print(f"Tables: {', '.join(str(args.out / name) for name in render.TABLE_FILES)}")
    pictures = {} if args.no_pictures else _draw(sections, args.out)
    if args.html:
        _write(args.html, render.as_html(sections, args.selection, pictures, notes))
        print(f"Page: {args.html}")


def _draw(sections: Sequence[Section], folder: Path) -> dict[str, dict[str, list[tuple[str, Path]]]]:
    try:
        from utils.results import figures
    except ImportError as error:
        print(f"No pictures: they need matplotlib ({error}); pip install matplotlib")
        return {}
    pictures = {section.key: figures.draw_section(section, folder) for section in sections}
    count = sum(len(drawn) for groups in pictures.values() for drawn in groups.values())
    print(f"Pictures: {count} in {folder}, each as PNG and PDF")
    return pictures


def _write(path: Path, text: str) -> None:
    atomic_write(path, text.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    sys.exit(main())
