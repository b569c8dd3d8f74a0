"""Linear discriminant analysis from streamed statistics: class means and one shared covariance, no exemplars.

Hayes & Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR Workshops 2020,
Section 3; for frozen pre-trained features: Panos et al., "First Session Adaptation: A Strong Replay-Free Baseline
for Class-Incremental Learning", ICCV 2023, Section 3.
Deviation: Deep SLDA adds a fixed 1e-4 to the covariance, whatever the scale of the features. Here the shrinkage is
the closed form of Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 2010, Eq. 23 (OAS):
free of scale and of tuning, and a function of the streamed statistics alone.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.tensors import host_values
from utils.errors import NumericError

NO_SPREAD = 1e-12  # variance over mean square; float32 features that differ by rounding alone stay below


def float64_device(device: torch.device | str) -> torch.device:
    """``device`` where it computes in float64, else the CPU."""
    try:
        return torch.zeros(1, dtype=torch.float64, device=device).device
    except (TypeError, RuntimeError):  # which of the two depends on the accelerator
        return torch.device("cpu")


def finite_float64(features: Tensor, device: torch.device) -> Tensor:
    """``features`` in float64 on ``device``.

    Raises:
        NumericError: a feature is NaN or infinite; it would poison the statistics for good.
    """
    values = features.to(device).double()  # in this order: the source may not know float64
    bad = np.flatnonzero(~host_values(values.isfinite().flatten(1).all(dim=1)))
    if len(bad):
        raise NumericError(f"{len(bad)} of {len(values)} training features are NaN or infinite, the first at {bad[0]}")
    return values


def grown(values: Tensor, rows: int) -> Tensor:
    """``values`` ``(old, ...)`` with zeros appended: ``(rows, ...)``."""
    return torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])


def oas_covariance(scatter: Tensor, freedom: int | Tensor) -> Tensor:
    """Covariance shrunk towards a multiple of the identity: ``(dim, dim) -> (dim, dim)``, Chen et al. 2010, Eq. 23.

    Args:
        scatter: sum of the outer products of the centred features.
        freedom: degrees of freedom of ``scatter``, at least 1; a number or a float64 scalar.
    """
    covariance = scatter / freedom
    dim = len(covariance)
    trace, square = covariance.trace(), covariance.square().sum()  # Tr(S), Tr(S²)
    anisotropy = square - trace.square() / dim
    ratio = ((1 - 2 / dim) * square + trace.square()) / ((freedom + 1 - 2 / dim) * anisotropy)
    shrinkage = torch.where((anisotropy > 0) & (ratio < 1), ratio, 1.0)
    covariance = (1 - shrinkage) * covariance
    covariance.diagonal().add_(shrinkage * trace / dim)
    return covariance


def row_means(features: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean feature of each of ``count`` rows, zero for a row without images, and how many it has.

    Shape: ``(images, dim), (images,) -> (count, dim), (count,)``, the means in float64.

    Raises:
        NumericError: a feature is NaN or infinite.
    """
    values = finite_float64(features, float64_device(features.device))
    member = F.one_hot(rows.to(values.device), count)  # (images, count); its products add in a fixed order
    images = member.sum(dim=0)
    return member.double().T @ values / images.clamp(min=1)[:, None], images


def appended(old: Tensor, new: Tensor) -> Tensor:
    """Return ``old`` with the rows of ``new`` behind it, in the type and on the device of ``old``."""
    return torch.cat([old, new.to(old)])


class StreamingLDA:
    """A linear discriminant over classifier rows, updated by any number of batches in any order.

    The result does not depend on how the data are split (up to float64 rounding). Memory: ``dim²`` numbers for the
    shared scatter and ``dim`` for each row, in float64.

    Args:
        dim: feature width.
        device: where to compute; the CPU stands in for a device without float64.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.device = float64_device(device)
        self.images = torch.zeros(0, dtype=torch.float64, device=self.device)  # (rows,) how many each has
        self.means = torch.zeros(0, dim, dtype=torch.float64, device=self.device)  # (rows, dim)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)  # within rows
        self._discriminant = self._solve()  # kept in step with the statistics: a thread that scores changes nothing

    def update(self, features: Tensor, rows: Tensor, total_rows: int) -> None:
        """Add training features ``(images, dim)`` of ``rows`` ``(images,)``; ``total_rows`` exist from now on.

        Raises:
            NumericError: a feature is NaN or infinite.
        """
        features, rows = finite_float64(features, self.device), rows.to(self.device)
        member = F.one_hot(rows, total_rows).double()  # (images, rows); its products add in a fixed order everywhere
        new = member.sum(dim=0)  # (rows,) images of this batch
        old, old_means = grown(self.images, total_rows), grown(self.means, total_rows)
        new_means = member.T @ features / new.clamp(min=1)[:, None]
        centred = features - new_means[rows]
        # Two groups with means a and b scatter as each by itself, plus n_a·n_b / (n_a + n_b) · (a − b)(a − b)ᵀ.
        total = old + new
        gap = new_means - old_means
        between = (old * new / total.clamp(min=1))[:, None] * gap
        self.scatter = self.scatter + centred.T @ centred + gap.T @ between
        self.means = old_means + (new / total.clamp(min=1))[:, None] * gap
        self.images = total
        self._discriminant = self._solve()

    def scores(self, features: Tensor) -> Tensor:
        """``wᵀx + b`` for each row, float32: ``(samples, dim) -> (samples, rows)``; ``-inf`` for rows without images.

        Differences between two rows are log-likelihood ratios under equal priors.
        """
        weight, bias = self._discriminant
        scores = features.to(self.device).double() @ weight + bias
        return scores.masked_fill(self.images == 0, -torch.inf).float().to(features.device)

    def _solve(self) -> tuple[Tensor, Tensor]:
        """``w = Σ⁻¹μ`` and ``b = −½ μᵀΣ⁻¹μ``: ``(dim, rows), (rows,)``."""
        weight = torch.cholesky_solve(self.means.T, torch.linalg.cholesky(self.covariance()))
        return weight, -0.5 * (self.means.T * weight).sum(dim=0)

    def covariance(self) -> Tensor:
        """Shrunk covariance within rows ``(dim, dim)``; the identity while no row has two different images."""
        freedom = self.images.sum() - (self.images > 0).sum()
        mean_square = self.means.square().mean() if len(self.means) else 0.0
        no_spread = (freedom < 1) | (self.scatter.diagonal().mean() / freedom <= NO_SPREAD * mean_square)
        identity = torch.eye(len(self.scatter), dtype=torch.float64, device=self.device)
        return torch.where(no_spread, identity, oas_covariance(self.scatter, freedom.clamp(min=1)))

    def state_dict(self) -> dict[str, Tensor]:
        """``images`` ``(rows,)``, ``means`` ``(rows, dim)`` and ``scatter`` ``(dim, dim)``."""
        return {"images": self.images, "means": self.means, "scatter": self.scatter}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave; other keys are left alone."""
        self.images, self.means, self.scatter = (state[k].to(self.device) for k in ("images", "means", "scatter"))
        self._discriminant = self._solve()
