"""Named random streams, and PyTorch's global state for a while."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from utils.hardware import available_accelerator


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
def modes_of_a_run() -> Iterator[None]:
    """Compute as ``main.py`` does, whatever mode the caller's code is in, and leave the modes as they were.

    Off are a default type other than float32, a default device, autocast, ``no_grad`` and ``inference_mode``.
    Serves as a decorator, too.
    """
    import torch

    dtype, accelerator = torch.get_default_dtype(), available_accelerator()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in filter(torch.is_autocast_enabled, ("cpu", *([accelerator.type] if accelerator else []))):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":  # else no mode: each call in one passes through Python
            stack.enter_context(torch.device("cpu"))
        yield
