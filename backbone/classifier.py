"""The cosine classifier over all rows seen so far."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineClassifier(nn.Module):
    """``logits = σ · cos(z, w_r)``; one row ``w_r`` for each class (in domain runs: for each class and domain).

    Args:
        weight: ``(rows, dim)``.
        sigma: the scale, a learned scalar.

    Shape: ``(samples, dim) -> (samples, rows)``. A zero row or a zero feature has cosine 0, not NaN.
    """

    def __init__(self, weight: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.sigma = nn.Parameter(sigma)

    def forward(self, z: Tensor) -> Tensor:
        return cosine_logits(z, F.normalize(self.weight, dim=-1), self.sigma)

    def grown(self, new_rows: Tensor) -> "CosineClassifier":
        """A new classifier with the same σ and the rows of this one followed by ``new_rows`` ``(new, dim)``."""
        return CosineClassifier(torch.cat([self.weight.detach(), new_rows]), self.sigma.detach().clone())


def cosine_logits(z: Tensor, directions: Tensor, sigma: Tensor) -> Tensor:
    """``σ · cos(z, w_r)`` for rows of length one: ``(..., dim), (rows, dim), () -> (..., rows)``."""
    return sigma * F.linear(F.normalize(z, dim=-1), directions)


def first_rows(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows of the first task, ``(count, dim)`` from U(−1/√dim, 1/√dim)."""
    bound = 1 / math.sqrt(dim)
    return torch.empty(count, dim).uniform_(-bound, bound, generator=generator)
