"""``torch.compile`` for long extractions: tried on one batch, kept where it is faster and gives the same rows."""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from backbone.forward import Features
from utils.hardware import forward_threads

log = logging.getLogger(__name__)

# Seconds that the plain forward must be going to take before ``compile: auto`` spends tens of seconds on compiling.
PAYS_AFTER_SECONDS = 300.0
TRIED_FROM = 1000  # forward passes: with fewer, "auto" does not even time a batch
# Largest distance of a compiled row from the plain one, as a share of its length. Rows of both may stand in one bank:
# they differ less than this, as those of another batch size or PyTorch version do.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

Forward = Callable[[Tensor], Tensor]


def compiled(features: Features, *, mode: str | bool, forwards: int, batch: Tensor, precision: str) -> Forward:
    """The compiled forward pass of ``features`` where it pays, else ``features`` itself. Which, and why, is logged.

    Args:
        features: the plain forward pass.
        mode: ``True``: always try; ``False``: never; ``auto``: where ``forwards`` plain passes would take minutes.
        forwards: images that will be computed.
        batch: images as they will come, on the device.
        precision: ``fp32`` or ``bf16``: how far compiled rows may be from plain ones.
    """
    if mode is False or not forwards:
        return features
    if (
        mode == "auto"
        and batch.device.type == "cpu"
        and shutil.which("g++") is None
        and shutil.which("clang++") is None
    ):
        return features
    threads = forward_threads(batch.device)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # as extraction calls it

        def run(forward: Forward) -> tuple[Tensor, float]:
            return (
                pool.submit(_timed, forward, batch).result() if batch.device.type == "cpu" else _timed(forward, batch)
            )

        run(features)  # prepares what the first pass of a shape prepares
        rows, plain_s = run(features)
        expected_s = plain_s * forwards / len(batch) / threads
        if mode == "auto" and expected_s < PAYS_AFTER_SECONDS:
            return features
        started = time.monotonic()
        try:
            candidate: Forward = torch.compile(features, dynamic=False)
            run(candidate)
            took_s = time.monotonic() - started
            compiled_rows, compiled_s = run(candidate)
        except Exception as error:  # a compiler that is missing or fails: whatever it raises, the plain path remains
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("torch.compile failed (%s: %s); the plain forward pass is used", type(error).__name__, first)
            return features
    distance = ((compiled_rows - rows).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-12)).max().item()
    if not distance <= TOLERANCE[precision]:
        log.warning("torch.compile changes features by %.1e; the plain forward pass is used", distance)
        return features
    if compiled_s >= plain_s:
        log.info("torch.compile took %.1f s and is not faster; the plain forward pass is used", took_s)
        return features
    log.info(
        "torch.compile took %.1f s; a batch takes %.0f ms, by the plain forward pass %.0f ms; rows differ by %.1e",
        *(took_s, 1000 * compiled_s, 1000 * plain_s, distance),
    )
    return candidate


@torch.inference_mode()
def _timed(forward: Forward, batch: Tensor) -> tuple[Tensor, float]:
    """The rows of a batch and the seconds that they took; on a CPU those of this thread's own work."""
    clock = time.thread_time if batch.device.type == "cpu" else time.monotonic
    started = clock()
    rows = forward(batch)
    if batch.device.type != "cpu":
        torch.accelerator.synchronize(batch.device)
    return rows, clock() - started
