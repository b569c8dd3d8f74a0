"""Ranks that torchrun did not start: what is missing is named, and nobody waits for ever or in spite of a signal."""

import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta

import pytest
import torch

from tests.conftest import ROOT
from utils import ranks
from utils.errors import UserError
from utils.ranks import Ranks, joined_ranks

ALL = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE, which is empty"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 0 to 999999, got 'two'"),
        ({"RANK": None}, "RANK, which is empty"),
        ({"RANK": "2"}, "RANK must be a whole number from 0 to 1, got '2'"),
        ({"MASTER_PORT": None}, "MASTER_PORT, which is empty"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR, which is empty"),
        ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR 'nowhere.invalid', the machine of rank 0, is not known"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK, which is empty"),  # as Kubernetes' job controller and MPI start them
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE, which is empty"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be a whole number from 1 to 2, got '0'"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK must be a whole number from 0 to 0, got '1'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be a whole number from 1 to 65535, got '70000'"),
        ({"MASTER_ADDR": "a" * 70}, "the machine of rank 0, is not known (encoding with 'idna'"),
    ],
)
def test_what_the_environment_lacks_is_one_line_that_names_the_variable(monkeypatch, changed, words):
    for name, value in {**ALL, "MASTER_PORT": free_port(), **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, joined_ranks():
        pytest.fail("joined")
    assert words in str(caught.value) and "unset WORLD_SIZE" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_alone_joins_nobody(monkeypatch, world_size):
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with joined_ranks() as alone:
        assert (alone.first, alone.count, alone.share(5)) == (True, 1, 5)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_meet_are_one_line(monkeypatch, rank):
    """Rank 0 finds its port in use; rank 1 waits for a rank 0 that never comes."""
    with socket.socket(socket.AF_INET6) as used:
        used.bind(("::", 0))
        used.listen()
        port = str(used.getsockname()[1]) if rank == "0" else free_port()
        for name, value in {**ALL, "MASTER_PORT": port, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))
        with pytest.raises(UserError) as caught, joined_ranks():
            pytest.fail("joined")
    line = str(caught.value)
    assert "WORLD_SIZE" in line and f"MASTER_ADDR 'localhost', MASTER_PORT {port}" in line and "\n" not in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("alone", [True, False], ids=["meeting", "barrier"])
def test_a_signal_ends_a_rank_that_waits(number, alone):
    code = """
import sys, time
from utils.cli import exit_process, run_command
from utils.ranks import joined_ranks
def action():
    print("waits", flush=True)
    with joined_ranks() as ranks:
        print("joined", flush=True)
        time.sleep(60) if ranks.first else ranks.barrier()
    return 0
exit_process(run_command("prog", action))
"""
    environment = {**os.environ, **ALL, "MASTER_PORT": free_port(), "RANK": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**environment, "RANK": rank}, stdout=-1, text=True
        )
        for rank in (["1"] if alone else ["1", "0"])
    ]
    for said in ["waits\n"] if alone else ["waits\n", "joined\n"]:
        assert started[0].stdout.readline() == said
    time.sleep(3)  # it imports torch; a signal before that would end it, too
    started[0].send_signal(number)
    try:
        assert started[0].wait(10) in (-number, 128 + number)
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def test_what_was_sent_last_outlives_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the end of the group may wait for ever for a thread of gloo's that waits for the interpreter (torch 2.6)."""
    sent: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(weakref.ref(tensor)))
    ranks = Ranks(count=2)
    assert ranks.share({"value": 1}) == {"value": 1}
    assert len(sent) == 2 and all(tensor() is not None for tensor in sent)
    ranks.share("another")
    assert [tensor() is None for tensor in sent] == [True, True, False, False]
