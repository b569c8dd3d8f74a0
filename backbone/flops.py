"""FLOPs and times of a piece of work.

FLOPs are counted by ``torch.utils.flop_counter``'s formulas: two for each multiply-add of matrix products, convolutions
and attention, nothing for element-wise work.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from utils.hardware import single_thread

TRIES = 5  # of a piece of work that is timed: the quickest counts, since load on the machine only adds
SECONDS = 0.5  # after which no further try begins


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of every operation within, backward passes included.

    It differs from torch's ``FlopCounterMode`` in that it keeps one total alone, which costs a tenth of the time.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._composite: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and self._is_composite(func):  # such as linear, in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result

    def _is_composite(self, func: Any) -> bool:
        if func not in self._composite:
            self._composite[func] = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        return self._composite[func]


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of ``work``."""
    # the fused attention of some devices is an operation without a formula: it would count nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        work()
    return int(counter.total)


def whole_forward_flops(model: nn.Module, image_size: int) -> int:
    """Return the FLOPs of one image through all of a timm model; shapes alone are computed, no numbers."""
    shapes = {
        name: torch.empty_like(t, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.no_grad():
        return count_flops(lambda: torch.func.functional_call(model, shapes, (image,)))


def quickest_ms(work: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of the quickest of some tries of ``work``, after one that does not count.

    On a CPU they are those of one thread, as a run computes: several would wait for each other on a busy machine.
    """
    times: list[float] = []
    begun = time.perf_counter()
    with single_thread():
        while len(times) < 2 or (len(times) <= TRIES and time.perf_counter() - begun < SECONDS):
            started = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - started)
    return min(times[1:]) * 1000
