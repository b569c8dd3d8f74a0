"""One training step: loss, gradients and update of a LuCA and the cosine classifier.

``AutogradStep`` is the step as PyTorch writes it. ``LucaStep`` computes the same numbers, to the last bit, in less than
half the time: on ready features a step is a handful of small products, so what costs is everything around them. Its
gradients are written by hand in the operations that autograd uses, all parameters lie in one buffer, the L1 term is a
sign added to the gradient, and nothing large is allocated after the first step.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from utils.config import Config

EPSILON = 1e-12  # the shortest length by which F.normalize divides
aten = torch.ops.aten


class Step(Protocol):
    """Takes a step on features ``(images, dim)`` of rows ``(images,)``.

    Returns:
        The loss before the step, a scalar, and whether each image's own row had the largest logit, ``(images,)``.
    """

    optimizer: torch.optim.Optimizer

    def __call__(self, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]: ...

    def finish(self) -> None:
        """Give the module and the classifier tensors of their own."""


def make_step(module: nn.Module, classifier: CosineClassifier, config: Config) -> Step:
    """The fastest step that there is for them."""
    trained = all(p.requires_grad for p in (*module.parameters(), classifier.weight))
    if type(module) is LuCA and type(classifier) is CosineClassifier and module.flow in GRADIENTS and trained:
        return LucaStep(module, classifier, config)
    return AutogradStep(module, classifier, config)


def build_optimizer(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The optimiser that the config names; SGD has momentum 0.9."""
    rate, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[config.optimizer](parameters, lr=rate, weight_decay=decay)


def l1_norm(values: Tensor) -> Tensor:
    """Σ|θ|, a scalar."""
    norm: Tensor = torch.linalg.vector_norm(values, 1)
    return norm


