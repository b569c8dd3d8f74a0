"""Tables and pictures from the JSON files of runs: python report.py [FOLDER or JSON ...]"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(globals().get("__file__", "report.py")).resolve().parent))  # see main.py

from utils.cli import Parser, exit_process, run_command
from utils.errors import UserError
from utils.files import atomic_write, output_file
from utils.results import page, render
from utils.results.cells import HasTable
from utils.results.comparison import Differences, make_comparisons
from utils.results.escape import terminal
from utils.results.metrics import SELECTION_NAMES
from utils.results.read import newest_of_each, read_runs
from utils.results.tables import Section, make_cost_tables, make_sections


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command("report.py", lambda: _report(_parser().parse_args(argv)), needs_output=False)


def _parser() -> Parser:
    parser = Parser(
        prog="report.py",
        description="Mean ± std over seeds of all runs found, as tables (terminal, Markdown, LaTeX) and pictures.",
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
    return parser


def _report(args: argparse.Namespace) -> int:
    runs, skipped = read_runs(args.places or [Path("logs")])
    runs, old = newest_of_each(runs)
    sections, empty = make_sections(runs)
    comparisons = make_comparisons(sections, args.selection)
    behind = [Differences(comparison) for comparison in comparisons]
    costs = make_cost_tables(sections)
    tables: list[HasTable] = [*comparisons, *behind, *costs]
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is no folder; give another one")
    page_file = output_file(args.html, "--html") if args.html else None
    print(render.as_text([*sections, *comparisons, *costs], args.selection, styled=_styled()))
    print(render.glossary_text() + "\n")
    notes = [terminal(note) for note in (*skipped, *old, *empty)]
    for note in notes:
        print(note)
    files = {
        "tables.md": render.as_markdown([*sections, *tables], args.selection),
        "tables.tex": render.as_latex([*sections, *tables], args.selection),
    }
    for name, text in files.items():
        _write(args.out / name, "--out", text)
    print(f"Tables: {', '.join(str(args.out / name) for name in files)}")
    pictures = {} if args.no_pictures else _draw(sections, args.out)
    if page_file:
        _write(page_file, "--html", page.as_html(sections, args.selection, pictures, notes, tables))
        print(f"Page: {args.html}")
    return 0


def _styled() -> bool:
    """Whether standard output is a terminal that shows bold and underlined type."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


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


def _write(path: Path, option: str, text: str) -> None:
    atomic_write(output_file(path, option), text.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    exit_process(main())
