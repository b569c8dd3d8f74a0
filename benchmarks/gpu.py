"""What an accelerator gives, in one table: forward passes, loading, copies, LuCA's steps, a whole run, peak memory.

    python -m benchmarks.gpu                        # the accelerator of this machine, under 8 minutes
    python -m benchmarks.gpu --device cpu --small   # the same lines at toy sizes: do they run?

Weights are random, images are made, nothing is downloaded. *Forward*: images a second on pixels that lie on the device,
timm's own modules in fp32 and under bf16 autocast beside this project's forward pass, with the smallest cosine to
timm's fp32. *Loading*: views a second that come out of the loaders, and out of the whole pipeline from files to the
bank, against the forward pass. *Copies*: batches that start in the memory of the host, one after the other as the
pipeline does it (copy, forward, features back, next), against a copy in a second stream while the batch before it is
computed. *Steps*: LuCA's training step by autograd, as the project does it, and recorded as a CUDA graph. *Run*:
``main.py``'s own path over 20 tasks of 5 classes and 50,000 training images, on a bank that is made by a random
projection. *Memory*: the most that tensors took on the device, on a CPU the most that the process took.
"""

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.create import create_model
from backbone.forward import PlainFeatures, TimmModel, make_features
from backbone.vit import load_backbone
from benchmarks.gpu_learning import Problem, run_seconds, step_times
from benchmarks.images import machine, make_jpegs
from benchmarks.loading import jobs_of, loader_rate
from benchmarks.pipeline import pipeline_seconds
from utils.config.config import make_config
from utils.data.datasets import load_dataset
from utils.data.transforms import Transforms
from utils.hardware import available_accelerator, default_workers, forget_peak, peak_bytes, use_full_fp32

Forward = Callable[[Tensor], Tensor]


class Sizes(NamedTuple):
    """How much is measured."""

    backbone: str
    image_size: int
    batch: int  # images in a forward pass
    batches: int  # of them in a round
    images: int  # JPEG files
    views: int  # of each of them
    loader_seconds: float
    steps: int  # of LuCA in a round
    problem: Problem


FULL = Sizes(
    *("vit_base_patch16_224", 224, 256, 8),
    *(512, 8, 5.0, 200),
    Problem(tasks=20, classes_each=5, train_each=500, test_each=100, epochs=20, dim=768),
)
SMALL = Sizes(
    *("vit_tiny_patch16_224", 32, 2, 2),
    *(4, 2, 0.1, 3),
    Problem(tasks=2, classes_each=2, train_each=6, test_each=2, epochs=2, dim=32),
)


class Line(NamedTuple):
    """A row of the table."""

    what: str
    value: str
    beside: str = ""


# -- time and memory of a device ---------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    torch.get_device_module(device).synchronize()


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Median wall time of some calls, after one that prepares what the first call prepares."""
    taken = []
    for _ in range(rounds + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


# -- the backbone ------------------------------------------------------------------------------------------------------


def forwards_of(model: TimmModel, device: torch.device) -> Iterator[tuple[str, Forward]]:
    """Every forward pass that is compared, each made when its turn comes; timm's fp32 is the first."""

    def ours(precision: str) -> Forward:
        return make_features(copy.deepcopy(model), precision=precision, normalize=False).to(device)

    yield "timm, fp32", PlainFeatures(copy.deepcopy(model), normalize=False).to(device)
    yield "forward, fp32", ours("fp32")
    yield "timm, bf16 autocast", PlainFeatures(copy.deepcopy(model), normalize=False, autocast=True).to(device)
    yield "forward, bf16", ours("bf16")


@torch.inference_mode()
def measure_forwards(sizes: Sizes, device: torch.device) -> tuple[list[Line], float]:
    """The lines, and the images a second of the plain bf16 forward."""
    model = create_model(sizes.backbone, sizes.image_size).eval()
    shape = (sizes.batch, 3, sizes.image_size, sizes.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    lines, rates = [], {}
    exact = None
    for name, forward in forwards_of(model, device):
        started = time.perf_counter()
        forget_peak(device)
        rows = forward(images)
        wait(device)
        first = time.perf_counter() - started
        rates[name] = sizes.batch / seconds(partial(forward, images), device, sizes.batches)
        megabytes = peak_bytes(device) / 1e6
        exact = rows if exact is None else exact
        cosine = F.cosine_similarity(exact, rows).min().item()
        base = rates["timm, bf16 autocast" if "bf16" in name else "timm, fp32"]
        beside = f"{rates[name] / base:.2f} x timm; cosine {cosine:.6f}; {megabytes:,.0f} MB"
        lines.append(Line(name, f"{rates[name]:,.0f} images/s", f"{beside}; first pass {first:.1f} s"))
    return lines, rates["forward, bf16"]


def in_turn(forward: Forward, host: list[Tensor], device: torch.device) -> None:
    """As the pipeline does: copy a batch, compute it, fetch its features, go on to the next."""
    for batch in host:
        forward(batch.to(device, non_blocking=True)).cpu()


def overlapped(forward: Forward, host: list[Tensor], device: torch.device) -> None:
    """A batch is copied in a stream of its own while the one before it is computed, and waits for nothing else."""
    streams = torch.get_device_module(device)
    copying, computing = streams.Stream(), streams.current_stream()
    with streams.stream(copying):
        coming = [host[0].to(device, non_blocking=True)]  # all are kept, so that no memory is used again too early
    rows = []
    for number in range(len(host)):
        computing.wait_stream(copying)  # for this batch; the next one is handed over behind this line
        if number + 1 < len(host):
            with streams.stream(copying):
                coming.append(host[number + 1].to(device, non_blocking=True))
        rows.append(forward(coming[number]))
    torch.stack(rows).cpu()


@torch.inference_mode()
def measure_copies(sizes: Sizes, device: torch.device) -> list[Line]:
    """Batches that start on the host; a device that is no CPU copies from pinned memory beside its work."""
    model = create_model(sizes.backbone, sizes.image_size).eval()
    forward = make_features(model, precision="bf16", normalize=False).to(device)
    shape = (sizes.batch, 3, sizes.image_size, sizes.image_size)
    host = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(sizes.batches)]
    pinned = host if device.type == "cpu" else [batch.pin_memory() for batch in host]
    ready = [batch.to(device) for batch in host]
    each = sizes.batches / 1000  # seconds of a round -> milliseconds of a batch
    found = {
        "copy a batch": seconds(lambda: [batch.to(device) for batch in host], device) / each,
        "copy a batch from pinned memory": seconds(
            lambda: [batch.to(device, non_blocking=True) for batch in pinned], device
        )
        / each,
        "forward of a batch": seconds(lambda: [forward(batch) for batch in ready], device) / each,
        "copy, forward, features back in turn": seconds(lambda: in_turn(forward, pinned, device), device) / each,
        "copies overlapped": seconds(lambda: overlapped(forward, pinned, device), device) / each,
    }
    alone = found["forward of a batch"]
    return [Line(name, f"{value:.2f} ms", f"{value / alone:.3f} x the forward") for name, value in found.items()]