class AutogradStep:
    """The step for any module and flow, by automatic differentiation."""

    def __init__(self, module: nn.Module, classifier: CosineClassifier, config: Config) -> None:
        self._module, self._classifier, self._l1 = module, classifier, config.l1
        trained = [p for p in (*module.parameters(), *classifier.parameters()) if p.requires_grad]
        self.optimizer = build_optimizer(trained, config)

    def __call__(self, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._classifier(self._module(h))
        penalty = l1_norm(torch.cat([p.flatten() for p in self._module.parameters()]))
        loss = F.cross_entropy(logits, rows) + self._l1 * penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach().argmax(dim=1) == rows

    def finish(self) -> None:
        pass


class LucaStep:
    """The step with hand-written gradients.

    Parameters and gradients lie in one buffer each: first LuCA's, then σ if it is trained, then the rows.
    """

    def __init__(self, luca: LuCA, classifier: CosineClassifier, config: Config) -> None:
        self._l1 = config.l1
        self._trained = [*luca.parameters(), *(p for p in classifier.parameters() if p.requires_grad)]
        self._trained.sort(key=lambda p: p is classifier.weight)  # last, so that σ does not shift what comes after it
        sizes = [-(-p.numel() // 16) * 16 for p in self._trained]  # each begins where vector instructions like it
        self._values, self._gradients = (luca.norm.weight.new_zeros(sum(sizes)).detach() for _ in range(2))
        gradients: dict[nn.Parameter, Tensor] = {}
        pieces = zip(self._trained, self._values.split(sizes), self._gradients.split(sizes), strict=True)
        for parameter, value, gradient in pieces:
            value, gradient = (t[: parameter.numel()].view(parameter.shape) for t in (value, gradient))
            value.copy_(parameter.detach())
            parameter.data, gradients[parameter] = value, gradient
        luca_size = sum(sizes[: len(list(luca.parameters()))])
        self._luca, self._luca_gradient = self._values[:luca_size], self._gradients[:luca_size]
        self._sign = torch.empty_like(self._luca)
        named = {name: (p.data, gradients[p]) for name, p in luca.named_parameters()}
        used = PARTS[luca.flow]
        self._untouched = [gradient for name, (_, gradient) in named.items() if not name.startswith(used)]
        self._flow = GRADIENTS[luca.flow](named, luca.norm.eps)
        sigma = classifier.sigma
        self._head = _Head(classifier.weight.data, gradients[classifier.weight], sigma.data, gradients.get(sigma))
        flat = nn.Parameter(self._values)
        flat.grad = self._gradients
        self.optimizer = build_optimizer([flat], config)

    @torch.inference_mode()
    def __call__(self, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        z = self._head.input(len(h))
        self._flow.forward(h, z)
        loss, hits = self._head.forward(z, rows)
        loss = loss + self._l1 * l1_norm(self._luca)
        self._flow.backward(self._head.backward(z, rows), h)
        for gradient in self._untouched:  # of the branch that the flow does not use
            gradient.zero_()
        torch.sign(self._luca, out=self._sign)
        self._luca_gradient.add_(self._sign, alpha=self._l1)
        self.optimizer.step()
        return loss, hits

    def finish(self) -> None:
        for parameter in self._trained:
            parameter.data = parameter.data.clone()


class _Buffers:
    """Tensors that are made once for each shape and used again."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._made: dict[tuple[str, int, int], Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        key = (name, rows, columns)
        if key not in self._made:
            self._made[key] = self._like.new_empty(rows, columns)
        return self._made[key]


class _Head:
    """Cosine classifier and cross-entropy. Features and rows are normalised together, in one tensor."""

    def __init__(self, rows: Tensor, rows_gradient: Tensor, sigma: Tensor, sigma_gradient: Tensor | None) -> None:
        self._rows, self._rows_gradient = rows, rows_gradient
        self._sigma, self._sigma_gradient = sigma, sigma_gradient
        self._buffer = _Buffers(rows)
        self._one = rows.new_ones(())

    def input(self, images: int) -> Tensor:
        """Where the features belong: ``(images, dim)``."""
        return self._joint("joint", images)[len(self._rows) :]

    def _joint(self, name: str, images: int) -> Tensor:
        return self._buffer(name, len(self._rows) + images, self._rows.shape[1])

    def forward(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and hits of ``z``, which lies in ``input``."""
        images, count = len(z), len(self._rows)
        joint, unit, buffer = self._joint("joint", images), self._joint("unit", images), self._buffer
        joint[:count].copy_(self._rows)
        length = torch.linalg.vector_norm(joint, 2, 1, True, out=buffer("length", len(joint), 1))
        torch.div(joint, torch.clamp_min(length, EPSILON, out=buffer("divisor", len(joint), 1)), out=unit)
        cosine = torch.mm(unit[count:], unit[:count].T, out=buffer("cosine", images, count))
        logits = torch.mul(cosine, self._sigma, out=buffer("logits", images, count))
        log_p = torch.log_softmax(logits, 1, out=buffer("log_p", images, count))
        loss: Tensor
        loss, self._weight = aten.nll_loss_forward(log_p, rows, None, 1, -100)
        return loss, log_p.argmax(dim=1) == rows

    def backward(self, z: Tensor, rows: Tensor) -> Tensor:
        """The gradient by ``z``; those of rows and σ are put into their places."""
        images, count = len(z), len(self._rows)
        buffer, unit, cosine = self._buffer, self._joint("unit", images), self._buffer("cosine", images, count)
        log_p = buffer("log_p", images, count)
        outer = aten.nll_loss_backward(self._one, log_p, rows, None, 1, -100, self._weight)
        by_logits = aten._log_softmax_backward_data(outer, log_p, 1, log_p.dtype)
        if self._sigma_gradient is not None:
            torch.sum(torch.mul(by_logits, cosine, out=cosine), (0, 1), out=self._sigma_gradient)
        by_cosine = torch.mul(by_logits, self._sigma, out=cosine)
        by_unit = self._joint("by_unit", images)
        torch.mm(by_cosine, unit[:count], out=by_unit[count:])
        torch.mm(by_cosine.T, unit[count:], out=by_unit[:count])
        # of x / max(|x|, ε): g / |x| − u · Σ(u / |x| · g), the second term only where |x| is not below ε
        length, divisor = buffer("length", len(unit), 1), buffer("divisor", len(unit), 1)
        scratch = torch.div(unit, divisor, out=self._joint("scratch", images)).mul_(by_unit)
        along = torch.sum(scratch, 1, True, out=buffer("along", len(unit), 1))
        along.mul_(torch.ge(length, EPSILON, out=length))
        by_unit.div_(divisor)
        torch.mul(unit, along, out=scratch)
        torch.sub(by_unit[:count], scratch[:count], out=self._rows_gradient)
        return by_unit[count:].sub_(scratch[count:])


Named = dict[str, tuple[Tensor, Tensor]]  # parameter and its gradient, by name


class _Norm:
    """LayerNorm."""

    def __init__(self, named: Named, eps: float) -> None:
        (self._scale, self._scale_gradient), (self._shift, self._shift_gradient) = (
            named[f"norm.{name}"] for name in ("weight", "bias")
        )
        self._shape, self._eps = self._scale.shape, eps

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        z, self._mean, self._rstd = torch.native_layer_norm(x, self._shape, self._scale, self._shift, self._eps)
        return z

    def backward(self, by_z: Tensor) -> Tensor:
        """The gradient by ``x``."""
        statistics, parameters = (self._mean, self._rstd), (self._scale, self._shift)
        by_x: Tensor
        by_x, by_scale, by_shift = aten.native_layer_norm_backward(
            by_z, self._x, self._shape, *statistics, *parameters, [True, True, True]
        )
        self._scale_gradient.copy_(by_scale)
        self._shift_gradient.copy_(by_shift)
        return by_x


class _Mlp:
    """Linear, GELU, linear."""

    def __init__(self, named: Named) -> None:
        self._w0, self._b0, self._w2, self._b2 = (
            named[f"mlp.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        self._buffer = _Buffers(self._w0[0])

    def forward(self, h: Tensor) -> Tensor:
        inner = self._buffer("inner", len(h), len(self._w0[0]))
        torch.addmm(self._b0[0], h, self._w0[0].T, out=inner)
        active = aten.gelu.out(inner, out=self._buffer("active", *inner.shape))
        return torch.addmm(self._b2[0], active, self._w2[0].T, out=self._buffer("outer", len(h), len(self._w2[0])))

    def backward(self, by_outer: Tensor, h: Tensor) -> None:
        inner, active = (self._buffer(name, len(h), len(self._w0[0])) for name in ("inner", "active"))
        torch.mm(by_outer.T, active, out=self._w2[1])
        torch.sum(by_outer, 0, out=self._b2[1])
        by_inner = torch.mm(by_outer, self._w2[0], out=active)
        aten.gelu_backward.grad_input(by_inner, inner, grad_input=by_inner)
        torch.mm(by_inner.T, h, out=self._w0[1])
        torch.sum(by_inner, 0, out=self._b0[1])


class _Gate:
    """Linear, ReLU, linear, sigmoid."""

    def __init__(self, named: Named) -> None:
        self._w0, self._w2 = named["se.0.weight"], named["se.2.weight"]
        self._buffer = _Buffers(self._w0[0])

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.mm(x, self._w0[0].T, out=self._buffer("inner", len(x), len(self._w0[0]))).relu_()
        return torch.mm(inner, self._w2[0].T, out=self._buffer("gate", len(x), len(self._w2[0]))).sigmoid_()

    def backward(self, by_gate: Tensor, x: Tensor) -> Tensor:
        """The gradient by the input of the first layer's output; ``by_gate`` is used up."""
        inner, gate = self._buffer("inner", len(x), len(self._w0[0])), self._buffer("gate", *x.shape)
        aten.sigmoid_backward.grad_input(by_gate, gate, grad_input=by_gate)
        torch.mm(by_gate.T, inner, out=self._w2[1])
        by_inner = torch.mm(by_gate, self._w2[0], out=self._buffer("by_inner", *inner.shape))
        aten.threshold_backward.grad_input(by_inner, inner, 0, grad_input=by_inner)
        torch.mm(by_inner.T, x, out=self._w0[1])
        return by_inner

    def by_input(self, by_inner: Tensor) -> Tensor:
        """The gradient by ``x``."""
        return torch.mm(by_inner, self._w0[0], out=self._buffer("by_x", len(by_inner), self._w0[0].shape[1]))


class FlowGradient(Protocol):
    """A flow (``backbone.luca.FLOWS``) with its gradients."""

    def forward(self, h: Tensor, z: Tensor) -> None:
        """Write LuCA of ``h`` into ``z``."""

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        """Put the gradients of the parameters into their places; ``by_z`` is used up."""


class _Tosca:
    def __init__(self, named: Named, eps: float) -> None:
        self._norm, self._mlp, self._gate = _Norm(named, eps), _Mlp(named), _Gate(named)

    def forward(self, h: Tensor, z: Tensor) -> None:
        self._inner = self._norm.forward(self._mlp.forward(h).add_(h))
        self._factor = self._gate.forward(self._inner)
        torch.mul(self._inner, self._factor, out=z)

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        by_inner = self._gate.by_input(self._gate.backward(by_z * self._inner, self._inner))
        by_inner.add_(by_z.mul_(self._factor))
        self._mlp.backward(self._norm.backward(by_inner), h)


class _Adapter:
    def __init__(self, named: Named, eps: float) -> None:
        self._norm, self._mlp = _Norm(named, eps), _Mlp(named)

    def forward(self, h: Tensor, z: Tensor) -> None:
        z.copy_(self._norm.forward(self._mlp.forward(h)))

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        self._mlp.backward(self._norm.backward(by_z), h)


class _Calibrator:
    def __init__(self, named: Named, eps: float) -> None:
        self._gate = _Gate(named)

    def forward(self, h: Tensor, z: Tensor) -> None:
        torch.mul(h, self._gate.forward(h), out=z)

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        self._gate.backward(by_z * h, h)


class _ToscaR:
    def __init__(self, named: Named, eps: float) -> None:
        self._adapter, self._calibrator = _Adapter(named, eps), _Calibrator(named, eps)
        self._buffer = _Buffers(named["mlp.0.weight"][0])

    def forward(self, h: Tensor, z: Tensor) -> None:
        self._calibrator.forward(h, z)
        adapted = self._buffer("adapted", *h.shape)
        self._adapter.forward(h, adapted)
        z.add_(adapted)

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        self._calibrator.backward(by_z, h)
        self._adapter.backward(by_z, h)


# flows with gradients of their own; for any other, autograd finds them
GRADIENTS: dict[str, Callable[[Named, float], FlowGradient]] = {
    "tosca": _Tosca,
    "tosca_r": _ToscaR,
    "adapter": _Adapter,
    "calibrator": _Calibrator,
}
# the parts of LuCA that they use
PARTS = {
    "tosca": ("norm", "mlp", "se"),
    "tosca_r": ("norm", "mlp", "se"),
    "adapter": ("norm", "mlp"),
    "calibrator": ("se",),
}
