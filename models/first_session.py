"""The first session: adapters in every block of the backbone are trained on the first task, then all is frozen.

McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023, Section 4,
Phase 1; Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, APER with adapter. Set
as LAMDA-PILOT sets it, with a cosine classifier that is thrown away afterwards. All is computed in fp32.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbone.adapters import Adapters, adapter_state, add_adapters
from backbone.classifier import CosineClassifier, first_rows
from backbone.forward import Features, TimmModel, make_features
from backbone.vit import Backbone, build_backbone
from models.training import Epoch, check_finite, checked_mean
from utils.config.config import Config
from utils.data.loader import load_ahead
from utils.data.splits import Split
from utils.data.transforms import Transforms
from utils.errors import CheckpointError
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.features.extraction import ViewsJob, load_views
from utils.features.rows import View
from utils.logs import progress
from utils.runs.checkpoint import CheckpointFolder, load_tensors, save_tensors
from utils.runs.setup import Setup, Start
from utils.seeds import derive_seed

BATCH = 48
PASS = 3  # forward passes in the time in which an image is trained with: forward and backward, all tokens to the end
HINT = "lower the rate of the first session: first_session_lr"


def new_session(model: TimmModel, rows: int, seed: int, *, normalize: bool) -> tuple[Features, CosineClassifier]:
    """Put new adapters into ``model``; return its fp32 forward pass and a new classifier of ``rows`` rows, σ = 1."""
    add_adapters(model, derive_seed("adapters", seed))
    device = next(model.parameters()).device
    features = make_features(model, precision="fp32", normalize=normalize).to(device)
    generator = torch.Generator().manual_seed(derive_seed("first session's classifier", seed))
    dim = getattr(model, "head_hidden_size", model.num_features)
    return features, CosineClassifier(first_rows(rows, dim, generator), torch.ones(())).to(device)


def adapt(
    features: Features, classifier: CosineClassifier, epochs: Iterable[Epoch], config: Config, seed: int
) -> Adapters:
    """Train the adapters of ``features.model``, classifier and σ in place; on one device a seed gives the same bits.

    Args:
        epochs: of each epoch its batches: ``(images, 3, S, S)`` uint8 and rows ``(images,)``.

    Raises:
        NumericError: a loss, or an adapter in the end, is NaN or infinite; epoch and step are named.
    """
    device, adapters = classifier.weight.device, [block.adapter.train() for block in features.model.blocks]
    trained = [p for part in (*adapters, classifier) for p in part.parameters()]
    decay = config.first_session_weight_decay
    optimizer = torch.optim.SGD(trained, lr=config.first_session_lr, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.first_session_epochs)
    on_cpu = device.type == "cpu"
    attention = nullcontext() if on_cpu else sdpa_kernel(SDPBackend.MATH)  # others may add gradients in any order
    with attention, torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
        torch.manual_seed(derive_seed("dropout", seed))
        for epoch, batches in enumerate(epochs):
            losses = []
            for pixels, rows in batches:
                logits = classifier(features(pixels.to(device, non_blocking=True)))
                loss = F.cross_entropy(logits, rows.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            schedule.step()
            checked_mean(torch.stack(losses), epoch, HINT)
    features.eval().requires_grad_(False)
    state = adapter_state(features.model)
    check_finite(state, HINT)
    return state


def shuffled_views(images: Split, rows: np.ndarray, config: Config, seed: int, num_workers: int) -> Iterator[Epoch]:
    """The batches of each epoch for ``adapt``, loaded ahead: all images, in a fresh order; epoch e sees view e.

    A bar shows the steps.

    Args:
        images: of the first task alone.
        rows: the row of each of them.
        num_workers: processes that load; 0 loads in a thread of this one.
    """
    transforms = Transforms(config.image_size, config.view_seed(seed))

    def jobs() -> Iterator[ViewsJob]:
        for epoch in range(config.first_session_epochs):
            order = np.random.default_rng(derive_seed("first session's batches", seed, epoch)).permutation(len(rows))
            for batch in np.split(order, range(BATCH, len(rows), BATCH)):
                yield ViewsJob(
                    "train",
                    images.subset(batch),
                    batch.tolist(),
                    [[(epoch, transforms.draws(images.keys[image], epoch))] for image in batch],
                    None,
                    transforms.size,
                )

    steps, workers = -(-len(rows) // BATCH), max(1, num_workers)
    total = config.first_session_epochs * steps
    loaded = load_ahead(load_views, jobs(), workers=workers, ahead=2 * workers, processes=num_workers > 0)
    with closing(loaded), progress(loaded, total=total, desc="First session", unit="step", leave=False) as bar:
        ready = iter(bar)
        for _ in range(config.first_session_epochs):
            yield ((torch.from_numpy(pixels), torch.from_numpy(rows[job.rows])) for job, pixels in islice(ready, steps))


# -- the first session of a run ---------------------------------------------------------------------------------------


def adapted_to(
    config: Config, device: torch.device, images: Split, rows: np.ndarray, seed: int, num_workers: int
) -> Adapters:
    """Adapters trained on ``images``, those of the first task, whose rows are 0, 1, …"""
    model = build_backbone(config, device, "fp32").model  # a new one: bf16 takes over what it is given
    features, classifier = new_session(model, int(rows.max()) + 1, seed, normalize=config.normalize)
    return adapt(features, classifier, shuffled_views(images, rows, config, seed, num_workers), config, seed)


def run_adapters(setup: Setup, seed: int, start: Start | None) -> Adapters | None:
    """Those of a run: saved ones, or trained now on rank 0; ``start`` is what the run was found to go on from."""
    adapters = saved_adapters(setup, seed, start) if setup.ranks.first else None
    if setup.ranks.first and adapters is None:
        images, rows, path = first_task(setup, seed)
        device, num_workers = setup.backbone.device, setup.bank(seed).num_workers
        adapters = adapted_to(setup.config, device, images, rows, seed, num_workers)
        if path:
            save_tensors(path, adapters)
    shared: Adapters | None = setup.ranks.share(adapters)
    return shared


def saved_adapters(setup: Setup, seed: int, start: Start | None = None) -> Adapters | None:
    """From the run's own folder, that of the run which it continues, or an earlier run with the same first task."""
    if setup.base:
        return CheckpointFolder(setup.base.folder).load_session(setup.base.manifest)
    if start and (adapters := start.source.load_session(start.manifest)):
        return adapters
    path = first_task(setup, seed)[2]
    with suppress(CheckpointError):  # there is none, or it is damaged
        return load_tensors(path) if path else None
    return None


