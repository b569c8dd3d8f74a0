"""Declarations are read from the source, and a wrong one says what is wrong."""

import pytest

from utils.config.methods import FLOWS, METHODS, SELECTIONS, Key, Method, read_methods, read_names

HEAD = "import torch_that_is_not_there\n"


def declare(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(HEAD + text)
    return folder


def test_a_declaration_is_read_without_importing_its_file(tmp_path):
    text = 'METHOD: Method = Method("a", "says a", keys=(Key("n", int | None, None, "how many", "training", low=1),))\n'
    declare(tmp_path, a=text, b="METHODS = 3\n", tosca='METHOD = Method("t", "", (), (Selection("sample", "", ""),))')
    found = read_methods(tmp_path)["a"]
    assert (found.name, found.doc, found.selections) == ("a", "says a", ("sample",))
    assert found.keys == (Key("n", int | None, None, "how many", "training", low=1),)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "METHOD = Method(NAME, '')"}, r"a\.py: METHOD is read without importing.*literals.*NAME"),
        ({"a": "METHOD = 'a'"}, r"METHOD must be a Method, got 'a'"),
        ({"a": "METHOD = Method('a', '', views='twice')"}, "views must be test or augmented, got 'twice'"),
        ({"a": "METHOD = Method('a', '', reads=('data',))"}, "reads must be of training and module"),
        ({"a": "METHOD = Method('a', '', (Key('n', int, 1, '', 'nothing'),))"}, "affects must be one of place, speed"),
        ({"a": "METHOD = Method('x', '')", "b": "METHOD = Method('x', '')"}, "two files of models/ declare.*'x'"),
        ({"a": "METHOD = Method('a', '', selections=('mine',))"}, "no method declares the selection 'mine'"),
        (
            {
                "a": "METHOD = Method('a', '', (Key('n', int, 1, '', 'training'),), ())",
                "b": "METHOD = Method('b', '', (Key('n', str, '', '', 'training'),), ())",
            },
            "two methods declare the key 'n' with different types",
        ),
        (
            {
                "a": "METHOD = Method('a', '', (), (Selection('s', '', 'one thing'),))",
                "b": "METHOD = Method('b', '', (), (Selection('s', '', 'another'),))",
            },
            "two methods declare the selection 's' differently",
        ),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_methods(declare(tmp_path, **files))


def test_methods_come_in_the_order_of_tables(tmp_path):
    """Those with modules, then what is continual, then what sees everything; each by name."""
    kinds = [(not m.modular, not m.continual, m.name) for m in METHODS.values()]
    assert kinds == sorted(kinds)


def test_names_are_read_from_a_dictionary(tmp_path):
    path = declare(tmp_path, luca="FLOWS: dict = {'a': f, 'b': g}\nOTHER = {x: 1}\n") / "luca.py"
    assert read_names(path, "FLOWS") == ("a", "b")
    with pytest.raises(ValueError, match="keys of OTHER must be plain texts"):
        read_names(path, "OTHER")
    with pytest.raises(ValueError, match="no dictionary DATASETS"):
        read_names(path, "DATASETS")


def test_names_that_are_read_are_those_that_are_defined():
    from backbone import luca

    assert tuple(luca.FLOWS) == FLOWS
    assert SELECTIONS["batch"].ordered and not SELECTIONS["sample"].ordered
    assert isinstance(METHODS["tosca"], Method)
