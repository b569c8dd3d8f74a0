"""Named random streams, and PyTorch's global state for a while."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: independent random streams for (purpose, seed, task, epoch …)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generator of the CPU for a while, then leave it as it was.

    Threads share that generator: this is for code that has no generator of its own to give, at a time when nothing
    else draws.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Let new tensors be float32 for a while, whatever the caller's project works in."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
