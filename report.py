"""Tables and pictures from the JSON files of runs: python report.py [FOLDER or JSON ...]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(globals().get("__file__", "report.py")).resolve().parent))  # see main.py

from utils.cli import Parser, exit_process, run_command
from utils.errors import UserError
from utils.files import atomic_write, output_file
from utils.results import render
from utils.results.comparison import make_comparisons
from utils.results.escape import terminal
from utils.results.metrics import SELECTION_NAMES, terms
from utils.results.published import PUBLISHED, Entry, published_table, read_published
from utils.results.read import newest_of_each, read_runs
from utils.results.tables import Section, cost_tables, make_sections, section_table


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
    parser.add_argument(
        "--published",
        nargs="?",
        const=PUBLISHED,
        type=Path,
        metavar="FILE",
        help="also judge runs of the paper's protocols against its numbers (default: exps/published.json)",
    )
    parser.add_argument("--no-pictures", action="store_true", help="tables only")
    return parser


def _report(args: argparse.Namespace) -> int:
    runs, skipped = read_runs(args.places or [Path("logs")])
    runs, old = newest_of_each(runs)
    sections, empty = make_sections(runs)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is no folder; give another one")
    page = output_file(args.html, "--html", ".html", ".htm") if args.html else None
    comparisons = make_comparisons(sections, args.selection)
    main_tables, differences = [table for table, _ in comparisons], [table for _, table in comparisons]
    results, costs = [section_table(section, args.selection) for section in sections], cost_tables(sections)
    entries = list[Entry]()
    if args.published:
        judged, entries = published_table(runs, read_published(args.published))
        costs.append(judged)
    defined = terms([run.values for run in runs], args.selection)
    print(render.as_text([*main_tables, *results, *costs], defined) + "\n")
    for note in (*skipped, *old, *empty):
        print(terminal(note))
    for name, markup in (("tables.md", render.MARKDOWN), ("tables.tex", render.LATEX)):
        _write(args.out / name, "--out", render.write([*main_tables, *results, *differences, *costs], markup, defined))
    print(f"Tables: {args.out / 'tables.md'}, {args.out / 'tables.tex'}")
    pictures = [] if args.no_pictures else _draw(sections, entries, args.out)
    if page:
        parts: list[render.Table | render.Picture] = [*main_tables]
        for place, table in enumerate(results):
            parts += [table, *(pictures[place] if pictures else [])]
        parts += [*differences, *costs, *(pictures[-1] if pictures else [])]
        title = f"Results on {', '.join(section.short_title for section in sections) or 'no data yet'}"
        _write(page, "--html", render.write(parts, render.HTML, defined, title))
        print(f"Page: {args.html}")
    return 0


def _draw(sections: Sequence[Section], entries: Sequence[Entry], folder: Path) -> list[list[render.Picture]]:
    """The pictures of each section, then those against published curves; none without matplotlib."""
    try:
        from utils.results import figures
    except ImportError as error:
        print(f"No pictures: they need matplotlib ({error}); pip install matplotlib")
        return []
    pictures = [figures.draw_section(section, folder) for section in sections]
    pictures.append(figures.draw_published(entries, folder))
    print(f"Pictures: {sum(map(len, pictures))} in {folder}, each as PNG and PDF")
    return pictures


def _write(path: Path, option: str, text: str) -> None:
    atomic_write(output_file(path, option), text.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    exit_process(main())
