"""FLOPs of any work on tensors: two for each multiply-add of products, convolutions, attention and factorisations.

Element-wise work counts nothing. The formulas are those of ``torch.utils.flop_counter``; it has none for linear
algebra, whose leading terms are added here (Golub and Van Loan, "Matrix Computations", 4th edition: 4.2.5 Cholesky, 3.1
triangular systems, 5.2.2 QR with Q formed, 8.3.3 symmetric eigenvalues with vectors).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from utils.hardware import single_thread

aten = torch.ops.aten
TRIES = 5  # of a piece of work that is timed: the quickest counts, since load on the machine only adds
SECONDS = 0.5  # after which no further try begins
_ACTIVE: ContextVar["FlopCounter | None"] = ContextVar("active FLOP counter", default=None)


def _cholesky(matrix: Any, *_: Any, **__: Any) -> int:
    return int(matrix.shape[-1] ** 3 // 3)


def _cholesky_solve(rhs: Any, factor: Any, *_: Any, **__: Any) -> int:
    return int(2 * factor.shape[-1] ** 2 * rhs.shape[-1])


def _solve_triangular(matrix: Any, rhs: Any, *_: Any, **__: Any) -> int:
    return int(matrix.shape[-1] ** 2 * rhs.shape[-1])


def _qr(matrix: Any, *_: Any, **__: Any) -> int:
    long, short = max(matrix.shape), min(matrix.shape)
    return int(4 * long * short**2 - 4 * short**3 // 3)


def _eigh(matrix: Any, *_: Any, **__: Any) -> int:
    return int(9 * matrix.shape[-1] ** 3)


_LINEAR_ALGEBRA: dict[Any, Callable[..., int]] = {
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_solve: _cholesky_solve,
    aten.linalg_solve_triangular: _solve_triangular,
    aten.linalg_qr: _qr,
    aten._linalg_eigh: _eigh,
}


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
        self._before: list[Token[FlopCounter | None]] = []

    def __enter__(self) -> "FlopCounter":
        self._before.append(_ACTIVE.set(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._before.pop())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        formula: Any = flop_registry.get(packet)
        if formula is None and packet not in _LINEAR_ALGEBRA and self._is_composite(func):  # linear, in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        elif packet in _LINEAR_ALGEBRA:
            self.total += _LINEAR_ALGEBRA[packet](*args, **kwargs)
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


@contextmanager
def counted_otherwise() -> Iterator[Callable[[float], None] | None]:
    """Within, a ``FlopCounter`` around it does not look: counting thousands of small steps would slow each of them.

    Yields:
        What adds FLOPs that are known in another way; None where nobody counts.
    """
    counter = _ACTIVE.get()
    if counter is None:
        yield None
        return

    def add(flops: float) -> None:
        counter.total += round(flops)

    counter.__exit__(None, None, None)
    try:
        yield add
    finally:
        counter.__enter__()
