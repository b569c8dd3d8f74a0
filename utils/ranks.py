"""The other processes of a ``torchrun``."""

import logging
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from utils.cli import signals_handled
from utils.errors import UserError

MEETING = timedelta(minutes=5)  # for all ranks to come
WAITING = timedelta(days=30)  # between two barriers; a rank that dies breaks its connections, and they are noticed
_START = "start with torchrun, or unset WORLD_SIZE"


@dataclass(frozen=True)
class Ranks:
    """This process among ``count``, ``local_count`` of them on this machine; rank 0 learns and writes."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    # What was sent last. Gloo's threads hold a tensor for a moment longer than the call; if theirs were the last
    # reference, they would need the interpreter, which the end of the group keeps while it waits for them (torch 2.6).
    _sent: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            import torch.distributed as dist

            with _waiting(_ENDED):
                dist.barrier()

    def share(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.count == 1:
            return value
        import torch
        import torch.distributed as dist

        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._sent[:] = [size := torch.tensor(len(packed))]
        with _waiting(_ENDED):
            dist.broadcast(size, src=0)
            if not self.first:
                packed = torch.empty(int(size), dtype=torch.uint8)
            self._sent.append(packed)
            dist.broadcast(packed, src=0)
        return value if self.first else pickle.loads(packed.numpy().data)


ONE_RANK = Ranks()
_ENDED = (
    "another process of this torchrun has ended (what it says is above or below); start the same command again: the "
    "features that are done stay"
)


@contextmanager
def _waiting(message: str) -> Iterator[None]:
    """Wait for other ranks, whose fault an error is. A signal ends the process: no handler would run meanwhile."""
    try:
        with signals_handled(signal.SIG_DFL):
            yield
    except RuntimeError as error:
        raise UserError(message) from error


def world_size() -> int:
    """How many processes the environment says there are."""
    return _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else 1


def _variable(name: str) -> str:
    if text := os.environ.get(name):
        return text
    raise UserError(f"one of several processes needs the environment variable {name}, which is empty; {_START}")


def _number(name: str, below: int = 1_000_000, low: int = 0) -> int:
    text = _variable(name)
    if text.isdecimal() and low <= int(text) < below:
        return int(text)
    must_be = f"must be a whole number from {low} to {below - 1}"
    raise UserError(f"the environment variable {name} {must_be}, got {text!r}; {_START}")


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group that ``torchrun`` set up, or one rank alone. Only files and barriers are shared: gloo.

    Ranks but the first log warnings alone: else every line would stand there once for each.
    """
    count = world_size()
    if count <= 1:
        yield ONE_RANK
        return
    host, port = _variable("MASTER_ADDR"), _number("MASTER_PORT", 65_536, low=1)
    local_count = _number("LOCAL_WORLD_SIZE", count + 1, low=1)
    ranks = Ranks(_number("RANK", count), count, _number("LOCAL_RANK", local_count), local_count)
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:  # the latter: no name of a machine looks like that
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"MASTER_ADDR {host!r}, the machine of rank 0, is not known ({reason}); {_START}") from None
    met = f"the {count} processes of WORLD_SIZE did not meet at MASTER_ADDR {host!r}, MASTER_PORT {port}"
    with _waiting(f"{met}: one did not come within {MEETING}, or another program uses the port"):
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=count, timeout=WAITING)
    try:
        if not ranks.first:
            logging.getLogger().setLevel(logging.WARNING)
        yield ranks
    finally:
        dist.destroy_process_group()