# -- loading -----------------------------------------------------------------------------------------------------------


def measure_loading(sizes: Sizes, device: torch.device, forward_rate: float) -> list[Line]:
    """Views a second out of the loaders, and from files to the bank, against the forward pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_jpegs(Path(name), classes=1, train=sizes.images, test=1, size=(500, 375))
        values = {
            "dataset": "imagefolder",
            "init_cls": 1,
            "increment": 1,
            "data_path": str(folder),
            "backbone_type": sizes.backbone,
            "pretrained": False,
            "image_size": sizes.image_size,
            "precision": "bf16",
        }
        config = make_config(values)
        data, backbone = load_dataset(config), load_backbone(config, device)
        jobs, workers = jobs_of(data, Transforms(sizes.image_size, 0), sizes.views), max(1, default_workers())
        loaded = loader_rate(jobs, workers, True, sizes.loader_seconds)
        forwards = sizes.images * sizes.views
        forget_peak(device)
        filled = forwards / pipeline_seconds(data, backbone, sizes.image_size, forwards)
        megabytes = peak_bytes(device) / 1e6
    waits = "the loaders wait for the forward" if loaded > forward_rate else "the forward waits for the loaders"
    return [
        Line(f"loaders, {workers} processes", f"{loaded:,.0f} views/s", f"{loaded / forward_rate:.2f} x it: {waits}"),
        Line("files to bank", f"{filled:,.0f} views/s", f"{filled / forward_rate:.2f} x it; {megabytes:,.0f} MB"),
    ]


# -- all of it ---------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, list[Line]]]:
    """The parts of the table, each as soon as it is there."""
    lines, forward_rate = measure_forwards(sizes, device)
    yield "forward", lines
    yield "loading (against the bf16 forward)", measure_loading(sizes, device, forward_rate)
    yield "copies", measure_copies(sizes, device)
    times = step_times(sizes.problem.dim, sizes.steps, device)
    plain = times["by autograd"]
    yield (
        "step (50 classes, batch of 48)",
        [
            Line(name, f"{1e6 * value:,.0f} us" if isinstance(value, float) else "none", note_of_step(value, plain))
            for name, value in times.items()
        ],
    )
    forget_peak(device)
    run = [Line(phase, f"{value:.1f} s") for phase, value in run_seconds(sizes.problem, device).items()]
    yield f"run of {sizes.problem.tasks} tasks", [*run, Line("peak memory", f"{peak_bytes(device) / 1e6:,.0f} MB")]


def note_of_step(value: float | str, plain: float | str) -> str:
    if isinstance(value, float) and isinstance(plain, float):
        return f"{value / plain:.2f} x by autograd"
    return str(value)


WAITING = """
What waits for what: loaders decode and transform in processes of their own, up to two batches ahead. A batch is copied,
computed and its features fetched in one stream, so a copy waits for the batch before it; the line "copies overlapped"
says what a second stream would gain. Features are fetched before the next batch is handed over, and written to the bank
while nothing waits but the next batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:1, xpu, cpu ...; by default this machine's accelerator")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a look at whether all of it runs")
    args = parser.parse_args()
    device = torch.device(args.device) if args.device else available_accelerator()
    if device is None:
        parser.error("this machine has no accelerator that PyTorch can use; --device cpu --small runs the same lines")
    module = torch.get_device_module(device)
    if device.index is not None:
        module.set_device(device.index)  # streams, clocks and graphs are the current device's
    logging.disable()
    use_full_fp32()
    started = time.monotonic()
    card = module.get_device_name(device) if hasattr(module, "get_device_name") else "no accelerator"
    sizes = SMALL if args.small else FULL
    print(f"{card} ({device}), PyTorch {torch.__version__}, {machine()}")
    print(f"{sizes.backbone}, {sizes.image_size} px, batches of {sizes.batch}; random weights, made images\n")
    print("| part | what | value | beside |\n|---|---|---|---|")
    for part, lines in measure(sizes, device):
        for line in lines:
            print(f"| {part} | {line.what} | {line.value} | {line.beside} |", flush=True)
    print(f"{WAITING}\n\n{time.monotonic() - started:.0f} s in all; {machine()}")


if __name__ == "__main__":
    main()
