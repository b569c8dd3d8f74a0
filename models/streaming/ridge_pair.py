"""Two ridge regressions on random features, one of them on the whitened feature, each calibrated by leave-one-out.

An extension of this project. Each regression is the one of ``models/streaming/ridge.py`` with its own λ. Their scores
are no log-probabilities; a temperature τ for each makes them so. It is chosen on the training images of each task,
scored by the regression on all *other* images so far, which costs no second fit: leave-one-out has a closed form.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.streaming.lda import StreamingLDA
from models.streaming.ridge import RandomRidge
from models.streaming.whitening import Whitening, make_whitening
from models.tensors import state_below
from utils.seeds import derive_seed

NAMES = ("plain", "whitened")  # what the two regressions read: h, and normalize(A₀ᵀ(h − μ₀))
TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(17))  # candidates for τ: 1, √2, 2 … 256


class RidgePair:
    """The mean of two regressions' log-probabilities over classifier rows, updated one task at a time.

    Attributes:
        whitening: of the first task for good, None before it.
        losses: ``(2, temperatures)`` for each regression the summed negative log-likelihood of all training images so
            far under each candidate for τ, each image scored when its task was the newest.

    Args:
        dim: feature width.
        width: random features of each regression.
        seed: of both projections and held-out splits.
        device: where to compute; the CPU stands in for a device without float64.
    """

    def __init__(self, dim: int, width: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.ridges = {name: RandomRidge(dim, width, derive_seed(name, seed), device) for name in NAMES}
        self.whitening: Whitening | None = None
        self.losses = torch.zeros(len(NAMES), len(TEMPERATURES), dtype=torch.float64)

    @property
    def width(self) -> int:
        """Random features of both regressions together."""
        return sum(ridge.width for ridge in self.ridges.values())

    @property
    def temperatures(self) -> list[float]:
        """The τ in use of each regression."""
        return self._temperatures().tolist()

    def _temperatures(self) -> Tensor:
        """``(2,)`` on the CPU, from where a scalar multiplies on any device."""
        return torch.tensor(TEMPERATURES, dtype=torch.float64)[self.losses.argmin(dim=1)]

    def update(self, features: Tensor, rows: Tensor, total_rows: int) -> None:
        """Learn one task: features ``(images, dim)`` of ``rows`` ``(images,)``; ``total_rows`` exist from now on.

        Raises:
            NumericError: a feature is NaN or infinite.
        """
        if self.whitening is None:
            statistics = StreamingLDA(features.shape[1], features.device)
            statistics.update(features, rows, total_rows)
            self.whitening = Whitening(*(part.to(features.device) for part in make_whitening(statistics)))
        losses = []
        for ridge, seen in zip(self.ridges.values(), self._inputs(features), strict=True):
            scores = ridge.update_leaving_one_out(seen, rows, total_rows)
            losses.append(temperature_losses(scores, rows.to(scores.device)))
        self.losses = self.losses + torch.stack(losses).cpu()

    def scores(self, features: Tensor) -> Tensor:
        """``½ Σ_k log softmax(τ_k·s_k)`` in float32: ``(samples, dim) -> (samples, rows)``."""
        parts = [
            (temperature * ridge.scores(seen)).log_softmax(dim=1)
            for temperature, ridge, seen in zip(
                self._temperatures(), self.ridges.values(), self._inputs(features), strict=True
            )
        ]
        return torch.stack(parts).mean(dim=0)

    def _inputs(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What each regression reads of ``(samples, dim)`` features."""
        if self.whitening is None:
            raise ValueError("no task has been learned yet")
        return features, F.normalize(self.whitening(features), dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """All that prediction and further learning need."""
        state = {f"{name}.{key}": value for name, r in self.ridges.items() for key, value in r.state_dict().items()}
        if self.whitening is not None:
            state |= self.whitening._asdict()
        return {**state, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the ``state_dict`` of an object with the same dim, width and seed."""
        for name, ridge in self.ridges.items():
            ridge.load_state_dict(state_below(state, name))
        device = self.ridges["plain"].projection.device
        parts = [state[name].to(device) for name in Whitening._fields if name in state]
        self.whitening = Whitening(*parts) if parts else None
        self.losses = state["losses"]


def temperature_losses(scores: Tensor, rows: Tensor) -> Tensor:
    """Summed negative log-likelihood of ``rows`` under softmax(τ·scores), for every τ in ``TEMPERATURES``.

    Shape: ``(images, rows), (images,) -> (temperatures,)``.
    """
    return torch.stack([F.cross_entropy(t * scores, rows, reduction="sum") for t in TEMPERATURES])
