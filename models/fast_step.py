"""The training step of ``models.training``, with hand-written gradients, in about half the time.

On ready features a step is a handful of small products, so what costs is everything around them. The gradients use the
operations that autograd uses, in its order, so that their results are its results to the last bit. All parameters lie
in one buffer, and the gradient of the L1 term is a sign that is added. ``models.training`` compares the first step of
each task with its own, and uses this one only where they agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from utils.config.config import Config

BLOCK = 40_960  # parameters that are updated at a time: with gradient and momentum they fit into a cache
EPSILON = 1e-12  # the shortest length by which F.normalize divides
Named = dict[str, Tensor]  # LuCA's parameters, or the tensors that take their gradients
aten = torch.ops.aten


# -- the parts of LuCA: a result with what going back needs; going back from the gradient by that result ---------------


def norm(p: Named, x: Tensor) -> tuple[Tensor, Any]:
    """LayerNorm."""
    z, mean, rstd = torch.native_layer_norm(x, p["norm.weight"].shape, p["norm.weight"], p["norm.bias"], 1e-5)
    return z, (x, mean, rstd)


def norm_back(p: Named, g: Named, by: Tensor, kept: Any) -> Tensor:
    x, mean, rstd = kept
    scale, shift = p["norm.weight"], p["norm.bias"]
    by_x: Tensor
    by_x, by_scale, by_shift = aten.native_layer_norm_backward(by, x, scale.shape, mean, rstd, scale, shift, [True] * 3)
    g["norm.weight"].copy_(by_scale)
    g["norm.bias"].copy_(by_shift)
    return by_x


def mlp(p: Named, h: Tensor) -> tuple[Tensor, Any]:
    """Linear, GELU, linear."""
    inner = torch.addmm(p["mlp.0.bias"], h, p["mlp.0.weight"].T)
    active = F.gelu(inner)
    return torch.addmm(p["mlp.2.bias"], active, p["mlp.2.weight"].T), (inner, active)


def mlp_back(p: Named, g: Named, by: Tensor, h: Tensor, kept: Any) -> None:
    inner, active = kept
    torch.mm(by.T, active, out=g["mlp.2.weight"])
    torch.sum(by, 0, out=g["mlp.2.bias"])
    by_inner = aten.gelu_backward(torch.mm(by, p["mlp.2.weight"]), inner)
    torch.mm(by_inner.T, h, out=g["mlp.0.weight"])
    torch.sum(by_inner, 0, out=g["mlp.0.bias"])


def gate(p: Named, x: Tensor) -> tuple[Tensor, Any]:
    """Linear, ReLU, linear, sigmoid."""
    inner = torch.mm(x, p["se.0.weight"].T).relu_()
    return torch.mm(inner, p["se.2.weight"].T).sigmoid_(), inner


def gate_back(p: Named, g: Named, by: Tensor, x: Tensor, factor: Tensor, inner: Tensor) -> Tensor:
    """Go back from the gradient by the gate; what comes back is that by its bottleneck."""
    by = aten.sigmoid_backward(by, factor)
    torch.mm(by.T, inner, out=g["se.2.weight"])
    by_inner: Tensor = aten.threshold_backward(torch.mm(by, p["se.2.weight"]), inner, 0)
    torch.mm(by_inner.T, x, out=g["se.0.weight"])
    return by_inner


# -- the flows (backbone.luca.FLOWS) -----------------------------------------------------------------------------------


def tosca(p: Named, h: Tensor) -> tuple[Tensor, Any]:
    adapted, of_mlp = mlp(p, h)
    z, of_norm = norm(p, adapted.add_(h))
    factor, inner = gate(p, z)
    return z * factor, (of_mlp, of_norm, z, factor, inner)


def tosca_back(p: Named, g: Named, by: Tensor, h: Tensor, kept: Any) -> None:
    of_mlp, of_norm, z, factor, inner = kept
    by_inner = gate_back(p, g, by * z, z, factor, inner)
    by_z = torch.mul(by, factor).add_(torch.mm(by_inner, p["se.0.weight"]))
    mlp_back(p, g, norm_back(p, g, by_z, of_norm), h, of_mlp)


def adapter(p: Named, h: Tensor) -> tuple[Tensor, Any]:
    adapted, of_mlp = mlp(p, h)
    z, of_norm = norm(p, adapted)
    return z, (of_mlp, of_norm)


def adapter_back(p: Named, g: Named, by: Tensor, h: Tensor, kept: Any) -> None:
    mlp_back(p, g, norm_back(p, g, by, kept[1]), h, kept[0])


def calibrator(p: Named, h: Tensor) -> tuple[Tensor, Any]:
    factor, inner = gate(p, h)
    return h * factor, (factor, inner)


def calibrator_back(p: Named, g: Named, by: Tensor, h: Tensor, kept: Any) -> None:
    gate_back(p, g, by * h, h, *kept)


def tosca_r(p: Named, h: Tensor) -> tuple[Tensor, Any]:
    calibrated, of_calibrator = calibrator(p, h)
    adapted, of_adapter = adapter(p, h)
    return calibrated.add_(adapted), (of_calibrator, of_adapter)


def tosca_r_back(p: Named, g: Named, by: Tensor, h: Tensor, kept: Any) -> None:
    calibrator_back(p, g, by, h, kept[0])
    adapter_back(p, g, by, h, kept[1])


class Flow(NamedTuple):
    """A flow with its gradients, and the first letters of the parameters that it uses."""

    forward: Callable[[Named, Tensor], tuple[Tensor, Any]]
    backward: Callable[[Named, Named, Tensor, Tensor, Any], None]
    used: tuple[str, ...]


# any other flow is trained by automatic differentiation
GRADIENTS = {
    "tosca": Flow(tosca, tosca_back, ("norm", "mlp", "se")),
    "tosca_r": Flow(tosca_r, tosca_r_back, ("norm", "mlp", "se")),
    "adapter": Flow(adapter, adapter_back, ("norm", "mlp")),
    "calibrator": Flow(calibrator, calibrator_back, ("se",)),
}


# -- the whole step ----------------------------------------------------------------------------------------------------


def normalize_back(by_unit: Tensor, unit: Tensor, length: Tensor, divisor: Tensor) -> Tensor:
    """Of x / max(|x|, ε): g / |x| − u · Σ(u / |x| · g), the second term only where |x| is not below ε; uses both up."""
    along = (unit / divisor).mul_(by_unit).sum(1, keepdim=True).mul_(length >= EPSILON)
    return by_unit.div_(divisor).sub_(unit.mul_(along))


class FastStep:
    """A step on a LuCA and a classifier, whose parameters are views of one buffer until ``finish``.

    Parameters and gradients lie in one buffer each: LuCA's, then the rows, then σ if it is trained.
    """

    def __init__(
        self,
        luca: LuCA,
        classifier: CosineClassifier,
        config: Config,
        build_optimizer: Callable[[list[nn.Parameter], Config], torch.optim.Optimizer],
    ) -> None:
        self._l1, self._flow = config.l1, GRADIENTS[luca.flow]
        self._trained = [p for p in (*luca.parameters(), *classifier.parameters()) if p.requires_grad]
        sizes = [p.numel() for p in self._trained]
        values, gradients = (luca.norm.weight.new_zeros(sum(sizes)).detach() for _ in range(2))
        of: dict[nn.Parameter, Tensor] = {}
        for parameter, value, gradient in zip(self._trained, values.split(sizes), gradients.split(sizes), strict=True):
            of[parameter] = gradient.view(parameter.shape)
            parameter.data = value.view(parameter.shape).copy_(parameter.detach())
        self._named = {name: p.data for name, p in luca.named_parameters()}
        self._of_named = {name: of[p] for name, p in luca.named_parameters()}
        self._rows, self._of_rows = classifier.weight.data, of[classifier.weight]
        self._sigma, self._of_sigma = classifier.sigma.data, of.get(classifier.sigma)
        size, sign = sum(p.numel() for p in luca.parameters()), torch.empty_like(values[:BLOCK])
        self._penalized = values[:size]
        self._blocks = list(zip(values.split(BLOCK), gradients.split(BLOCK), strict=True))
        self._luca_blocks = [
            (v, g, sign[: len(v)])
            for v, g in zip(values[:size].split(BLOCK), gradients[:size].split(BLOCK), strict=True)
        ]
        self._untouched = [g for name, g in self._of_named.items() if not name.startswith(self._flow.used)]
        flat = nn.Parameter(values)
        flat.grad = gradients
        self.optimizer = build_optimizer([flat], config)

    @staticmethod
    def knows(module: nn.Module, classifier: CosineClassifier) -> bool:
        """Whether there are gradients for such a module, all of whose parameters are trained."""
        trained = all(p.requires_grad for p in (*module.parameters(), classifier.weight))
        return type(module) is LuCA and type(classifier) is CosineClassifier and module.flow in GRADIENTS and trained

    @torch.inference_mode()
    def __call__(self, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As ``models.training.Step``: loss and hits of features ``(images, dim)``."""
        z, kept = self._flow.forward(self._named, h)
        joint = torch.cat([self._rows, z])  # rows and features are normalised together
        length = torch.linalg.vector_norm(joint, 2, 1, True)
        divisor = length.clamp_min(EPSILON)
        unit = joint.div_(divisor)
        unit_rows, unit_z = unit.split((len(self._rows), len(z)))
        cosine = torch.mm(unit_z, unit_rows.T)
        log_p = torch.log_softmax(cosine * self._sigma, 1)
        loss, weight = aten.nll_loss_forward(log_p, rows, None, 1, -100)

        outer = aten.nll_loss_backward(torch.ones_like(loss), log_p, rows, None, 1, -100, weight)
        by_logits = aten._log_softmax_backward_data(outer, log_p, 1, outer.dtype)
        if self._of_sigma is not None:
            torch.sum(by_logits * cosine, (0, 1), out=self._of_sigma)
        by_cosine = by_logits * self._sigma
        by_unit = torch.empty_like(unit)
        torch.mm(by_cosine.T, unit_z, out=by_unit[: len(self._rows)])
        torch.mm(by_cosine, unit_rows, out=by_unit[len(self._rows) :])
        by_rows, by_z = normalize_back(by_unit, unit, length, divisor).split((len(self._rows), len(z)))
        self._of_rows.copy_(by_rows)
        self._flow.backward(self._named, self._of_named, by_z, h, kept)
        for gradient in self._untouched:  # of the branch that the flow does not use
            gradient.zero_()
        penalty = torch.linalg.vector_norm(self._penalized, 1)
        for values, gradients, sign in self._luca_blocks:
            gradients.add_(torch.sign(values, out=sign), alpha=self._l1)
        self._update()
        return loss + self._l1 * penalty, log_p.argmax(dim=1) == rows

    def _update(self) -> None:
        """Let the optimiser step; what plain SGD does is done block by block, so that each is read from memory once."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state
        others = ("weight_decay", "dampening", "nesterov", "maximize")
        if not state or type(self.optimizer) is not torch.optim.SGD or any(group[name] for name in others):
            self.optimizer.step()
            return
        velocity = next(iter(state.values()))["momentum_buffer"]
        for (values, gradients), past in zip(self._blocks, velocity.split(BLOCK), strict=True):
            values.add_(past.mul_(group["momentum"]).add_(gradients), alpha=-group["lr"])

    def finish(self) -> None:
        """Give the module and the classifier tensors of their own."""
        for parameter in self._trained:
            parameter.data = parameter.data.clone()
