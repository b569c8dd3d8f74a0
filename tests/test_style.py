"""The house: which way imports run, what is private, how long a function may be, formatting and types."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

OWN = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
FOLDERS = ("utils.data", "utils.features", "utils.runs", "utils.results")  # utils reads upwards
PRODUCT = [*sorted(ROOT.glob("*.py")), *(p for d in ("backbone", "models", "utils") for p in (ROOT / d).rglob("*.py"))]
LONGEST_FUNCTION, LONGEST_FILE = 60, 330


def sources(package: str) -> list[Path]:
    assert package in OWN
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """``utils/data/tasks.py -> utils.data.tasks``; a package has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PRODUCT}


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Our own modules that a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def imported(path: Path) -> set[str]:
    """Our own top-level modules that a file imports, anywhere in it."""
    return {name.partition(".")[0] for name in imports(path)} & OWN


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("utils", {"utils"}), ("backbone", {"backbone", "utils"}), ("models", {"models", "backbone", "utils"})],
)
def test_imports_run_one_way(package, allowed):
    wrong = {
        str(path.relative_to(ROOT)): sorted(names) for path in sources(package) if (names := imported(path) - allowed)
    }
    assert wrong == {}


def folder_of(module: str) -> int:
    """The place in ``FOLDERS``, -1 for a small file beside them."""
    return next((i for i, folder in enumerate(FOLDERS) if module == folder or module.startswith(f"{folder}.")), -1)


def test_utils_reads_data_features_runs_results():
    wrong = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        if name.startswith("utils")
        for other in imports(path)
        if folder_of(other) > folder_of(name)
    ]
    assert wrong == []


def test_no_modules_import_each_other():
    graph = {name: set(imports(path, everywhere=False)) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while leaves := [name for name, others in graph.items() if not others]:
        graph = {name: others - set(leaves) for name, others in graph.items() if name not in leaves}
    assert graph == {}, "these import each other, or import a module that does"


def test_no_class_name_stands_for_two_things():
    homes: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_the_trainer_does_not_import_main():
    assert "main" not in imported(ROOT / "trainer.py")


def test_the_top_level_is_seen_at_a_glance():
    assert len(list(ROOT.glob("*.py"))) <= 7


def test_benchmarks_need_what_the_readmes_first_command_installs():
    required = {line.partition(">")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    known = {"PIL" if name == "pillow" else name for name in required} | OWN | {"benchmarks", *sys.stdlib_module_names}
    known |= {"matplotlib"}  # only for pictures that are asked for, and to kill runs that draw some
    wrong = {}
    for path in (ROOT / "benchmarks").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        names += [str(module) for module in imports(path)]
        if foreign := {name.partition(".")[0] for name in names} - known:
            wrong[path.name] = foreign
    assert wrong == {}


def test_private_names_stay_in_their_file():
    wrong = []
    for path in [*PRODUCT, *sorted((ROOT / "benchmarks").glob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        foreign = {
            node.attr: node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | OF_LIBRARIES
        }
        foreign |= {
            alias.name: node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if is_private(alias.name)
        }
        wrong += [f"{path.relative_to(ROOT)}:{line} {name}" for name, line in foreign.items()]
    assert wrong == []


# names of libraries that begin with an underscore and have no other form: named tuples, os._exit, timm, PyTorch
OF_LIBRARIES = {"_replace", "_asdict", "_fields", "_exit", "_pos_embed"}
OF_LIBRARIES |= {"_overloadpacket", "_C", "_log_softmax_backward_data", "_linalg_eigh"}
OF_LIBRARIES |= {"_linear_pointwise", "_is_mkldnn_bf16_supported"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def test_functions_and_files_are_short():
    long = []
    for path in PRODUCT:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert long == []


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
@pytest.mark.skipif(int(np.__version__.partition(".")[0]) < 2, reason="NumPy 1 names its types otherwise")
def test_types_are_complete_and_right():
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
