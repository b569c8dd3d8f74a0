"""See and remove feature banks: python -m utils.features list | remove NAME... [--cache-dir DIR]"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from utils.cli import Parser, exit_process, run_command
from utils.errors import BankError
from utils.features.bank import default_cache_dir
from utils.features.rows import LOCK, MANIFEST
from utils.files import FolderLock, expanded, human_size, read_regular
from utils.words import counted


def banks(cache_dir: Path) -> list[Path]:
    """The folders of all banks below ``cache_dir``, sorted by name."""
    return sorted(path.parent for path in cache_dir.glob(f"*/{MANIFEST}"))


def describe(bank: Path) -> str:
    """What a bank holds, in a few lines of words."""
    return f"{bank.name}\n    {human_size(size_of(bank))}: {_contents(bank)}\n    {_arrays(bank)}"


def size_of(bank: Path) -> int:
    """Bytes of all files of a bank."""
    return sum(path.stat().st_size for path in bank.iterdir() if path.is_file())


def _contents(bank: Path) -> str:
    try:
        manifest: dict[str, Any] = json.loads(read_regular(bank / MANIFEST))
        normalized = "normalised" if manifest["normalize"] else "not normalised"
        return (
            f"{manifest['what']}; {manifest['images']} images of {manifest['image_size']} px, {normalized}, through "
            f"{manifest['backbone']} (weights {manifest['weights_sha256'][:12]}…), {manifest['feature_dim']} features, "
            f"computed in {manifest['precision']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return f"unknown contents, {MANIFEST} is damaged; remove it"


def _arrays(bank: Path) -> str:
    """``test transform; augmented views of seed 1993: 20; not complete: 1``."""
    views_of: dict[str, int] = {}
    parts = ["test transform"] if (bank / "test.npy").exists() else []
    for path in bank.glob("augmented-*.npy"):
        if not path.name.endswith(".filling.npy"):
            seed = path.name.split("-")[1]
            views_of[seed] = views_of.get(seed, 0) + 1
    parts += [f"augmented views of seed {seed}: {views}" for seed, views in sorted(views_of.items())]
    if incomplete := len(list(bank.glob("*.filling.npy"))):
        parts.append(f"not complete: {incomplete}")
    return "; ".join(parts) or "empty"


def remove(cache_dir: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Remove the banks ``names``, all or none; return each with the bytes that this freed.

    The lock file stays behind in its empty folder: removing it would race with a process that is about to take it.

    Raises:
        UserError: an unknown name, or a bank that a process is filling.
    """
    known = {path.name: path for path in banks(cache_dir)}
    for name in names:
        if name not in known:
            raise BankError(f"{cache_dir} holds no bank {name!r}; see: python -m utils.features list")
    removed = []
    with ExitStack() as locks:
        for name in sorted(set(names)):
            locks.enter_context(FolderLock(known[name] / LOCK, f"bank {name}"))
        for name in dict.fromkeys(names):
            removed.append((name, size_of(known[name])))
            _empty(known[name])
    return removed


def _empty(bank: Path) -> None:
    files = [path for pattern in ("*.npy", "*.crc32", "*.partial", ".*.partial") for path in bank.glob(pattern)]
    try:
        for path in [*files, bank / MANIFEST]:  # the manifest last: an interrupted removal can be repeated
            path.unlink(missing_ok=True)
    except OSError as error:
        raise BankError(f"{path} cannot be removed ({error.strerror})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_command("python -m utils.features", lambda: _run(_parser().parse_args(argv)))


def _parser() -> Parser:
    parser = Parser(prog="python -m utils.features", description="See and remove feature banks.")
    parser.add_argument("--cache-dir", type=Path, default=None, metavar="DIR", help="where the banks are")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every bank with its size and what it holds")
    actions.add_parser("remove", help="remove banks by name").add_argument("names", nargs="+", metavar="NAME")
    return parser


def _run(args: argparse.Namespace) -> int:
    cache_dir = expanded(args.cache_dir) if args.cache_dir else default_cache_dir()
    if args.action == "remove":
        for name, freed in remove(cache_dir, args.names):
            print(f"Removed {name} ({human_size(freed)})")
        return 0
    found = banks(cache_dir)
    for bank in found:
        print(describe(bank))
    print(f"{counted(len(found), 'bank')} in {cache_dir}, {human_size(sum(map(size_of, found)))}")
    return 0


if __name__ == "__main__":
    exit_process(main())
