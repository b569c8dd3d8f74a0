"""The little that several processes under ``torchrun`` need: who am I, and wait for the others."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from utils.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among ``count``, ``local_count`` of them on this machine; rank 0 learns and writes."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

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

    def share(self, value: object) -> object:
        """Rank 0's ``value``, on every rank.

        Raises:
            UserError: another rank has ended.
        """
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _ended_rank_named():
            dist.broadcast_object_list(box, src=0)
        return box[0]


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
