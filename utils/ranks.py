"""The other processes of a ``torchrun``."""

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from utils.errors import UserError


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
        """Wait until every rank is here.

        Raises:
            UserError: another rank has ended.
        """
        if self.count > 1:
            import torch.distributed as dist

            with _ended_rank_named():
                dist.barrier()

    def share(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank.

        Raises:
            UserError: another rank has ended.
        """
        if self.count == 1:
            return value
        import torch
        import torch.distributed as dist

        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._sent[:] = [size := torch.tensor(len(packed))]
        with _ended_rank_named():
            dist.broadcast(size, src=0)
            if not self.first:
                packed = torch.empty(int(size), dtype=torch.uint8)
            self._sent.append(packed)
            dist.broadcast(packed, src=0)
        return value if self.first else pickle.loads(packed.numpy().data)


ONE_RANK = Ranks()


@contextmanager
def _ended_rank_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of this torchrun has ended (what it says is above or below); start the same command "
            "again: the features that are done stay"
        ) from error


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group that ``torchrun`` set up, or one rank alone. Only files and barriers are shared: gloo.

    Ranks but the first log warnings alone: else every line would stand there once for each.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ONE_RANK
        return
    import torch.distributed as dist

    # an extraction may take days between two barriers; a rank that dies breaks its connections, and they are noticed
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        ranks = Ranks(dist.get_rank(), count, local_rank, local_count)
        if not ranks.first:
            logging.getLogger().setLevel(logging.WARNING)
        yield ranks
    finally:
        dist.destroy_process_group()
