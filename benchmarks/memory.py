"""(e) Peak memory of a run as images grow tenfold.

    python -m benchmarks.memory [--images 500] [--image-size 32] [--backbone vit_tiny_patch16_224]

Fills a bank in a process of its own, with its loader processes, from synthetic JPEG files, the test transform and
four views, for N and for 10 N images, and prints the peak resident memory of the process and of its largest loader.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from backbone.vit import load_backbone, resolve_device
from benchmarks.images import ROOT, machine, make_jpegs, resident_bytes
from utils.config.config import make_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.features.bank import FeatureBank
from utils.features.rows import TEST_VIEW
from utils.hardware import peak_bytes

VIEWS = 4


def fill(folder: Path, backbone_type: str, image_size: int) -> dict[str, float]:
    """Fill a bank from ``folder``; peak bytes."""
    config = make_config(
        {
            "dataset": "imagefolder",
            "init_cls": 1,
            "increment": 1,
            "data_path": str(folder),
            "backbone_type": backbone_type,
            "pretrained": False,
            "image_size": image_size,
        }
    )
    data, cache_dir = load_dataset(config), folder / "cache"
    backbone = load_backbone(config, resolve_device(config))
    before = resident_bytes()
    bank = FeatureBank(
        data,
        backbone,
        image_size=image_size,
        augment_seed=0,
        fingerprints=fingerprint_splits(data, cache_dir),
        cache_dir=cache_dir,
    )
    bank.fill([("train", TEST_VIEW), ("test", TEST_VIEW), *(("train", view) for view in range(VIEWS))])
    loader = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"forwards": bank.forwards, "before": before, "peak": peak_bytes(), "loader": loader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # this process fills
    args = parser.parse_args()
    if args.folder:
        logging.disable()
        print(json.dumps(fill(args.folder, args.backbone, args.image_size)))
        return
    print(f"start: {machine()}")
    peaks = []
    for images in (args.images, 10 * args.images):
        with tempfile.TemporaryDirectory() as folder:
            make_jpegs(Path(folder), classes=1, train=images, test=images // 10, size=(80, 64))
            options = [f"--folder={folder}", f"--backbone={args.backbone}", f"--image-size={args.image_size}"]
            command = [sys.executable, "-m", "benchmarks.memory", *options]
            found = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
        peaks.append(found["peak"])
        print(
            f"{images:6d} images, {found['forwards']:6d} forwards: peak {found['peak'] / 1e6:.0f} MB "
            f"({found['before'] / 1e6:.0f} MB before filling), largest loader process {found['loader'] / 1e6:.0f} MB",
            flush=True,
        )
    print(f"ten times the images: {peaks[1] / peaks[0]:.2f} times the memory; end: {machine()}")


if __name__ == "__main__":
    main()
