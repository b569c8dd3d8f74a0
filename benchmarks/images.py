"""What several benchmarks need: image folders made on the fly, how busy the machine is, whole processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from utils.hardware import forget_peak, peak_bytes

ROOT = Path(__file__).resolve().parent.parent


def make_jpegs(root: Path, *, classes: int, train: int, test: int, size: tuple[int, int]) -> Path:
    """``train/<class>/*.jpg`` and ``test/<class>/*.jpg``: smooth shapes under grain, about as large as photographs.

    ``train`` and ``test`` are images of each class, ``size`` is (width, height).
    """
    draw = np.random.default_rng(0)
    grain = draw.normal(0, 6, (size[1], size[0], 1))
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / split / f"class{label:03d}"
            folder.mkdir(parents=True)
            for index in range(count):
                coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + np.roll(grain, index, axis=0)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06d}.jpg", quality=90)
    return root


def machine() -> str:
    """CPUs and how many processes wanted them in the last minute: above the CPU count, times are inflated."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"{os.cpu_count()} CPUs, load average {load:.1f}"


def timed_process(*arguments: str) -> float:
    """Seconds of a whole Python process from start to end; its output is shown if it fails."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True)
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return seconds


def resident_bytes() -> int:
    """The memory that this process has now: a peak that begins anew is at first what is there (Linux)."""
    forget_peak()
    return peak_bytes()
