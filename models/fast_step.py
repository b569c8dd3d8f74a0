"""The training step of ``models.training``, with hand-written gradients, in less than half the time.

On ready features a step is a handful of small products, so what costs is everything around them. The gradients use the
operations that autograd uses, in its order, so that their results are its results to the last bit. All parameters lie
in one buffer, the gradient of the L1 term is a sign that is added, and nothing large is allocated after the first step.
``models.training`` compares the first step of each task with its own, and uses this one only where they agree.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from utils.config.config import Config

BLOCK = 40_960  # parameters that are updated at a time: with gradient and momentum they fit into a cache
EPSILON = 1e-12  # the shortest length by which F.normalize divides
ValueAndGradient = tuple[Tensor, Tensor]
Named = dict[str, ValueAndGradient]  # of LuCA's parameters
aten = torch.ops.aten


class CosineHead:
    """Cosine classifier and cross-entropy for ``images`` images.

    Features and rows lie in one tensor and are normalised together.

    Attributes:
        z: ``(images, dim)`` where the features belong.
    """

    def __init__(self, rows: ValueAndGradient, sigma: tuple[Tensor, Tensor | None], images: int) -> None:
        (self._rows, self._rows_gradient), (self._sigma, self._sigma_gradient) = rows, sigma
        count, dim = self._rows.shape
        empty = self._rows.new_empty
        self._joint, self._unit, self._by_unit, self._scratch = (empty(count + images, dim) for _ in range(4))
        self._length, self._divisor, self._along = (empty(count + images, 1) for _ in range(3))
        self._cosine, self._logits, self._log_p = (empty(images, count) for _ in range(3))
        self._joint_rows, self.z = self._joint.split((count, images))
        self._unit_rows, self._unit_z = self._unit.split((count, images))
        self._unit_rows_t, self._by_cosine_t = self._unit_rows.T, self._cosine.T
        self._by_unit_rows, self._by_z = self._by_unit[:count], self._by_unit[count:]
        self._scratch_rows, self._scratch_z = self._scratch.split((count, images))
        self._one = self._rows.new_ones(())

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and hits of ``z``."""
        self._joint_rows.copy_(self._rows)
        torch.linalg.vector_norm(self._joint, 2, 1, True, out=self._length)
        torch.clamp_min(self._length, EPSILON, out=self._divisor)
        torch.div(self._joint, self._divisor, out=self._unit)
        torch.mm(self._unit_z, self._unit_rows_t, out=self._cosine)
        torch.mul(self._cosine, self._sigma, out=self._logits)
        log_p = torch.log_softmax(self._logits, 1, out=self._log_p)
        loss: Tensor
        loss, self._weight = aten.nll_loss_forward(log_p, rows, None, 1, -100)
        return loss, log_p.argmax(dim=1) == rows

    def backward(self, rows: Tensor) -> Tensor:
        """The gradient by ``z``; those of rows and σ are put into their places."""
        outer = aten.nll_loss_backward(self._one, self._log_p, rows, None, 1, -100, self._weight)
        by_logits = aten._log_softmax_backward_data(outer, self._log_p, 1, outer.dtype)
        if self._sigma_gradient is not None:
            torch.sum(self._cosine.mul_(by_logits), (0, 1), out=self._sigma_gradient)
        by_cosine = torch.mul(by_logits, self._sigma, out=self._cosine)
        torch.mm(by_cosine, self._unit_rows, out=self._by_z)
        torch.mm(self._by_cosine_t, self._unit_z, out=self._by_unit_rows)
        # of x / max(|x|, ε): g / |x| − u · Σ(u / |x| · g), the second term only where |x| is not below ε
        torch.div(self._unit, self._divisor, out=self._scratch).mul_(self._by_unit)
        torch.sum(self._scratch, 1, True, out=self._along)
        self._along.mul_(torch.ge(self._length, EPSILON, out=self._length))
        self._by_unit.div_(self._divisor)
        torch.mul(self._unit, self._along, out=self._scratch)
        torch.sub(self._by_unit_rows, self._scratch_rows, out=self._rows_gradient)
        self._by_z.sub_(self._scratch_z)
        return self._by_z


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
        by_x: Tensor
        by_x, by_scale, by_shift = aten.native_layer_norm_backward(
            by_z, self._x, self._shape, self._mean, self._rstd, self._scale, self._shift, [True, True, True]
        )
        self._scale_gradient.copy_(by_scale)
        self._shift_gradient.copy_(by_shift)
        return by_x


