"""One training step: loss, gradients and update of a LuCA and the cosine classifier.

``AutogradStep`` is the step as PyTorch writes it. ``LucaStep`` computes the same numbers, to the last bit, in less than
half the time: on ready features a step is a handful of small products, so what costs is everything around them. Its
gradients are written by hand in the operations that autograd uses, all parameters lie in one buffer, the L1 term is a
sign added to the gradient, and nothing large is allocated after the first step.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from models.gradients import GRADIENTS, PARTS, CosineHead, FlowGradient
from utils.config.config import Config

BLOCK = 40_960  # parameters that are updated at a time: with gradient, sign and momentum they fit into a cache


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
        values, gradients = (luca.norm.weight.new_zeros(sum(sizes)).detach() for _ in range(2))
        of: dict[nn.Parameter, Tensor] = {}
        for parameter, value, gradient in zip(self._trained, values.split(sizes), gradients.split(sizes), strict=True):
            value, of[parameter] = (t[: parameter.numel()].view(parameter.shape) for t in (value, gradient))
            value.copy_(parameter.detach())
            parameter.data = value
        self._named = {name: (p.data, of[p]) for name, p in luca.named_parameters()}
        sigma = (classifier.sigma.data, of.get(classifier.sigma))
        self._classifier = ((classifier.weight.data, of[classifier.weight]), sigma)
        self._luca, self._flow = luca, GRADIENTS[luca.flow]
        self._parts: dict[int, tuple[FlowGradient, CosineHead]] = {}  # by the number of images
        flat = nn.Parameter(values)
        flat.grad = gradients
        self.optimizer = build_optimizer([flat], config)
        luca_size = sum(sizes[: len(self._named)])
        self._blocks = [
            _Block(values[at : at + BLOCK], gradients[at : at + BLOCK], max(0, min(BLOCK, luca_size - at)), config.l1)
            for at in range(0, len(values), BLOCK)
        ]
        used = PARTS[luca.flow]
        self._untouched = [gradient for name, (_, gradient) in self._named.items() if not name.startswith(used)]

    @torch.inference_mode()
    def __call__(self, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
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
        sums = [block.penalize() for block in self._blocks if block.penalized]
        self._update()
        return loss.add_(torch.stack(sums).sum(), alpha=self._l1), hits

    def _update(self) -> None:
        group = self.optimizer.param_groups[0]
        if "momentum" not in group or group["weight_decay"] or not self.optimizer.state:
            self.optimizer.step()
            return
        # what torch.optim.SGD does, block by block, so that each is read from memory once
        (state,) = self.optimizer.state.values()
        rate, momentum, velocity = -group["lr"], group["momentum"], state["momentum_buffer"]
        for block, past in zip(self._blocks, velocity.split(BLOCK), strict=True):
            past.mul_(momentum).add_(block.gradients)
            block.values.add_(past, alpha=rate)

    def finish(self) -> None:
        for parameter in self._trained:
            parameter.data = parameter.data.clone()


class _Block:
    """Some of the parameters with their gradients, few enough to stay in a cache."""

    def __init__(self, values: Tensor, gradients: Tensor, penalized: int, l1: float) -> None:
        self.values, self.gradients, self.penalized, self._l1 = values, gradients, penalized, l1
        self._luca, self._luca_gradients = values[:penalized], gradients[:penalized]
        self._sign = torch.empty_like(self._luca)

    def penalize(self) -> Tensor:
        """Add the gradient of l1 · Σ|θ| over LuCA's parameters among these; return Σ|θ|."""
        torch.sign(self._luca, out=self._sign)
        self._luca_gradients.add_(self._sign, alpha=self._l1)
        return torch.dot(self._luca, self._sign)
