"""The small mistakes that ``tests.mutate`` plants.

One comparison, operator, number, truth value, condition or reduction is changed, or a call left out. Lines that only
speak to people (messages, log lines, docstrings) are left alone, and so is zip's ``strict``, which can only fail where
another line is wrong.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parent.parent

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
    """A small mistake in ``file``.

    Attributes:
        file: path below the root.
        line: where the changed node begins.
        lines: first and last line of the statement that it stands in; of its head, where it is a compound one.
        function: name of the outermost function whose body holds it; empty where it is in none (a default, a constant).
        before: what was written.
        after: what stands there instead.
        statement: the first line of the statement as it was.
        tree: the changed file.
    """

    file: str
    line: int
    lines: tuple[int, int]
    function: str
    before: str
    after: str
    statement: str
    tree: ast.Module

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self._change}"

    @property
    def key(self) -> str:
        """The mutation without its line, which other edits move."""
        return f"{self.file}: {self._change}"

    @property
    def _change(self) -> str:
        inside = "" if self.before == self.statement else f"  in  {self.statement}"
        return f"{self.before}  ->  {self.after}{inside}"

    def code(self) -> CodeType:
        """Return the changed file, compiled with the lines of the unchanged one."""
        return compile(self.tree, str(ROOT / self.file), "exec")


def mutations(file: str) -> list[Mutation]:
    """Every mutation of a file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    count = sum(1 for _ in _candidates(ast.parse(text)))
    return [_mutation(file, ast.parse(text), number) for number in range(count)]  # parsed anew: each changes its tree


def _mutation(file: str, tree: ast.Module, number: int) -> Mutation:
    old, new = next(pair for i, pair in enumerate(_candidates(tree)) if i == number)
    above = _ancestors(tree, old)
    statement = next(node for node in [old, *reversed(above)] if isinstance(node, ast.stmt))
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    lines = (statement.lineno, max(last, statement.lineno))
    texts = [_first_line(node) for node in (old, new, statement)]
    function = _function(above, old)
    changed = ast.fix_missing_locations(_Replace(old, new).visit(tree))
    return Mutation(file, getattr(old, "lineno", lines[0]), lines, function, *texts, changed)


def _candidates(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
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
            kept = ast.Expr(ast.Name("super", ast.Load()))  # does nothing, but the function keeps its closure
            yield node, kept if "super()" in ast.unparse(node) else ast.Pass()


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
            if isinstance(child, ast.keyword) and child.arg == "strict":
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


def _ancestors(tree: ast.AST, wanted: ast.AST) -> list[ast.AST]:
    """The nodes around ``wanted``, outermost first."""
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found: list[ast.AST] = []
    while wanted in above:
        wanted = above[wanted]
        found.append(wanted)
    return found[::-1]


def _function(above: list[ast.AST], node: ast.AST) -> str:
    for around, inside in zip(above, [*above[1:], node], strict=True):
        if isinstance(around, ast.FunctionDef):
            return around.name if inside in around.body else ""
    return ""


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:100]