def first_task(setup: Setup, seed: int) -> tuple[Split, np.ndarray, Path | None]:
    """The images of the first task, their rows, and where below ``cache_dir`` all runs keep the adapters of these."""
    c, task, cache_dir = setup.config, setup.stream(seed).tasks[0], resolve_cache_dir(setup.config.cache_dir)
    settings = [c.first_session_epochs, c.first_session_lr, c.first_session_weight_decay, c.image_size, c.normalize]
    images = [setup.fingerprints["train"], task.train.tolist(), task.train_rows.tolist(), c.view_seed(seed)]
    identity = json.dumps([settings, images, seed, setup.backbone.weights_sha256, setup.backbone.pooling])
    name = f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pth"
    path = cache_dir / "first_sessions" / name if cache_dir else None
    return setup.data.train.subset(task.train), task.train_rows, path


def planned(setup: Setup, before: set[Path]) -> tuple[list[FeatureBank], int]:
    """For each seed the bank of the features with adapters; as long as how many forward passes training those takes.

    Args:
        before: what an earlier run of the same start will have saved; this run's adapters are added.
    """
    banks, passes, plain = [], 0, setup.backbone
    for seed in setup.config.seed:
        adapted, (_, rows, path) = (
            with_adapters(setup.config, plain, saved_adapters(setup, seed)),
            first_task(setup, seed),
        )
        if adapted.adapters is None:
            adapted = replace(plain, weights_sha256=str(path))  # a bank of its own, in which nothing is yet
            passes += 0 if path in before else PASS * setup.config.first_session_epochs * len(rows)
            before |= {path} if path else set()
        banks.append(setup.bank(seed, (adapted.parts or [adapted])[-1]))
    return banks, passes


# -- what reads the adapters ------------------------------------------------------------------------------------------


class SideBySide(Features):
    """``(images, 2 · dim)``: the plain backbone's features, then those with adapters."""

    def __init__(self, plain: Features, adapted: Features) -> None:
        super().__init__()
        self.plain, self.adapted = plain, adapted
        object.__setattr__(self, "model", adapted.model)  # not a further part of this module

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.plain(images), self.adapted(images)], dim=1)


def with_adapters(config: Config, plain: Backbone, adapters: Adapters | None) -> Backbone:
    """The backbone whose features the method of ``config`` reads: ``plain`` with ``adapters``, if there are any."""
    plain = plain.parts[0] if plain.parts else plain
    adapted = build_backbone(config, plain.device, plain.precision, adapters) if adapters else plain
    if not config.method.plain_too:
        return adapted
    return replace(
        adapted,
        feature_dim=2 * plain.feature_dim,
        ready=None,
        build=lambda: replace(adapted, ready=SideBySide(plain.features, adapted.features)),
        parts=(plain, adapted),
    )


class Banks:
    """The banks of a backbone's parts; what is read of them are features one behind the other.

    Args:
        backbone: what ``with_adapters`` made.
    """

    def __init__(self, setup: Setup, seed: int, backbone: Backbone) -> None:
        self.banks = [setup.bank(seed, part) for part in backbone.parts or (backbone,)]

    def missing(self, wanted: Sequence[View]) -> int:
        return sum(bank.missing(wanted) for bank in self.banks)

    def fill(self, wanted: Sequence[View]) -> None:
        for bank in self.banks:
            bank.fill(wanted)

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([bank.read(split, view, rows) for bank in self.banks], axis=1)
