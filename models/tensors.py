"""Looks at the values of tensors, and the form in which statistics are saved.

``host_values`` is the one place where Python looks at values while a learner learns or restores its state: each
look waits for the device. Answering needs none: its shapes follow from those of its arguments. What does look (is a
loss finite, which images are of a class, which λ is best) goes through here, so that the rest can be run without
values, as tests do for devices that a machine lacks.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

STRIP = 64  # rows that are cut at the same column, so that a little more than the lower triangle is kept


def host_values(tensor: Tensor) -> np.ndarray:
    """The values of ``tensor`` in the memory of the host."""
    return tensor.detach().cpu().numpy()


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(host_values(tensor.isfinite().all()))


def places(mask: Tensor) -> Tensor:
    """Where a mask ``(n,)`` is true, as indices on its device."""
    return torch.from_numpy(np.flatnonzero(host_values(mask))).to(mask.device)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN equals NaN."""
    return bool(np.array_equal(host_values(first), host_values(second), equal_nan=True))


def packed(matrix: Tensor) -> Tensor:
    """``(size, size)``, of which the lower triangle counts, -> ``(numbers,)``: strips of rows up to the diagonal."""
    return torch.cat([strip.flatten() for strip in _strips(matrix)])


def unpacked(numbers: Tensor, size: int) -> Tensor:
    """``packed`` undone: ``(size, size)``, symmetric."""
    matrix = numbers.new_zeros(size, size)
    strips = _strips(matrix)
    for strip, part in zip(strips, numbers.split([strip.numel() for strip in strips]), strict=True):
        strip.copy_(part.view_as(strip))
    return matrix.tril() + matrix.tril(-1).T


def _strips(matrix: Tensor) -> list[Tensor]:
    """The strips as views of the matrix."""
    return [matrix[end - STRIP : end, :end] for end in range(STRIP, len(matrix) + STRIP, STRIP)]


def state_below(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with ``name`` and a dot, under their names without it."""
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
