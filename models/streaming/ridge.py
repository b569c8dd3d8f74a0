"""Ridge regression on random features from streamed statistics, no exemplars.

McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023,
Section 4 and Algorithm 1: h = relu(Pᵀx) with a fixed normal P, W = (G + λI)⁻¹C with G = Σ hhᵀ and C = Σ hyᵀ, and λ
the power of ten with the smallest squared error on a held-out fifth of the task's training data.
Deviation: the paper takes λ from the newest task alone. Here the held-out errors of all tasks so far are added, which
costs one number for each λ, is less noisy for small tasks, and does not depend on the order of the tasks.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.streaming.lda import finite_float64, float64_device, grown
from models.tensors import host_values, packed, places, unpacked

RIDGES = tuple(10.0**power for power in range(-8, 10))
FIT_SHARE = 0.8  # of a task's images; the others judge the candidates for λ
PREDICT_BATCH = 1024  # samples whose random features are in memory at one time
STATE = ("images", "held_out_error", "statistic", "statistic_targets", "weight")


class RandomRidge:
    """One-hot ridge regression on ``width`` random ReLU features, updated one task at a time.

    ``G`` has two exact forms. While the images so far are few (``k <= width / 4``), a root ``R`` ``(k, width)`` with
    ``G = RᵀR`` is kept, rotated so that its rows are no image's features; solving costs ``O(k² · width)``. Afterwards
    ``G`` itself is kept, and solving is one Cholesky factorisation, ``width³ / 3`` multiplications.
    Memory in float64: at most ``width²`` numbers (800 MB for 10,000), two to three times that while solving, and the
    random features of the newest task while updating. The projection is drawn again from the seed, never stored.

    Args:
        dim: feature width.
        width: number of random features, the paper's M.
        seed: of the projection and the held-out split.
        device: where to compute; the CPU stands in for a device without float64 in all but the projection.
    """

    def __init__(self, dim: int, width: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = float64_device(device)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers for every device
        self.projection = torch.randn(dim, width, generator=generator).to(device)
        self.images = torch.zeros(0, dtype=torch.long, device=self.device)  # (rows,) how many each has
        self.held_out_error = torch.zeros(len(RIDGES), dtype=torch.float64, device=self.device)
        # Root form: R and B with G = RᵀR and C = RᵀB. Gram form: G and C. The number of rows tells which.
        self.statistic = torch.zeros(0, width, dtype=torch.float64, device=self.device)  # (k or width, width)
        self.statistic_targets = torch.zeros(0, 0, dtype=torch.float64, device=self.device)  # (k or width, rows)
        self.weight = torch.zeros(width, 0, dtype=torch.float64, device=self.device)  # (width, rows)

    @property
    def width(self) -> int:
        """Number of random features."""
        return self.projection.shape[1]

    @property
    def ridge(self) -> float:
        """The λ in use; the smallest while no task had the two images that a choice needs."""
        return RIDGES[int(host_values(self.held_out_error.argmin()))]

    def update(self, features: Tensor, rows: Tensor, total_rows: int) -> None:
        """Learn one task: features ``(images, dim)`` of ``rows`` ``(images,)``; ``total_rows`` exist from now on.

        Raises:
            NumericError: a feature is NaN or infinite.
        """
        self._learn(features, rows, total_rows)

    def update_leaving_one_out(self, features: Tensor, rows: Tensor, total_rows: int) -> Tensor:
        """Learn one task as ``update`` does, and score each of its images by a regression without that image.

        The regression on all other images so far, of every task, under the same λ; in closed form:
        ``(ŷ − H·y) / (1 − H)`` with ``H = hᵀ(G + λI)⁻¹h`` of the image.

        Shape: ``(images, dim), (images,) -> (images, rows)`` float64.
        """
        hidden, targets, own, factor = self._learn(features, rows, total_rows)
        if own is None:  # Gram form: LLᵀ = G + λI, so H = |L⁻¹h|²
            leverage = torch.linalg.solve_triangular(factor, hidden.T, upper=False).square().sum(dim=0)
            least = self.ridge / (self.ridge + hidden.square().sum(dim=1))  # 1 − H is never less, but for rounding
            residual, rest = targets - hidden @ self.weight, (1 - leverage).maximum(least)
        else:  # with h = Rᵀa and aᵀa = 1: 1 − H = λ·aᵀ(RRᵀ + λI)⁻¹a, and y − ŷ = λ·aᵀ(RRᵀ + λI)⁻¹B; λ cancels
            solved = torch.cholesky_solve(own.T, factor)  # (k, images)
            residual, rest = solved.T @ self.statistic_targets, (own.T * solved).sum(dim=0)
        scores: Tensor = targets - residual / rest[:, None]
        return scores

    def _learn(self, features: Tensor, rows: Tensor, total_rows: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Learn one task.

        Returns:
            Its random features ``(images, width)``, its one-hot targets ``(images, rows)``, in root form the images in
            the root's coordinates (see ``_accumulate``), and the Cholesky factor of the system that was solved.
        """
        rows = rows.to(self.device)
        hidden = self._expand(finite_float64(features, self.device))
        targets = F.one_hot(rows, total_rows).double()
        self.images = grown(self.images, total_rows) + targets.sum(dim=0).long()
        self.held_out_error = self.held_out_error + self._held_out_errors(hidden, targets)
        own = self._accumulate(hidden, targets)
        self.weight, factor = self._solve()
        return hidden, targets, own, factor

    def scores(self, features: Tensor) -> Tensor:
        """``Wᵀh`` in float32: ``(samples, dim) -> (samples, rows)``; ``-inf`` for rows without images."""
        whole = torch.compiler.is_compiling()  # the number of samples is a symbol then: no batches of them
        batches = [features] if whole else features.split(PREDICT_BATCH)
        parts = [self._expand(part) @ self.weight for part in batches]
        return torch.cat(parts).masked_fill(self.images == 0, -torch.inf).float().to(features.device)

    def _expand(self, features: Tensor) -> Tensor:
        """Random features ``relu(Pᵀx)``, made in float32, kept in float64: ``(images, dim) -> (images, width)``."""
        return (features.float().to(self.projection.device) @ self.projection).relu().to(self.device).double()

    def _held_out_errors(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed squared error on a held-out fifth, for each λ: ``(images, width), (images, rows) -> (ridges,)``.

        Only this task's statistics are used, as in the paper. The same for all λ where there is nothing to fit.
        """
        count = int(FIT_SHARE * len(hidden))
        # Images come sorted by class as likely as not, so the split is drawn.
        order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        targets = targets[:, places(targets.any(dim=0))]  # all other rows have zero weights and zero error
        fit, judge = order[:count], order[count:]
        return ridge_path_errors(hidden[fit], targets[fit], hidden[judge], targets[judge])

    def _accumulate(self, hidden: Tensor, targets: Tensor) -> Tensor | None:
        """Add ``(images, width)`` and ``(images, rows)`` to the statistics.

        Returns:
            In root form ``a`` ``(images, k)`` of unit length with ``hidden = a @ R``; in Gram form None.
        """
        cross = F.pad(self.statistic_targets, (0, targets.shape[1] - self.statistic_targets.shape[1]))
        if self._is_gram:
            self.statistic = torch.addmm(self.statistic, hidden.T, hidden)
            self.statistic_targets = torch.addmm(cross, hidden.T, targets)
            return None
        root, root_targets = torch.cat([self.statistic, hidden]), torch.cat([cross, targets])
        if len(root) > self.width // 4:  # from here on one Cholesky of G is cheaper
            self.statistic, self.statistic_targets = root.T @ root, root.T @ root_targets
            return None
        rotation, self.statistic = torch.linalg.qr(root)
        self.statistic_targets = rotation.T @ root_targets
        own: Tensor = rotation[len(rotation) - len(hidden) :]
        return own

    @property
    def _is_gram(self) -> bool:
        return len(self.statistic) == self.width

    def _solve(self) -> tuple[Tensor, Tensor]:
        """``W = (G + λI)⁻¹C`` ``(width, rows)``; in root form the same as ``Rᵀ(RRᵀ + λI)⁻¹B``.

        Returns:
            ``W``, and the Cholesky factor of ``G + λI`` or ``RRᵀ + λI``.
        """
        kernel = self.statistic.clone() if self._is_gram else self.statistic @ self.statistic.T
        kernel.diagonal().add_(max(self.ridge, smallest_ridge(kernel)))
        factor = torch.linalg.cholesky(kernel)
        solution = torch.cholesky_solve(self.statistic_targets, factor)
        return (solution if self._is_gram else self.statistic.T @ solution), factor

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of ``STATE``, all that prediction and further learning need; ``G`` is packed."""
        state: dict[str, Tensor] = {name: getattr(self, name) for name in STATE}
        return {**state, "statistic": packed(self.statistic)} if self._is_gram else state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the ``state_dict`` of an object with the same dim, width and seed; other keys are left alone.

        Of ``G`` the lower triangle alone is ever read, so what is restored goes on to the same bits. Earlier versions
        saved all of it.
        """
        for name in STATE:
            setattr(self, name, state[name].to(self.device))
        if self.statistic.dim() == 1:
            self.statistic = unpacked(self.statistic, self.width)


def ridge_path_errors(fit: Tensor, fit_targets: Tensor, judge: Tensor, judge_targets: Tensor) -> Tensor:
    """Summed squared error on ``judge`` of the ridge regression on ``fit``, for every λ in ``RIDGES``: ``(ridges,)``.

    One eigendecomposition serves all λ, of the smaller of ``HHᵀ`` ``(n, n)`` and ``HᵀH`` ``(width, width)``.

    Args:
        fit, judge: random features ``(n, width)``, ``(m, width)``.
        fit_targets, judge_targets: ``(n, rows)``, ``(m, rows)``.
    """
    if len(fit) <= fit.shape[1]:
        values, vectors = torch.linalg.eigh(fit @ fit.T)
        left, right = judge @ fit.T @ vectors, vectors.T @ fit_targets
    else:
        values, vectors = torch.linalg.eigh(fit.T @ fit)
        left, right = judge @ vectors, vectors.T @ (fit.T @ fit_targets)
    least = smallest_ridge(values.diag())
    values = values.clamp(min=0)  # negative by rounding only
    errors = [
        (left @ (right / (values + max(ridge, least))[:, None]) - judge_targets).square().sum() for ridge in RIDGES
    ]
    return torch.stack(errors)


def smallest_ridge(kernel: Tensor) -> float:
    """The least λ that float64 can tell from zero beside ``(size, size)`` ``kernel``, which may be singular."""
    return len(kernel) * torch.finfo(kernel.dtype).eps * float(host_values(kernel.trace()))
