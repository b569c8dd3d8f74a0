"""Every learner on an accelerator that this machine does not have.

Under ``FakeTensorMode`` tensors have shapes and devices but no values: an operation on tensors of two devices fails as
it would on a GPU, and so does every look at a value. Answering looks at none. Learning does in one file,
``models.tensors``, and the tests stand in for it.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backbone.forward import make_features
from backbone.luca import FLOWS
from benchmarks.answers import all_answers
from models.base import Learner, Prediction, make_learner
from models.evaluation import best_classes, class_scores
from models.selection import SELECTION_BATCH
from tests.conftest import tiny_config
from utils.config.methods import METHODS

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    pytest.skip("torch 2.6 ends the process at a backward pass on a device that is absent", allow_module_level=True)

CUDA, DIM = torch.device("cuda", 0), 32
TASKS, IMAGES, NEW_ROWS, SAMPLES = 2, 6, 2, SELECTION_BATCH + 5
ROWS = TASKS * NEW_ROWS
# every method, and what runs other lines of it
VARIANTS: dict[str, dict[str, Any]] = {name: {"model_name": name} for name in METHODS}
VARIANTS |= {f"tosca, flow {flow}": {"flow": flow} for flow in FLOWS}
VARIANTS |= {f"tosca, {name}": {"optimizer": name, "scheduler": "steplr"} for name in ("adam", "adamw")}
VARIANTS["tosca, frozen rows"] = {"old_rows": "freeze", "new_rows": "prototypes", "sigma": 16.0}
VARIANTS["ranpac, whitened"] = {"model_name": "ranpac", "ranpac_whitened": True}
VARIANTS["tosca_white, few random features"] = {"model_name": "tosca_white", "white_features": 16}  # in Gram form


class FakeTask:
    """A task's features on the accelerator (``models.base.TaskData``)."""

    new_rows = NEW_ROWS

    def __init__(self, index: int) -> None:
        self.index, self.first_row = index, index * NEW_ROWS
        self.labels = torch.arange(IMAGES, device=CUDA) % NEW_ROWS + self.first_row

    def epoch(self, epoch: int) -> Tensor:
        return torch.randn(IMAGES, DIM, device=CUDA)

    def test_view(self) -> Tensor:
        return torch.randn(IMAGES, DIM, device=CUDA)

    def seen(self) -> tuple[Tensor, Tensor]:
        images = IMAGES * (self.index + 1)
        return torch.randn(images, DIM, device=CUDA), torch.zeros(images, dtype=torch.long, device=CUDA)


class OneStep:
    """In place of L-BFGS, which steers by the values of its loss."""

    def __init__(self, parameters: list[Tensor], **_: object) -> None:
        self._parameters = parameters

    def zero_grad(self) -> None:
        pass

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()


def ones(tensor: Tensor) -> np.ndarray:
    """What is seen in the place of values: everything is finite, and every mask is true."""
    assert tensor.device.type in ("cpu", "cuda")
    return np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def no_values(_: Tensor) -> NoReturn:
    raise AssertionError("this looks at values of tensors, so it would wait for the device")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], np.ndarray]], None]:
    """Replaces ``host_values`` wherever it is used."""

    def replace(look: Callable[[Tensor], np.ndarray]) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("models.") and hasattr(module, "host_values") and name != "models.tensors":
                monkeypatch.setattr(module, "host_values", look)
        monkeypatch.setattr("models.tensors.host_values", look)

    monkeypatch.setattr(torch.optim, "LBFGS", OneStep)
    return replace


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(nn.Module, "to_empty", lambda module, *, device: moved(module, device))
    monkeypatch.setattr(Tensor, "backward", lambda _: None)  # autograd's engine asks for the driver
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """``nn.Module.to`` with new parameters: fake ones cannot be changed in place."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return module


def features() -> Tensor:
    return torch.randn(SAMPLES, DIM, device=CUDA)


def learned(variant: str) -> Learner:
    learner = make_learner(tiny_config(**VARIANTS[variant], epochs=2), DIM, CUDA, seed=0)
    for index in range(TASKS):
        learner.learn(FakeTask(index))
    return learner


def check(prediction: Prediction) -> None:
    assert prediction.scores.shape == (SAMPLES, ROWS)
    tensors = [value for value in vars(prediction).values() if value is not None]
    assert {tensor.device for tensor in tensors} == {CUDA} and {len(tensor) for tensor in tensors} == {SAMPLES}
    of_class = class_scores(prediction.scores, np.arange(ROWS) // 2)
    assert best_classes(of_class).device == CUDA and of_class.shape == (SAMPLES, ROWS // 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_learning_and_answering_stay_on_the_device(variant, fake, looks):
    looks(ones)
    learner = learned(variant)
    counts = learner.parameter_counts()
    looks(no_values)
    for selection in learner.selections:
        check(learner.answer(features(), selection))
    true_task, order = torch.zeros(SAMPLES, dtype=torch.long, device=CUDA), torch.randperm(SAMPLES).to(CUDA)
    for prediction in (
        *all_answers(learner, features()).values(),
        *all_answers(learner, features(), true_task, order).values(),
    ):
        check(prediction)
    assert counts["classifier"] > 0


@pytest.mark.parametrize("variant", [*METHODS, "ranpac, whitened"])
def test_a_saved_learner_is_restored_on_the_device(variant, fake, looks):
    looks(ones)
    learner = learned(variant)
    states = [learner.module_state(task) for task in range(TASKS)]
    modules = [{name: t.cpu() for name, t in state.items()} for state in states if state is not None]
    restored = make_learner(learner.config, DIM, CUDA, seed=0)
    restored.load_state_dict({name: tensor.cpu() for name, tensor in learner.state_dict().items()}, modules)
    looks(no_values)
    for selection in restored.selections:
        check(restored.answer(features(), selection))
    looks(ones)
    restored.learn(FakeTask(TASKS))


def test_every_method_and_selection_is_among_them():
    tried = {(keys.get("model_name", "tosca"), s) for keys in VARIANTS.values() for s in selections_of(keys)}
    assert {name for name, _ in tried} == set(METHODS)
    declared = {
        (method.name, selection if isinstance(selection, str) else selection.name)
        for method in METHODS.values()
        for selection in method.selections
    }
    assert declared - tried == {("tosca", "batch")}  # looks at 48 samples at a time: in predict alone


def selections_of(keys: dict[str, Any]) -> tuple[str, ...]:
    return make_learner(tiny_config(**keys), DIM, torch.device("cpu"), seed=0).selections


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("vit_tiny_patch16_224", "fp32"),
        ("vit_tiny_patch16_224", "bf16"),
        ("deit_tiny_distilled_patch16_224", "fp32"),  # in bf16 it runs under autocast, which needs the device itself
    ],
)
def test_the_forward_stays_on_the_device(model, precision, normalize, monkeypatch):
    """Weights are prepared on the CPU and moved, as ``backbone.vit`` does; the second model takes timm's own path."""
    vit = timm.create_model(model, img_size=32, num_classes=0, depth=2).eval().requires_grad_(False)
    forward = make_features(vit, precision=precision, normalize=normalize)
    monkeypatch.setattr(nn.Module, "to", moved)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = forward.to(CUDA)(torch.zeros(3, 3, 32, 32, dtype=torch.uint8, device=CUDA))
    assert rows.device == CUDA and rows.dtype == torch.float32 and rows.shape == (3, vit.num_features)
