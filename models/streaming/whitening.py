"""Whitening of a feature by the covariance within the classes so far."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.streaming.lda import StreamingLDA
from models.tensors import places


class Whitening(NamedTuple):
    """``z = Aᵀ(h − μ)`` with ``A = V·diag(w)^-1/2``: inside a class z has about unit variance in every direction.

    Attributes:
        directions: ``V`` ``(dim, dim)``, the eigenvectors of the covariance as columns.
        scales: ``w^-1/2`` ``(dim,)``.
        mean: ``μ`` ``(dim,)``.
    """

    directions: Tensor
    scales: Tensor
    mean: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Whiten in float32: ``(samples, dim) -> (samples, dim)``."""
        return (features.float() - self.mean) @ self.directions * self.scales


def make_whitening(statistics: StreamingLDA) -> Whitening:
    """The whitening by the shrunk covariance within classes ``V·diag(w)·Vᵀ``; ``μ`` is the mean of all class means.

    Float32, on the device of the statistics. With no two different images in any class ``A`` is the identity.
    """
    values, vectors = torch.linalg.eigh(statistics.covariance())
    mean = statistics.means[places(statistics.images > 0)].mean(dim=0)
    return Whitening(vectors.float(), values.rsqrt().float(), mean.float())
