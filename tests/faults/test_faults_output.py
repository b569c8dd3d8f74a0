"""What every command prints, to wherever its output goes: a full disk, a reader that has gone, any encoding.

``tests/test_cli.py`` holds the frame that all commands share; here the commands themselves run, each in a forked
process whose standard output is such a file.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import main
import predict
import report
from tests.conftest import fork, handlers_restored
from utils.features import __main__ as features

COMMANDS = {
    "main, finished": (main, ["--config={config}"]),
    "main --check-data": (main, ["--config={config}", "--check-data"]),
    "main --dry-run": (main, ["--config={config}", "--dry-run", "checkpoint_dir={folder}/new"]),
    "predict": (predict, ["--checkpoint={folder}/tosca", "{images}"]),
    "predict --json": (predict, ["--checkpoint={folder}/tosca", "--json", "--explain", "{images}"]),
    "predict --csv": (predict, ["--checkpoint={folder}/tosca", "--csv", "{images}"]),
    "report": (report, ["{folder}/logs", "--no-pictures", "--out={folder}/tables", "--html={folder}/page.html"]),
    "features list": (features, ["--cache-dir={bank}", "list"]),
}
NEED_OUTPUT = {
    "predict",
    "predict --json",
    "predict --csv",
    "features list",
}  # the others write files, or answer by code


@pytest.fixture
def start(finished, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with an open file as its standard output; ``(exit code, standard error, output if a file)``."""
    images = Path(finished.keys["data_path"]) / "test" / "0"
    places = {
        "config": finished.write_config(),
        "folder": finished.folder,
        "images": images,
        "bank": finished.keys["cache_dir"],
    }
    # what is printed must not differ from call to call: a name with a character that most encodings lack
    odd = finished.folder / "image Ā ☃.png"
    odd.write_bytes(next(images.iterdir()).read_bytes())

    def run(name: str, output: int, encoding: str = "utf-8") -> tuple[int, str]:
        command, arguments = COMMANDS[name]
        arguments = [argument.format(**places) for argument in arguments]
        if command is predict:
            arguments.append(str(odd))
        said = tmp_path / "stderr.txt"
        if (pid := fork()) == 0:
            code = 99
            try:
                os.dup2(output, 1)
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", encoding=encoding, closefd=False, errors="backslashreplace")  # noqa: SIM115
                with handlers_restored():
                    code = command.main(arguments)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text(encoding=encoding)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_under_the_output_is_one_line_and_no_success(start, name):
    with open("/dev/full", "wb") as full:
        code, err = start(name, full.fileno())
    assert "Traceback" not in err
    assert err.count("error: standard output cannot be written (No space left on device)\n") == 1
    assert code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_gone_is_no_fault(start, finished, name):
    reader, writer = os.pipe()
    os.close(reader)
    code, err = start(name, writer)
    os.close(writer)
    assert "Traceback" not in err
    assert "error" not in err
    assert code == (1 if name in NEED_OUTPUT else 0)
    if name == "report":
        assert (finished.folder / "tables" / "tables.md").is_file()
        assert (finished.folder / "page.html").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_encoding_that_lacks_characters_loses_no_line(start, tmp_path, name):
    printed = {}
    for encoding in ("utf-8", "ascii", "latin-1"):
        path = tmp_path / encoding
        with path.open("wb") as file:
            code, err = start(name, file.fileno(), encoding)
        assert "Traceback" not in err
        assert code == 0
        printed[encoding] = path.read_bytes()
    lines = printed["utf-8"].decode().splitlines()
    for encoding in ("ascii", "latin-1"):
        found = printed[encoding].decode(encoding).splitlines()
        assert len(found) == len(lines)
        if name.startswith(("predict", "report")):  # their output has no times
            assert found == [line.encode(encoding, "backslashreplace").decode(encoding) for line in lines]
    if name.startswith("predict"):
        assert any("Ā ☃" in line or "\\u0100 \\u2603" in line for line in lines)
        assert b"\\u0100 \\u2603" in printed["ascii"]
