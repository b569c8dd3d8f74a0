"""What the machine offers: CPUs, accelerators, memory, batch sizes."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")  # where Linux shows what it allows a container


def available_accelerator() -> "torch.device | None":
    """The kind of accelerator that PyTorch can use here; None where there is none."""
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def available_cpus() -> int:
    """CPUs that this process may use, by its affinity and by the quota of its container (``docker --cpus=2``)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup version 2, version 1
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            cpus = min(cpus, math.ceil(quota / period)) if quota > 0 else cpus
    return cpus


def total_memory() -> int | None:
    """Bytes of memory that this machine has; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def forget_peak(device: "torch.device | None" = None) -> None:
    """Let ``peak_bytes`` begin anew, where the system can: on a GPU, and for a process under Linux."""
    if memory := _memory_of(device):
        memory.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a /proc that is read-only or hidden: the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: "torch.device | None" = None) -> int:
    """The most memory since ``forget_peak``: on a GPU what tensors took there, else what the whole process took.

    Where the system cannot begin anew it is the most since the process began.
    """
    if memory := _memory_of(device):
        return int(memory.max_memory_allocated(device))
    with suppress(OSError, IndexError):  # Linux; getrusage keeps peaks of before, and what the parent held
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    with suppress(ImportError):  # on Windows the system does not say
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0


def _memory_of(device: "torch.device | None") -> Any:
    """PyTorch's module for ``device`` if that keeps count of memory, else None."""
    if device is None or device.type == "cpu":
        return None
    import torch

    module = torch.get_device_module(device)
    return module if hasattr(module, "reset_peak_memory_stats") else None


def default_batch_size(device: "torch.device", image_size: int = 224) -> int:
    """Images in a forward pass: on a CPU few, so that they stay in its caches, yet more where images are small."""
    return min(64, max(1, 8 * 224**2 // image_size**2)) if device.type == "cpu" else 256


def forward_threads(device: "torch.device") -> int:
    """Forward passes at a time: on a CPU one for each of PyTorch's threads, each pass on one thread.

    Threads inside a product would wait for each other after each of them, and for the loaders that share the CPUs,
    and the last bits of fp32 features would depend on their number.
    """
    import torch

    return torch.get_num_threads() if device.type == "cpu" else 1


def use_full_fp32() -> None:
    """Keep fp32 convolutions at full precision in this process, on every device.

    PyTorch lets NVIDIA's GPUs round their factors to TF32, which has ten bits of mantissa in place of 23 (its notes on
    numerical accuracy); its matrix products it does not. A patch embedding is a convolution.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def single_thread() -> Iterator[None]:
    """One CPU thread inside a product for a while: small products cost more to hand out than they gain.

    The count is the process's: it is changed for learning alone, never on the way to an answer.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_workers(local_ranks: int = 1) -> int:
    """Loader processes: every CPU this process may use but one, which drives the backbone; at most 16."""
    return max(0, min(available_cpus() // local_ranks - 1, 16))
