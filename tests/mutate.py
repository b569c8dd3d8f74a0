"""Would the tests notice a small mistake? Plants one at a time and counts those that no test sees.

    python -m tests.mutate                          # every file of TARGETS
    python -m tests.mutate backbone/luca.py -n 20   # twenty mutations of one file

A mutation changes one comparison, operator, number, truth value, condition or reduction, or leaves a call out. It is
never written to disk: a forked process imports the changed source in place of the file and runs the tests that TARGETS
names until one fails. A mutation is killed if a test fails (or runs into the time limit), and survives if all pass.
Before a file's mutations its tests run once on the unchanged source, and must pass. Lines that only speak to people
(messages, log lines, docstrings) are left alone. What cannot change any behaviour is listed, with the reason, in
EQUIVALENT and does not count.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 180

# file -> the tests that must notice a mistake in it
TARGETS: dict[str, tuple[str, ...]] = {
    "backbone/luca.py": ("tests/backbone/test_luca.py", "tests/golden", "tests/models"),
    "backbone/classifier.py": ("tests/backbone/test_classifier.py", "tests/golden", "tests/models"),
    "models/tosca.py": ("tests/models/test_tosca.py", "tests/golden", "tests/models", "tests/test_run.py"),
    "models/evaluation.py": ("tests/models", "tests/golden", "tests/test_run.py", "tests/test_domains.py"),
    "models/streaming/lda.py": ("tests/models",),
    "models/streaming/ridge.py": ("tests/models",),
    "utils/results/metrics.py": ("tests/results/test_metrics.py", "tests/test_run.py"),
    "utils/data/tasks.py": ("tests/data/test_tasks.py", "tests/test_domains.py", "tests/runs/test_continue.py"),
    "utils/data/transforms.py": ("tests/data/test_data.py", "tests/features"),
    "utils/data/fingerprints.py": ("tests/data/test_data.py", "tests/faults/test_faults_data.py", "tests/features"),
    "utils/features/arrays.py": ("tests/features", "tests/faults"),
    "utils/runs/identity.py": ("tests/runs", "tests/test_config.py", "tests/faults/test_faults_resume.py"),
    "utils/seeds.py": ("tests/data", "tests/models", "tests/test_run.py"),
}

# "file: mutation" -> why no test can see it
EQUIVALENT: dict[str, str] = {}

COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATOR = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
REDUCTION = {
    "argmin": "argmax",
    "argmax": "argmin",
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "sum": "mean",
    "mean": "sum",
    "any": "all",
    "all": "any",
    "zeros": "ones",
}
SPEAKS = {"info", "warning", "error", "debug", "progress", "set_postfix"}  # calls that only speak to people


@dataclass(frozen=True)
class Mutation:
    """A small mistake in ``file``: what was written and what stands there instead."""

    file: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"

    @property
    def key(self) -> str:
        """The mutation without its line, which other edits move."""
        return f"{self.file}: {self.before}  ->  {self.after}"


def candidates(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Every node that can be changed, with a changed copy of it."""
    for node in _walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
            yield node, _with(node, ops=[COMPARE[type(node.ops[0])]()])
        elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATOR:
            yield node, _with(node, op=OPERATOR[type(node.op)]())
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = node.value
            changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 + 1
            yield node, ast.Constant(changed)
        elif isinstance(node, (ast.If, ast.IfExp)):
            yield node, _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        elif isinstance(node, ast.Attribute) and node.attr in REDUCTION and isinstance(node.ctx, ast.Load):
            yield node, _with(node, attr=REDUCTION[node.attr])
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but for messages, annotations, decorators and docstrings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "keywords") and isinstance(
            node, (ast.FunctionDef, ast.ClassDef)
        ):
            continue
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)) or _speaks(child):
                continue
            if isinstance(child, ast.AST):
                yield child
                yield from _walk(child)


def _speaks(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and (getattr(node.value.func, "attr", None) or getattr(node.value.func, "id", None)) in SPEAKS
    )


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def mutations(file: str) -> list[Mutation]:
    """Every mutation of a file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    count = sum(1 for _ in candidates(ast.parse(text)))
    found = []
    for number in range(count):
        tree = ast.parse(text)  # afresh: a replaced node changes its tree
        old, new = next(pair for i, pair in enumerate(candidates(tree)) if i == number)
        before, after = _first_line(old), _first_line(new)
        changed = ast.fix_missing_locations(_Replace(old, new).visit(tree))
        found.append(Mutation(file, getattr(old, "lineno", 0), before, after, ast.unparse(changed)))
    return found


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:100]


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the mutated source in place of the module's file."""

    def __init__(self, mutation: Mutation) -> None:
        self.path, self.source = ROOT / mutation.file, mutation.source
        self.name = mutation.file.removesuffix(".py").replace("/", ".")

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def survives(mutation: Mutation) -> bool:
    """Whether all tests of the file pass with the mistake in it. Runs in a forked process."""
    if pid := os.fork():
        deadline = time.monotonic() + TIME_LIMIT_S
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return False
    code = 1
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.meta_path.insert(0, _Loader(mutation))
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", *TARGETS[mutation.file]]))
    finally:
        os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TARGETS)}; by default all")
    parser.add_argument(
        "-n", type=int, metavar="N", help="mutations of each file, drawn with a fixed seed; all by default"
    )
    parser.add_argument("--list", action="store_true", help="print the mutations, run nothing")
    args = parser.parse_args(argv)
    if unknown := [file for file in args.files if file not in TARGETS]:
        parser.error(f"{unknown[0]} is not among the files: {', '.join(TARGETS)}")
    chosen: list[Mutation] = []
    for file in args.files or TARGETS:
        every = [m for m in mutations(file) if m.key not in EQUIVALENT]
        drawn = every if args.n is None else random.Random(0).sample(every, min(args.n, len(every)))
        chosen += sorted(drawn, key=lambda m: m.line)
    if args.list:
        print(*chosen, sep="\n")
        return 0
    os.chdir(ROOT)
    import numpy  # noqa: F401 - what is heavy is imported once, before the forks
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    for file in dict.fromkeys(mutation.file for mutation in chosen):
        if not survives(Mutation(file, 0, "", "", (ROOT / file).read_text(encoding="utf-8"))):
            parser.error(f"the tests of {file} fail without any mutation: {' '.join(TARGETS[file])}")
    alive = []
    for number, mutation in enumerate(chosen, start=1):
        lives = survives(mutation)
        alive += [mutation] if lives else []
        print(f"{number}/{len(chosen)} {'SURVIVED' if lives else 'killed  '} {mutation}", flush=True)
    killed = len(chosen) - len(alive)
    print(f"{killed} of {len(chosen)} killed ({100 * killed / max(1, len(chosen)):.1f} %)")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
