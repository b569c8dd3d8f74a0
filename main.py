"""Train and evaluate TOSCA or a baseline: python main.py --config=exps/tosca_cifar.json [key=value ...]"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, exit_process, run_command
from utils.config.config import Config, load_config
from utils.config.grid import make_grid
from utils.config.reference import methods_help
from utils.hardware import use_full_fp32

DEMO = Path(__file__).resolve().parent / "exps" / "tosca_demo.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (``utils.cli``), or 1 if --check-data finds problems."""
    return run_command(Path(sys.argv[0]).name, lambda: _run(_parser().parse_intermixed_args(argv)), needs_output=False)


def _parser() -> Parser:
    parser = Parser(
        description="Learn classes task after task on a frozen ViT. Without arguments: a demo that needs no download.",
        epilog=f"{methods_help()}\n\nAll keys: docs/config.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=DEMO, metavar="FILE", help="experiment file, see exps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key of the file")
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=v1,v2",
        help="run every combination of these values, each in a folder of its own; the same command again goes on; "
        "may be given several times",
    )
    parser.add_argument("--fresh", action="store_true", help="start over; what is there is moved aside")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, stop")
    parser.add_argument(
        "--check-data", action="store_true", help="decode every image once and say what is wrong with the data; stop"
    )
    parser.add_argument("--json", action="store_true", help="with --check-data: everything found, as JSON")
    return parser


def _run(args: argparse.Namespace) -> int:
    """Do what the arguments say; return the exit code."""
    grid = make_grid(args.config, args.overrides, args.sweep) if args.sweep else []
    config = load_config(args.config, args.overrides)
    if args.check_data:
        return _check_data(config, as_json=args.json)
    import trainer  # after the config is known to be good: this loads PyTorch
    from utils.logs import set_up_logging

    set_up_logging()
    use_full_fp32()
    if args.dry_run:
        for one in [cell.config for cell in grid] or [config]:
            trainer.dry_run(one)
    elif grid:
        trainer.run_sweep(grid, fresh=args.fresh)
    else:
        trainer.run(config, fresh=args.fresh)
    return 0


def _check_data(config: Config, *, as_json: bool) -> int:
    """Exit code: 0, or 1 if there are problems."""
    from utils.data.check import check_data, summary

    found = check_data(config)
    print(json.dumps(found, indent=1) if as_json else "\n".join(summary(found)))
    return 0 if found["good"] else 1


if __name__ == "__main__":
    exit_process(main())
