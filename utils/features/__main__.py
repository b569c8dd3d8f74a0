"""See and remove feature banks: python -m utils.features list | remove NAME... [--cache-dir DIR]"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Parser, exit_process, run_command
from utils.errors import BankError
from utils.features.bank import resolve_cache_dir
from utils.features.rows import LOCK, MANIFEST
from utils.files import FolderLock, human_size, read_regular
from utils.words import counted


def banks(cache_dir: Path) -> list[Path]:
    """The folders of all banks below ``cache_dir``, sorted by name."""
    return sorted(path.parent for path in cache_dir.glob(f"*/{MANIFEST}"))


def size_of(bank: Path) -> int:
    """Bytes of all files of a bank."""
    return sum(path.stat().st_size for path in bank.iterdir() if path.is_file())


def describe(bank: Path) -> str:
    """What a bank holds, in a few lines of words."""
    try:
        contents = json.loads(read_regular(bank / MANIFEST))["what"]
    except (OSError, ValueError, KeyError, TypeError):
        contents = f"unknown contents, {MANIFEST} is damaged; remove it"
    views = Counter(path.name.split("-")[1] for path in bank.glob("augmented-*[0-9].npy"))
    parts = ["test transform"] * (bank / "test.npy").exists()
    parts += [f"augmented views of seed {seed}: {count}" for seed, count in sorted(views.items())]
    parts += [f"not complete: {len(filling)}"] if (filling := list(bank.glob("*.filling.npy"))) else []
    return f"{bank.name}\n    {human_size(size_of(bank))}: {contents}\n    {'; '.join(parts) or 'empty'}"


def remove(cache_dir: Path, names: Sequence[str]) -> None:
    """Remove the banks ``names`` and say what that freed; none if one is unknown.

    The lock file stays behind in its empty folder: removing it would race with a process that is about to take it.
    """
    known = {path.name: path for path in banks(cache_dir)}
    if unknown := [name for name in names if name not in known]:
        raise BankError(f"{cache_dir} holds no bank {unknown[0]!r}; see: python -m utils.features list")
    for bank in map(known.__getitem__, dict.fromkeys(names)):
        with FolderLock(bank / LOCK, f"bank {bank.name}"):
            size = size_of(bank)
            # the manifest last: an interrupted removal can be repeated
            for path in [*bank.glob("*.npy"), *bank.glob(".*.partial"), bank / MANIFEST]:
                try:
                    path.unlink()
                except OSError as error:
                    raise BankError(f"{path} cannot be removed ({error.strerror})") from error
        print(f"Removed {bank.name} ({human_size(size)})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command("python -m utils.features", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m utils.features", description="See and remove feature banks.")
    parser.add_argument("--cache-dir", metavar="DIR", help="where the banks are")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every bank with its size and what it holds")
    actions.add_parser("remove", help="remove banks by name").add_argument("names", nargs="+", metavar="NAME")
    args: argparse.Namespace = parser.parse_args(argv)
    cache_dir = resolve_cache_dir(args.cache_dir) or Path(args.cache_dir)
    if args.action == "remove":
        remove(cache_dir, args.names)
        return 0
    found = banks(cache_dir)
    for bank in found:
        print(describe(bank))
    print(f"{counted(len(found), 'bank')} in {cache_dir}, {human_size(sum(map(size_of, found)))}")
    return 0


if __name__ == "__main__":
    exit_process(main())
