"""LuCA: an adapter and a calibrator on the final [CLS] feature (paper, section 3)."""

import torch
from torch import Tensor, nn


class LuCA(nn.Module):
    """Adapter ``norm(mlp(·))`` and calibrator ``· × se(·)``, joined by ``flow``.

    Every flow owns all parameters, also those that it does not use, so that checkpoints have one form and the
    L1 penalty reaches all of them, as in the release.

    Args:
        dim: width of the feature.
        mlp_ratio: ``dim // mlp_ratio`` is the adapter's bottleneck.
        se_ratio: ``dim // se_ratio`` is the calibrator's bottleneck.
        flow: ``tosca``, ``tosca_r``, ``adapter`` or ``calibrator``.

    Shape: ``(..., dim) -> (..., dim)``.

    Raises:
        ValueError: a ratio above ``dim``, or an unknown flow.
    """

    def __init__(self, dim: int, *, mlp_ratio: int = 16, se_ratio: int = 16, flow: str = "tosca") -> None:
        super().__init__()
        for name, ratio in (("mlp_ratio", mlp_ratio), ("se_ratio", se_ratio)):
            if not 1 <= ratio <= dim:
                raise ValueError(f"{name} must be between 1 and the feature width {dim}, got {ratio}")
        if flow not in FLOWS:
            raise ValueError(f"flow must be one of {', '.join(FLOWS)}, got {flow!r}")
        self.flow = flow
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim // mlp_ratio), nn.GELU(), nn.Linear(dim // mlp_ratio, dim))
        self.se = nn.Sequential(
            nn.Linear(dim, dim // se_ratio, bias=False),
            nn.ReLU(),
            nn.Linear(dim // se_ratio, dim, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, h: Tensor) -> Tensor:
        return FLOWS[self.flow](self, h)

    def reset_xavier(self) -> None:
        """The start of every task but the first: Xavier-uniform weights, zero biases, LayerNorm at one and zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)


def _tosca(luca: LuCA, h: Tensor) -> Tensor:
    z = luca.norm(h + luca.mlp(h))
    return z * luca.se(z)


def _tosca_r(luca: LuCA, h: Tensor) -> Tensor:
    return h * luca.se(h) + luca.norm(luca.mlp(h))


def _adapter(luca: LuCA, h: Tensor) -> Tensor:
    return luca.norm(luca.mlp(h))


def _calibrator(luca: LuCA, h: Tensor) -> Tensor:
    return h * luca.se(h)


FLOWS = {"tosca": _tosca, "tosca_r": _tosca_r, "adapter": _adapter, "calibrator": _calibrator}


def make_luca(dim: int, *, mlp_ratio: int, se_ratio: int, flow: str, first: bool, seed: int) -> LuCA:
    """A fresh LuCA: PyTorch's default initialisation for the first task, Xavier for later ones (as the release)."""
    with torch.random.fork_rng(devices=[]):  # nn.Module draws from the global generator: leave it as it was
        torch.default_generator.manual_seed(seed)
        luca = LuCA(dim, mlp_ratio=mlp_ratio, se_ratio=se_ratio, flow=flow)
        if not first:
            luca.reset_xavier()
    return luca
