"""Train and evaluate TOSCA or a baseline: python main.py --config=exps/tosca_cifar.json [key=value ...]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config import load_config
from utils.errors import UserError

DEMO = Path(__file__).resolve().parent / "exps" / "tosca_demo.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Learn classes task after task on a frozen ViT. Without arguments: a demo that needs no download."
    )
    parser.add_argument("--config", type=Path, default=DEMO, metavar="FILE", help="experiment file, see exps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key of the file")
    parser.add_argument("--fresh", action="store_true", help="start over; what is there is moved aside")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, stop")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        import trainer  # after the config is known to be good: this loads PyTorch
        from utils.report import set_up_logging

        set_up_logging()
        if args.dry_run:
            trainer.dry_run(config)
        else:
            trainer.run(config, fresh=args.fresh)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
