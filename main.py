"""Train and evaluate TOSCA or a baseline: python main.py --config exps/tosca_cifar.json [key=value ...]"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# python -I, PYTHONSAFEPATH and runpy leave this out; on standard input there is no file
sys.path.insert(0, str(Path(globals().get("__file__", "main.py")).resolve().parent))

from utils.cli import Parser, exit_process, run_command
from utils.config.config import Config
from utils.config.grid import make_grid
from utils.config.methods import ROOT, methods_help
from utils.errors import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (``utils.cli``), or 1 if --check-data finds problems."""
    hint = "start the same command again to go on (without --fresh)"
    return run_command("main.py", lambda: _run(_parser().parse_intermixed_args(argv)), hint=hint, needs_output=False)


DEMO = ROOT / "exps" / "tosca_demo.json"


def _parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Learn classes task after task on a frozen ViT. Without arguments: a demo that needs no download.",
        epilog=f"{methods_help()}\n\nAll keys: docs/config.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--config",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="experiment files, see exps/; all are checked first",
    )
    add("overrides", nargs="*", metavar="key=value", help="replace a key of the file")
    add(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=v1,v2",
        help="run every combination of these values, each in a folder of its own; the same command again goes on; "
        "may be given several times",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="so many runs side by side, once the feature bank is filled (1)",
    )
    add("--fresh", action="store_true", help="start over; what is there is moved aside")
    add("--dry-run", action="store_true", help="check everything, say what would be done, stop")
    add("--check-data", action="store_true", help="decode every image once and say what is wrong with the data; stop")
    add("--json", action="store_true", help="with --check-data: everything found, as JSON")
    return parser


def _run(args: argparse.Namespace) -> int:
    """Do what the arguments say; return the exit code."""
    first, *others = args.config or [str(DEMO)]
    given = [text for text in others if re.match(r"\w+=", text)]  # what follows --config FILE may be overrides
    files = [Path(text) for text in (first, *others) if text not in given]
    cells = make_grid(files, [*given, *args.overrides], args.sweep)
    if args.check_data:
        return _check_data([cell.config for cell in cells], as_json=args.json)
    import trainer  # after the config is known to be good: this loads PyTorch
    from utils.hardware import use_full_fp32
    from utils.logs import logging_to_terminal

    use_full_fp32()
    with logging_to_terminal():
        if args.dry_run:
            trainer.dry_run(cells, jobs=args.jobs)
        else:
            trainer.run(cells, fresh=args.fresh, jobs=args.jobs)
    return 0


def _check_data(configs: Sequence[Config], *, as_json: bool) -> int:
    """Check the images of each data set once; return 1 if any has problems. One that is missing is told at the end."""
    from utils.data.check import check_data, summary

    found, missing = [], list[str]()
    for config in {(c.dataset, c.data_path, c.scenario, c.image_size): c for c in configs}.values():
        try:
            found.append(check_data(config))
        except DataError as error:
            missing.append(f"{config.dataset}: {error}")
    lines = [line for of in found for line in summary(of)]
    if found:
        print(json.dumps(found if len(configs) > 1 else found[0], indent=1) if as_json else "\n".join(lines))
    if missing:
        raise DataError("; ".join(missing))
    return 0 if all(of["good"] for of in found) else 1


if __name__ == "__main__":
    exit_process(main())
