"""Symmetric matrices as they are saved: about half of their numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

STRIP = 64  # rows that are cut at the same column, so that a little more than the lower triangle is kept


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
