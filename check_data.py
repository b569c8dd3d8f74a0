"""Check the images that a config names: python check_data.py --config=exps/tosca_cub.json [key=value ...]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.check import as_json, check_data, summary
from utils.config import load_config
from utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="check_data.py",
        description="Decode every image once: counts, unreadable and duplicate files, images in both train and test.",
        epilog="Exit code: 0; 1 if there are problems; 2 for a wrong call or no data at all.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="experiment file, see exps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a key of the file")
    parser.add_argument("--json", action="store_true", help="everything found, as JSON")
    args = parser.parse_args(argv)
    try:
        findings = check_data(load_config(args.config, args.overrides))
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(as_json(findings) if args.json else "\n".join(summary(findings)))
    return 0 if findings.good else 1


if __name__ == "__main__":
    sys.exit(main())
