"""The little that several processes under ``torchrun`` need: who am I, and wait for the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Ranks:
    """This process among ``count``; rank 0 learns and writes."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1  # on this machine

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def share(self, value: object) -> object:
        """Rank 0's ``value``, on every rank."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


ONE_RANK = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group that ``torchrun`` set up, or one rank alone. Only files and barriers are shared: gloo."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ONE_RANK
        return
    import torch.distributed as dist

    # an extraction may take days between two barriers: a dead rank is torchrun's to notice, not a timeout's
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        local_rank, local_count = (
            int(os.environ.get(n, d)) for n, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
        yield Ranks(dist.get_rank(), count, local_rank, local_count)
    finally:
        dist.destroy_process_group()
