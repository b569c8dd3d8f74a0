"""The learning part of ``benchmarks.gpu``: LuCA's steps three ways, and a whole run on a made bank."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import trainer
from backbone.classifier import CosineClassifier, first_rows
from backbone.luca import LuCA, make_luca
from models.fast_step import FastStep
from models.training import Step, build_optimizer
from utils.config.config import make_config
from utils.data.fingerprints import fingerprint_splits
from utils.data.splits import Dataset, ImageArray
from utils.ranks import ONE_RANK
from utils.runs.setup import Setup

BATCH, ROWS = 48, 50
KEYS: dict[str, Any] = {"dataset": "imagefolder", "backbone_type": "vit_base_patch16_224", "seed": [1993]}
Batch = tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """The shape of a run."""

    tasks: int
    classes_each: int
    train_each: int  # images of a class
    test_each: int
    epochs: int
    dim: int


# -- steps -------------------------------------------------------------------------------------------------------------


def learnable(dim: int, device: torch.device) -> tuple[LuCA, CosineClassifier]:
    """Always the same LuCA and classifier."""
    luca = make_luca(dim, mlp_ratio=16, se_ratio=16, flow="tosca", first=False, seed=1).to(device)
    rows = first_rows(ROWS, dim, torch.Generator().manual_seed(0))
    return luca, CosineClassifier(rows, torch.tensor(1.0)).to(device)


class GraphStep:
    """A step recorded once as a CUDA graph and replayed: one launch for all its operations, none of Python's time.

    The learning rate is part of the record, so a schedule means one record an epoch.

    Args:
        step: what to record. Recording takes three real steps on ``first``, as CUDA asks for.
        first: a batch; all others have its size.
        cuda: ``torch.cuda``.
    """

    def __init__(self, step: Step | FastStep, first: Batch, cuda: Any = torch.cuda) -> None:
        self._h, self._rows = (part.clone() for part in first)
        beside = cuda.Stream()
        beside.wait_stream(cuda.current_stream())
        with cuda.stream(beside):
            for _ in range(WARM_UP):
                step(self._h, self._rows)
        cuda.current_stream().wait_stream(beside)
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            step(self._h, self._rows)

    def __call__(self, h: Tensor, rows: Tensor) -> None:
        self._h.copy_(h)
        self._rows.copy_(rows)
        self._graph.replay()


WARM_UP = 3


def step_times(dim: int, steps: int, device: torch.device, cuda: Any = torch.cuda) -> dict[str, float | str]:
    """Seconds of a step by autograd, by hand, and recorded, the least of three rounds; a text says why there is none.

    All three take the same steps; how far the parameters of the last two end up apart stands beside them.
    """
    generator, config = torch.Generator().manual_seed(0), make_config({**KEYS, "init_cls": 5, "increment": 5})
    batches = [
        (torch.randn(BATCH, dim, generator=generator).to(device), torch.randint(ROWS, (BATCH,), generator=generator))
        for _ in range(steps)
    ]
    batches = [(h, rows.to(device)) for h, rows in batches]
    eager = learnable(dim, device)
    plain, by_hand = Step(*learnable(dim, device), config), FastStep(*eager, config, build_optimizer)
    times: dict[str, float | str] = {
        "by autograd": best_seconds(warmed(plain, batches[0]), batches, device),
        "by hand, as here": best_seconds(warmed(by_hand, batches[0]), batches, device),
    }
    if device.type != "cuda" and cuda is torch.cuda:
        return {**times, "as a CUDA graph": f"{device.type} has no CUDA graphs"}
    recorded = learnable(dim, device)
    step = FastStep(*recorded, config, build_optimizer)
    times["as a CUDA graph"] = best_seconds(GraphStep(step, batches[0], cuda), batches, device)
    pairs = zip(parameters(eager), parameters(recorded), strict=True)
    times["largest difference of a parameter"] = f"{max((a - b).abs().max().item() for a, b in pairs):.1e}"
    return times


def warmed(step: Step | FastStep, first: Batch) -> Step | FastStep:
    """The step after as many steps as a recording takes."""
    for _ in range(WARM_UP):
        step(*first)
    return step


def parameters(of: Iterable[torch.nn.Module]) -> list[Tensor]:
    return [parameter.detach() for module in of for parameter in module.parameters()]


def best_seconds(step: Callable[[Tensor, Tensor], object], batches: Sequence[Batch], device: torch.device) -> float:
    """Of one step, in the fastest of three rounds."""
    taken = []
    for _ in range(3):
        torch.get_device_module(device).synchronize()
        started = time.perf_counter()
        for h, rows in batches:
            step(h, rows)
        torch.get_device_module(device).synchronize()
        taken.append((time.perf_counter() - started) / len(batches))
    return min(taken)


# -- a whole run -------------------------------------------------------------------------------------------------------

PIXELS = 8  # side of a made image


@dataclass
class Projection:
    """A stand-in for the backbone: a random projection of the pixels (``utils.features.extraction``)."""

    device: torch.device
    feature_dim: int
    name: str = "a random projection"
    weights_sha256: str = "0" * 64
    precision: str = "fp32"
    parameters: int = 0
    flops: int = 0
    whole_flops: int = 0
    forward_ms: float = 0.0
    normalize: bool = False
    pooling: str = "token"
    variant: dict[str, str] = field(default_factory=dict)
    adapters: None = None

    def __call__(self, images: Tensor) -> Tensor:
        pixels = (images.to(self.device).float() / 255 - 0.5).flatten(1)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(pixels.shape[1], self.feature_dim, generator=generator) / pixels.shape[1] ** 0.5
        features: Tensor = pixels @ weight.to(self.device)
        return features


def made_images(problem: Problem) -> Dataset:
    """A noisy picture of its class for each image."""
    drawn, classes = np.random.default_rng(0), problem.tasks * problem.classes_each
    centres = drawn.integers(64, 192, (classes, PIXELS, PIXELS, 3))

    def split(each: int) -> ImageArray:
        labels = np.repeat(np.arange(classes), each)
        noise = drawn.normal(0, 48, (len(labels), PIXELS, PIXELS, 3))
        return ImageArray((centres[labels] + noise).clip(0, 255).astype(np.uint8), labels)

    names = tuple(f"class{number:03d}" for number in range(classes))
    return Dataset("made", split(problem.train_each), split(problem.test_each), names)


def run_seconds(problem: Problem, device: torch.device) -> dict[str, float]:
    """Seconds of the phases of a run, as its JSON has them, and of all of it."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            {
                **KEYS,
                "init_cls": problem.classes_each,
                "increment": problem.classes_each,
                "epochs": problem.epochs,
                "image_size": PIXELS,
                "train_views": 2,
                **{name: str(Path(folder) / name) for name in ("cache_dir", "checkpoint_dir", "log_dir")},
            }
        )
        data = made_images(problem)
        extractor = Projection(device, problem.dim)
        setup = Setup(config, data, extractor, fingerprint_splits(data, None), ONE_RANK)
        started = time.monotonic()
        run = trainer.run_seed(setup, config.seed[0])
        assert run is not None and run["status"] == "finished"
        return {**run["seconds"], "from start to summary": time.monotonic() - started}
