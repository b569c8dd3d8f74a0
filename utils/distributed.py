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


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group that ``torchrun`` set up, or one rank alone. Only files and barriers are shared: gloo."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    # an extraction may take days between two barriers: a dead rank is torchrun's to notice, not a timeout's
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
