"""The frame of every command: full output, any encoding, Ctrl-C twice, faults and bugs, ways to start it.

Small commands run in processes of their own, since what Python does while it exits is part of the promise.
"""

import errno
import os
import re
import runpy
import signal
import subprocess
import sys

import pytest
import torch

import main
import predict
import report
from tests.conftest import ROOT
from utils.cli import run_command
from utils.errors import UserError
from utils.features import __main__ as features

FRAME = "import sys, time, atexit\nfrom utils.cli import exit_process, run_command\n"


def start(action: str, options: str = "", **environment: str) -> subprocess.Popen:
    """A process that runs ``action``, the body of a command, in the frame."""
    body = "".join(f"    {line}\n" for line in action.splitlines())
    program = f"{FRAME}def action():\n{body}    return 0\nexit_process(run_command('prog', action{options}))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


MANY_LINES = "for number in range(200_000):\n    print(number)"


@pytest.mark.parametrize(("options", "code"), [("", 1), (", needs_output=False", 0)])
def test_output_closed_early_ends_quietly_or_is_not_needed(options, code):
    process = start(MANY_LINES, options)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", code)


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_streams_that_were_closed_before_the_start_are_no_traceback(closing):
    program = f"{FRAME}exit_process(run_command('prog', lambda: print('text') or print(1, file=sys.stderr) or 0))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closing}', sys.executable, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "1\n" if closing == ">&-" else "")


@pytest.mark.parametrize("command", ["main", "predict", "report", "utils.features"])
def test_help_on_a_full_disk_is_no_success(command):
    program = f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module({command!r}, run_name='__main__')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert "error: standard output cannot be written (No space left on device)\n" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_character_that_the_encoding_lacks_is_written_as_an_escape(encoding):
    process = start("print('Ā = 9')\nprint('next')\nprint('σ', file=sys.stderr)", PYTHONIOENCODING=encoding)
    out, err = process.communicate(timeout=60)
    assert out == "\\u0100 = 9\nnext\n"
    assert "Traceback" not in err
    assert process.returncode == 0


def test_a_closed_error_output_stops_nothing():
    process = start("for _ in range(100_000):\n    print('progress', file=sys.stderr)\nprint('done')")
    process.stderr.close()
    assert process.stdout.read() == "done\n"
    assert process.wait(60) == 0


CLEANING_UP = """
try:
    print('working', flush=True)
    time.sleep(60)
finally:
    print('cleaning', flush=True)
    time.sleep(60)
"""
SHUTTING_DOWN = """
atexit.register(lambda: (print('last', flush=True), time.sleep(60)))
print('working', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_first_one_is_answered_ends_it_without_a_word(number):
    process = start(CLEANING_UP)
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 128 + number


def test_ctrl_c_while_python_shuts_down_is_quiet():
    process = start(SHUTTING_DOWN)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "last\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert err == "\nprog: stopped; start it again\n"
    assert process.returncode == 130


def failing(error: BaseException):
    def action() -> int:
        raise error

    return action


MEMORY = r"the memory does not suffice \(.*\); free some, .* \(batch_size, feature_batch_size, num_workers\)"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EIO, "said so", "/disk/file"), "/disk/file: said so; correct that"),
        (OSError(errno.ENOSPC, "full", "/a"), "/a: full; free space or set another folder"),
        (OSError(errno.EROFS, "no", "/a"), "/a: no; correct the permissions or set another folder"),
        (PermissionError(errno.EACCES, "no", "/a"), "/a: no; correct the permissions or set another folder"),
        (OSError(errno.EMFILE, "too many", "/a"), r"/a: too many; raise the number of open files \(ulimit -n\)"),
        (OSError(errno.ENOMEM, "none", "/a"), "/a: none; free some, .*"),
        (RuntimeError("unable to open </x>: Too many open files (24)"), ".* raise the number of open files .*"),
        (RuntimeError("open file failed, Permission denied: a.pth"), ".*a.pth; correct the permissions .*"),
        (MemoryError(), MEMORY),
        (MemoryError("9 TiB"), MEMORY),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), MEMORY),
        (RuntimeError("[x] can't allocate memory: 9 bytes\nmore"), MEMORY),
        (torch.OutOfMemoryError(), MEMORY),
    ],
)
def test_what_the_machine_refuses_is_one_line_that_names_its_real_cause(error, line, capsys):
    assert run_command("prog", failing(error)) == 2
    assert re.fullmatch(f"prog: error: {line}, then start again\n", said := capsys.readouterr().err), said


@pytest.mark.parametrize(
    "error", [OSError("no number"), FileNotFoundError(errno.ENOENT, "x"), ValueError("x"), RuntimeError("x")]
)
def test_a_bug_of_ours_is_no_fault_of_the_user(error):
    with pytest.raises(type(error)):
        run_command("prog", failing(error))


def test_debugging_shows_the_traceback_of_a_users_fault_too(monkeypatch, capsys):
    assert run_command("prog", failing(UserError("wrong"))) == 2
    assert capsys.readouterr().err == "prog: error: wrong\n"
    monkeypatch.setenv("TOSCA_DEBUG", "1")
    assert run_command("prog", failing(UserError("wrong"))) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, predict, report, features])
def test_every_command_answers_a_mistake_in_one_line(command, capsys):
    assert command.main(["--nonsense"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help shows the usage" in line


@pytest.mark.parametrize("start", [lambda file: main.main(["--dry-run"]), lambda file: predict.main([file])])
def test_the_commands_keep_fp32_convolutions_at_full_precision(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").touch()
    start("image.png")
    assert torch.backends.cudnn.allow_tf32 is False


def test_the_handlers_of_signals_go_with_the_command_whoever_called_it(monkeypatch, capsys):
    """As in a notebook after ``%run main.py``: an interrupt must reach the notebook, not end its process."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert end.value.code == 0 and "usage: main.py" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


WAYS = {
    "isolated": "{python} -I {file}",
    "safe path": "PYTHONSAFEPATH=1 {python} {file}",
    "standard input": "cd {root} && < {file} {python} -",
    "isolated, standard input": "cd {root} && cat {file} | {python} -I -",
    "runpy": """{python} -c 'import runpy; runpy.run_path("{file}", run_name="__main__")'""",
}


@pytest.mark.parametrize("command", ["main.py", "predict.py", "report.py"])
@pytest.mark.parametrize("way", WAYS)
def test_the_commands_run_however_python_was_started(tmp_path, way, command):
    line = WAYS[way].format(python=sys.executable, root=ROOT, file=ROOT / command) + " --nonsense"
    done = subprocess.run(line, cwd=tmp_path, shell=True, capture_output=True, text=True, check=False)
    said = f"{command}: error: unrecognized arguments: --nonsense; {command} --help shows the usage\n"
    assert (done.returncode, done.stderr) == (2, said)
