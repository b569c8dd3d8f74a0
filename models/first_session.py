"""The first session: adapters in every block of the backbone are trained on the first task, then all is frozen.

McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023, Section 4,
Phase 1; Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", IJCV 2024, APER with adapter. Set
as LAMDA-PILOT sets it, with a cosine classifier that is thrown away afterwards. All is computed in fp32.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbone.adapters import adapter_state, add_adapters
from backbone.classifier import CosineClassifier, first_rows
from backbone.forward import Features, TimmModel, make_features
from models.base import OnEpoch
from models.tensors import host_values
from models.training import Epoch, check_finite, checked_mean
from utils.data.loader import load_ahead
from utils.data.splits import Split
from utils.data.transforms import Draws, Transforms
from utils.features.views import ViewsJob, load_views
from utils.runs.manifest import EpochStats
from utils.seeds import derive_seed

HINT = "lower the rate of the first session"


@dataclass(frozen=True)
class FirstSession:
    """How the adapters are trained. The defaults are LAMDA-PILOT's; for ImageNet-R it has 10 epochs, 0.05 and 0.005."""

    epochs: int = 20
    lr: float = 0.01
    weight_decay: float = 0.0005
    batch_size: int = 48


def new_session(model: TimmModel, rows: int, seed: int, *, normalize: bool) -> tuple[Features, CosineClassifier]:
    """Put new adapters into ``model``; return its fp32 forward pass and a new classifier of ``rows`` rows, σ = 1."""
    add_adapters(model, derive_seed("adapters", seed))
    device = next(model.parameters()).device
    features = make_features(model, precision="fp32", normalize=normalize).to(device)
    generator = torch.Generator().manual_seed(derive_seed("first session's classifier", seed))
    dim = getattr(model, "head_hidden_size", model.num_features)
    return features, CosineClassifier(first_rows(rows, dim, generator), torch.ones(())).to(device)


def adapt(
    features: Features,
    classifier: CosineClassifier,
    epochs: Iterable[Epoch],
    settings: FirstSession,
    seed: int,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Tensor]:
    """Train the adapters of ``features.model``, classifier and σ in place; on one device a seed gives the same bits.

    Args:
        epochs: of each epoch its batches: ``(images, 3, S, S)`` uint8 and rows ``(images,)``.
        on_epoch: is called after each epoch with its mean loss and its accuracy in training.

    Returns:
        The ``adapter_state``.

    Raises:
        NumericError: a loss, or an adapter in the end, is NaN or infinite; epoch and step are named.
    """
    device, adapters = classifier.weight.device, [block.adapter.train() for block in features.model.blocks]
    trained = [p for part in (*adapters, classifier) for p in part.parameters()]
    optimizer = torch.optim.SGD(trained, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    on_cpu = device.type == "cpu"
    attention = nullcontext() if on_cpu else sdpa_kernel(SDPBackend.MATH)  # others may add gradients in any order
    with attention, torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
        torch.manual_seed(derive_seed("dropout", seed))
        for epoch, batches in enumerate(epochs):
            losses, hits = [], []
            for pixels, on_host in batches:
                rows = on_host.to(device)
                logits = classifier(features(pixels.to(device, non_blocking=True)))
                loss = F.cross_entropy(logits, rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                hits.append(logits.detach().argmax(dim=1) == rows)
            schedule.step()
            mean = checked_mean(torch.stack(losses), epoch, HINT)
            if on_epoch is not None:
                on_epoch(epoch, EpochStats(mean, 100 * float(host_values(torch.cat(hits).double().mean()))))
    features.eval().requires_grad_(False)
    state = adapter_state(features.model)
    check_finite(state, HINT)
    return state


def shuffled_views(
    split: Split,
    images: np.ndarray,
    rows: np.ndarray,
    transforms: Transforms,
    settings: FirstSession,
    seed: int,
    num_workers: int,
) -> Iterator[Epoch]:
    """The batches of each epoch for ``adapt``, loaded ahead: all images under the epoch's view, in a fresh order.

    Args:
        split: the training images.
        images: the first task's, as numbers in ``split``.
        rows: the row of each of them.
        transforms: whose view e epoch e sees.
        num_workers: processes that load; 0 loads in a thread of this one.
    """
    row_of = dict(zip(images.tolist(), rows.tolist(), strict=True))

    def jobs() -> Iterator[ViewsJob]:
        for epoch in range(settings.epochs):
            order = np.random.default_rng(derive_seed("first session's batches", seed, epoch)).permutation(images)
            for start in range(0, len(order), settings.batch_size):
                batch = order[start : start + settings.batch_size]
                numbers = batch.tolist()
                views: list[list[tuple[int, Draws | None]]] = [
                    [(epoch, transforms.draws(split.keys[image], epoch))] for image in numbers
                ]
                yield ViewsJob("train", split.subset(batch), numbers, views, None, transforms.size)

    workers = max(1, num_workers)
    loaded = load_ahead(
        load_views, jobs(), workers=workers, ahead=2 * workers, processes=num_workers > 0, name=ViewsJob.__str__
    )
    with closing(loaded):
        for _ in range(settings.epochs):
            yield (
                (torch.from_numpy(pixels), torch.tensor([row_of[image] for image in job.rows]))
                for job, pixels in islice(loaded, -(-len(images) // settings.batch_size))
            )
