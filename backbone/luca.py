"""LuCA: an adapter and a calibrator on the final [CLS] feature (paper, section 3)."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
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

    def reset_default(self, generator: torch.Generator) -> None:
        """PyTorch's own initialisation of linear layers and LayerNorm, drawn from ``generator``."""
        for layer in self._linear_layers():
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        self.norm.reset_parameters()

    def reset_xavier(self, generator: torch.Generator) -> None:
        """The start of every task but the first: Xavier-uniform weights, zero biases, LayerNorm at one and zero."""
        for layer in self._linear_layers():
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.norm.reset_parameters()

    def _linear_layers(self) -> list[nn.Linear]:
        return [module for module in self.modules() if isinstance(module, nn.Linear)]


class Parts(Protocol):
    """What a flow joins: the parts of one LuCA, or of several at once."""

    @property
    def norm(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def mlp(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def se(self) -> Callable[[Tensor], Tensor]: ...


def _tosca(luca: Parts, h: Tensor) -> Tensor:
    z = luca.norm(h + luca.mlp(h))
    return z * luca.se(z)


def _tosca_r(luca: Parts, h: Tensor) -> Tensor:
    return h * luca.se(h) + luca.norm(luca.mlp(h))


def _adapter(luca: Parts, h: Tensor) -> Tensor:
    return luca.norm(luca.mlp(h))


def _calibrator(luca: Parts, h: Tensor) -> Tensor:
    return h * luca.se(h)


FLOWS: dict[str, Callable[[Parts, Tensor], Tensor]] = {
    "tosca": _tosca,
    "tosca_r": _tosca_r,
    "adapter": _adapter,
    "calibrator": _calibrator,
}


def make_luca(dim: int, *, mlp_ratio: int, se_ratio: int, flow: str, first: bool, seed: int) -> LuCA:
    """A fresh LuCA: PyTorch's default initialisation for the first task, Xavier for later ones (as the release)."""
    with torch.device("meta"):  # else its layers would draw from the global generator, which threads share
        luca = LuCA(dim, mlp_ratio=mlp_ratio, se_ratio=se_ratio, flow=flow)
    luca.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    luca.reset_default(generator)
    if not first:
        luca.reset_xavier(generator)
    return luca


def luca_stacked(parameters: Mapping[str, Tensor], h: Tensor, flow: str) -> Tensor:
    """Several LuCAs at once, as a function of nothing but its arguments.

    Args:
        parameters: LuCA's parameters by name, those of all modules stacked: ``(modules, ...)``.
        h: ``(samples, dim)`` for all of them, or ``(modules, samples, dim)``, each module's own.
        flow: as for ``LuCA``.

    Returns:
        ``(modules, samples, dim)``.
    """
    return FLOWS[flow](_Stacked(parameters), h)


class _Stacked:
    """The parts of several LuCAs, in batched products: ``([modules,] samples, dim) -> (modules, samples, dim)``."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def norm(self, z: Tensor) -> Tensor:
        scale, shift = (self._parameters[f"norm.{name}"][:, None] for name in ("weight", "bias"))
        return torch.addcmul(shift, F.layer_norm(z, z.shape[-1:]), scale)

    def mlp(self, h: Tensor) -> Tensor:
        hidden = F.gelu(self._product(h, "mlp.0") + self._parameters["mlp.0.bias"][:, None])
        return self._product(hidden, "mlp.2") + self._parameters["mlp.2.bias"][:, None]

    def se(self, z: Tensor) -> Tensor:
        return self._product(self._product(z, "se.0").relu(), "se.2").sigmoid()

    def _product(self, x: Tensor, layer: str) -> Tensor:
        weight = self._parameters[f"{layer}.weight"]  # (modules, out, in)
        if x.ndim == 3:
            return torch.bmm(x, weight.mT)
        product: Tensor = F.linear(x, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])
        return product.transpose(0, 1)
