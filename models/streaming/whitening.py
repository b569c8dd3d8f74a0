"""Whitening of a feature by the within-class covariance of the classes so far."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.streaming.lda import StreamingLDA


class Whitening(NamedTuple):
    """``z = Aᵀ(h − μ)``: inside a class the whitened feature has about unit variance in every direction.

    Attributes:
        matrix: ``A`` ``(dim, dim)``.
        mean: ``μ`` ``(dim,)``.
    """

    matrix: Tensor
    mean: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Whiten in float32: ``(samples, dim) -> (samples, dim)``."""
        return (features.float() - self.mean) @ self.matrix


def make_whitening(statistics: StreamingLDA) -> Whitening:
    """``A = V·diag(w)^-1/2`` of the shrunk covariance within classes ``V·diag(w)·Vᵀ``; ``μ`` is the mean of all means.

    Float32, on the device of the statistics. With no two different images in any class ``A`` is the identity.
    """
    values, vectors = torch.linalg.eigh(statistics.covariance())
    mean = statistics.means[statistics.images > 0].mean(dim=0)
    return Whitening((vectors * values.rsqrt()).float(), mean.float())
