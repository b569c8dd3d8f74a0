"""Symmetric matrices as they are saved: about half of their numbers."""

import torch
from torch import Tensor

STRIP = 64  # rows that are cut at the same column, so that a little more than the lower triangle is kept


def packed(matrix: Tensor) -> Tensor:
    """``(size, size)``, of which the lower triangle counts, -> ``(numbers,)``: strips of rows up to the diagonal."""
    ends = range(STRIP, len(matrix) + STRIP, STRIP)
    return torch.cat([matrix[end - STRIP : end, :end].flatten() for end in ends])


def unpacked(numbers: Tensor, size: int) -> Tensor:
    """``packed`` undone: ``(size, size)``, symmetric."""
    matrix, done = numbers.new_zeros(size, size), 0
    for end in range(STRIP, size + STRIP, STRIP):
        strip = matrix[end - STRIP : end, :end]
        strip.copy_(numbers[done : done + strip.numel()].view_as(strip))
        done += strip.numel()
    return matrix.tril() + matrix.tril(-1).T