class _Mlp:
    """Linear, GELU, linear, for ``images`` images."""

    def __init__(self, named: Named, images: int) -> None:
        (self._w0, self._w0_gradient), (self._b0, self._b0_gradient), (self._w2, self._w2_gradient), second = (
            named[f"mlp.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        self._b2, self._b2_gradient = second
        self._w0_t, self._w2_t = self._w0.T, self._w2.T
        self._inner, self._active, self._by_inner = (self._w0.new_empty(images, len(self._w0)) for _ in range(3))
        self._outer, self._by_inner_t = self._w0.new_empty(images, len(self._w2)), self._by_inner.T

    def forward(self, h: Tensor) -> Tensor:
        torch.addmm(self._b0, h, self._w0_t, out=self._inner)
        aten.gelu.out(self._inner, out=self._active)
        return torch.addmm(self._b2, self._active, self._w2_t, out=self._outer)

    def backward(self, by_outer: Tensor, h: Tensor) -> None:
        torch.mm(by_outer.T, self._active, out=self._w2_gradient)
        torch.sum(by_outer, 0, out=self._b2_gradient)
        torch.mm(by_outer, self._w2, out=self._by_inner)
        aten.gelu_backward.grad_input(self._by_inner, self._inner, grad_input=self._by_inner)
        torch.mm(self._by_inner_t, h, out=self._w0_gradient)
        torch.sum(self._by_inner, 0, out=self._b0_gradient)


class _Gate:
    """Linear, ReLU, linear, sigmoid, for ``images`` images."""

    def __init__(self, named: Named, images: int) -> None:
        (self._w0, self._w0_gradient), (self._w2, self._w2_gradient) = named["se.0.weight"], named["se.2.weight"]
        self._w0_t, self._w2_t = self._w0.T, self._w2.T
        self._inner, self._by_inner = (self._w0.new_empty(images, len(self._w0)) for _ in range(2))
        self._by_inner_t = self._by_inner.T
        self.by_gate, self._gate, self._by_x = (self._w0.new_empty(images, len(self._w2)) for _ in range(3))
        self._by_gate_t = self.by_gate.T

    def forward(self, x: Tensor) -> Tensor:
        torch.mm(x, self._w0_t, out=self._inner).relu_()
        return torch.mm(self._inner, self._w2_t, out=self._gate).sigmoid_()

    def backward(self, x: Tensor) -> None:
        """Go back from ``by_gate``, which is used up."""
        aten.sigmoid_backward.grad_input(self.by_gate, self._gate, grad_input=self.by_gate)
        torch.mm(self._by_gate_t, self._inner, out=self._w2_gradient)
        torch.mm(self.by_gate, self._w2, out=self._by_inner)
        aten.threshold_backward.grad_input(self._by_inner, self._inner, 0, grad_input=self._by_inner)
        torch.mm(self._by_inner_t, x, out=self._w0_gradient)

    def by_input(self) -> Tensor:
        """The gradient by ``x``, after ``backward``."""
        return torch.mm(self._by_inner, self._w0, out=self._by_x)


class FlowGradient(Protocol):
    """A flow (``backbone.luca.FLOWS``) with its gradients, for the images that its ``z`` has."""

    def forward(self, h: Tensor) -> None:
        """Write LuCA of ``h`` into ``z``."""

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        """Put the gradients of the parameters into their places; ``by_z`` is used up."""


class _Tosca:
    def __init__(self, named: Named, eps: float, z: Tensor) -> None:
        self._norm, self._mlp, self._gate, self._z = _Norm(named, eps), _Mlp(named, len(z)), _Gate(named, len(z)), z

    def forward(self, h: Tensor) -> None:
        self._inner = self._norm.forward(self._mlp.forward(h).add_(h))
        self._factor = self._gate.forward(self._inner)
        torch.mul(self._inner, self._factor, out=self._z)

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        torch.mul(by_z, self._inner, out=self._gate.by_gate)
        by_z.mul_(self._factor)
        self._gate.backward(self._inner)
        self._mlp.backward(self._norm.backward(by_z.add_(self._gate.by_input())), h)


class _Adapter:
    def __init__(self, named: Named, eps: float, z: Tensor) -> None:
        self._norm, self._mlp, self._z = _Norm(named, eps), _Mlp(named, len(z)), z

    def forward(self, h: Tensor) -> None:
        self._z.copy_(self._norm.forward(self._mlp.forward(h)))

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        self._mlp.backward(self._norm.backward(by_z), h)


class _Calibrator:
    def __init__(self, named: Named, eps: float, z: Tensor) -> None:
        self._gate, self._z = _Gate(named, len(z)), z

    def forward(self, h: Tensor) -> None:
        torch.mul(h, self._gate.forward(h), out=self._z)

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        torch.mul(by_z, h, out=self._gate.by_gate)
        self._gate.backward(h)


class _ToscaR:
    def __init__(self, named: Named, eps: float, z: Tensor) -> None:
        self._z, self._adapted = z, torch.empty_like(z)
        self._adapter, self._calibrator = _Adapter(named, eps, self._adapted), _Calibrator(named, eps, z)

    def forward(self, h: Tensor) -> None:
        self._calibrator.forward(h)
        self._adapter.forward(h)
        self._z.add_(self._adapted)

    def backward(self, by_z: Tensor, h: Tensor) -> None:
        self._calibrator.backward(by_z, h)
        self._adapter.backward(by_z, h)


# flows with gradients of their own; any other is trained by automatic differentiation
GRADIENTS: dict[str, Callable[[Named, float, Tensor], FlowGradient]] = {
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
        self._l1, self._luca, self._flow = config.l1, luca, GRADIENTS[luca.flow]
        self._trained = [p for p in (*luca.parameters(), *classifier.parameters()) if p.requires_grad]
        sizes = [p.numel() for p in self._trained]
        values, gradients = (luca.norm.weight.new_zeros(sum(sizes)).detach() for _ in range(2))
        of: dict[nn.Parameter, Tensor] = {}
        for parameter, value, gradient in zip(self._trained, values.split(sizes), gradients.split(sizes), strict=True):
            of[parameter] = gradient.view(parameter.shape)
            parameter.data = value.view(parameter.shape).copy_(parameter.detach())
        self._named = {name: (p.data, of[p]) for name, p in luca.named_parameters()}
        sigma = (classifier.sigma.data, of.get(classifier.sigma))
        self._classifier = ((classifier.weight.data, of[classifier.weight]), sigma)
        self._parts: dict[int, tuple[FlowGradient, CosineHead]] = {}  # by the number of images
        size, sign = sum(p.numel() for p in luca.parameters()), torch.empty_like(values[:BLOCK])
        self._values = values[:size]  # those under the penalty
        self._blocks = list(zip(values.split(BLOCK), gradients.split(BLOCK), strict=True))
        self._penalized = [
            (v, g, sign[: len(v)])
            for v, g in zip(values[:size].split(BLOCK), gradients[:size].split(BLOCK), strict=True)
        ]
        used = PARTS[luca.flow]
        self._untouched = [gradient for name, (_, gradient) in self._named.items() if not name.startswith(used)]
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
        images = len(h)
        if images not in self._parts:
            head = CosineHead(*self._classifier, images)
            self._parts[images] = (self._flow(self._named, self._luca.norm.eps, head.z), head)
        flow, head = self._parts[images]
        flow.forward(h)
        loss, hits = head.forward(rows)
        flow.backward(head.backward(rows), h)
        for gradient in self._untouched:  # of the branch that the flow does not use
            gradient.zero_()
        penalty = torch.linalg.vector_norm(self._values, 1)
        for values, gradients, sign in self._penalized:
            gradients.add_(torch.sign(values, out=sign), alpha=self._l1)
        self._update()
        return loss + self._l1 * penalty, hits

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
