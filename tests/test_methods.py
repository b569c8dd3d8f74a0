"""Methods are declared in their files, read from the source; a wrong declaration is a line and takes nothing along."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils.config.methods import FLOWS, METHODS, SELECTIONS, WRONG_METHODS, Key, read_methods, read_names

HEAD = "import torch_that_is_not_there\n"
KEY = 'Key("n", int | None, None, "how many", "training", low=1)'


def declare(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(HEAD + text)
    return folder


def test_a_declaration_is_read_without_importing_its_file(tmp_path):
    text = f'METHOD: Method = Method("a", "says a", keys=({KEY},))\n'
    found, wrong = read_methods(declare(tmp_path, a_file=text, b="METHODS = 3\n"))
    assert list(found) == ["a"] and wrong == {}
    assert (found["a"].doc, found["a"].selections, found["a"].module) == (
        "says a",
        ("sample",),
        f"{tmp_path.name}.a_file",
    )
    assert found["a"].keys == (Key("n", int | None, None, "how many", "training", low=1),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("METHOD = Method(NAME, '')", "NameError: name 'NAME' is not defined"),
        ("METHOD = 'a'", "TypeError"),
        ("METHOD = Method('a')", "TypeError: .*missing 1 required .* 'doc'"),
        ("METHOD = Method('a', ''", r"SyntaxError: .*wrong\.py, line 2"),
        ("METHOD = Method('a', '', (Key('n', int, 1, '', 'nothing'),))", "affects must be one of place, speed"),
        ("METHOD = Method('good', '')", "declares the method 'good', too"),
    ],
)
def test_a_wrong_declaration_is_one_line_and_takes_no_other_method_along(tmp_path, text, message):
    found, wrong = read_methods(declare(tmp_path, good="METHOD = Method('good', '')", wrong=text))
    assert list(found) == ["good"] and list(wrong) == ["wrong"]
    assert wrong["wrong"].startswith(f"{tmp_path}/wrong.py: ") and "\n" not in wrong["wrong"]
    assert re.search(message, wrong["wrong"]), wrong


def test_the_command_answers_beside_a_malformed_method(tmp_path):
    for folder in ("models", "backbone", "utils", "exps"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "models" / "mine.py").write_text("METHOD = Method('mine', doc)")

    def run(*arguments):
        command = [sys.executable, "main.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0 and "tosca_white" in shown.stdout and "mine.py: its METHOD" in shown.stdout
    refused = run("model_name=mine", "power=2")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "mine.py: its METHOD" in refused.stderr
    assert "the nearest known key" in run("model_name=knn", "neighbour=2").stderr


def test_methods_come_in_the_order_of_tables():
    """Those with modules, then what is continual, then what sees everything; each by name."""
    kinds = [(not m.modular, not m.continual, m.name) for m in METHODS.values()]
    assert kinds == sorted(kinds) and WRONG_METHODS == {}
    assert METHODS["tosca"].module == "models.tosca"


def test_names_that_are_read_are_those_that_are_defined(tmp_path):
    from backbone import luca

    assert tuple(luca.FLOWS) == FLOWS
    assert SELECTIONS["batch"].ordered and not SELECTIONS["sample"].ordered
    path = declare(tmp_path, luca="FLOWS: dict = {'a': f, 'b': g}\n") / "luca.py"
    assert read_names(path, "FLOWS") == ("a", "b")
    with pytest.raises(AssertionError, match="no dictionary DATASETS"):
        read_names(path, "DATASETS")
