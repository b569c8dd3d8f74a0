import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OWN = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}


def sources(package: str) -> list[Path]:
    assert package in OWN
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Our own top-level modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names & OWN


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("utils", {"utils"}), ("backbone", {"backbone", "utils"}), ("models", {"models", "backbone", "utils"})],
)
def test_imports_run_one_way(package, allowed):
    wrong = {
        str(path.relative_to(ROOT)): sorted(names) for path in sources(package) if (names := imported(path) - allowed)
    }
    assert wrong == {}


def test_the_trainer_does_not_import_main():
    assert "main" not in imported(ROOT / "trainer.py")


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
