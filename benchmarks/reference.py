"""(b) A first and a second run against recomputing as the release does, whole processes from start to end.

    python -m benchmarks.reference --data FOLDER --backbone vit_small_patch14_dinov2 --weights FILE --image-size 98

The reference is the plain loop that users have today: no feature is ever kept. Each training batch passes the ViT in
each epoch; so does each task's training set once more for the class means; and each test batch passes it once *for
each stored module* after each task. It runs in fp32 through timm's own forward pass, with a DataLoader that augments
and the same number of loader processes. The first run is ``main.py`` with an empty feature bank, the second the same
command with ``--fresh`` and the bank that the first left; both at the precision that ``--precision`` says. All learn
the same tasks, for the same epochs, with a fresh view in each epoch.

Without ``--data``, on synthetic JPEGs; without ``--weights``, a random ViT (speed does not depend on its weights).
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from backbone.classifier import CosineClassifier, first_rows
from backbone.luca import LuCA, make_luca
from backbone.vit import load_backbone, resolve_device
from benchmarks.images import machine, make_jpegs, timed_process
from models.selection import entropy
from models.tosca import class_means
from models.training import build_optimizer, build_schedule
from utils.config.config import Config, load_config
from utils.data.datasets import load_dataset
from utils.data.tasks import Task, make_stream
from utils.hardware import default_workers


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Some images of a split under a transform, with their rows."""

    def __init__(self, split: Any, numbers: Any, rows: Any, transform: T.Compose) -> None:
        self.split, self.numbers, self.rows, self.transform = split, numbers, rows, transform

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        pixels: Tensor = self.transform(self.split.load(int(self.numbers[item])))
        return pixels, int(self.rows[item])


class ReferenceLoop:
    """TOSCA with one forward pass of the ViT per module, batch and epoch."""

    def __init__(self, config: Config) -> None:
        self.config, self.data = config, load_dataset(config)
        self.vit = load_backbone(config, resolve_device(config)).model
        self.stream, self.dim = make_stream(self.data, config, config.seed[0]), self.vit.num_features
        self.forwards = 0
        self.workers = default_workers() if config.num_workers is None else config.num_workers
        size = config.image_size
        self.train_transform = T.Compose(
            [T.RandomResizedCrop(size, (0.05, 1.0)), T.RandomHorizontalFlip(), T.ToTensor()]
        )
        resize = T.Resize(int(256 / 224 * size), InterpolationMode.BICUBIC)
        self.test_transform = T.Compose([resize, T.CenterCrop(size), T.ToTensor()])

    def run(self) -> list[float]:
        """Top-1 accuracy under ``sample`` after each task."""
        modules: list[LuCA] = []
        classifier: CosineClassifier | None = None
        curve = []
        for task in self.stream.tasks:
            rows = torch.zeros(len(task.rows), self.dim)
            if classifier is None:
                classifier = CosineClassifier(first_rows(len(rows), self.dim, torch.Generator()), torch.tensor(1.0))
            else:
                classifier = classifier.grown(rows)
            modules.append(self._learn(task, classifier))
            curve.append(self._evaluate(modules, classifier, task.index))
        return curve

    def _features(self, pixels: Tensor) -> Tensor:
        self.forwards += len(pixels)
        with torch.no_grad():
            features: Tensor = self.vit.forward_head(self.vit.forward_features(pixels), pre_logits=True)
        return features

    def _batches(
        self, split: str, numbers: Any, rows: Any, transform: T.Compose, shuffle: bool
    ) -> DataLoader[tuple[Tensor, int]]:
        images = Images(self.data.split(split), numbers, rows, transform)
        return DataLoader(images, self.config.batch_size, shuffle=shuffle, num_workers=self.workers)

    def _learn(self, task: Task, classifier: CosineClassifier) -> LuCA:
        config = self.config
        luca = make_luca(
            self.dim,
            mlp_ratio=config.mlp_ratio,
            se_ratio=config.se_ratio,
            flow=config.flow,
            first=not task.index,
            seed=0,
        )
        optimizer = build_optimizer([*luca.parameters(), *classifier.parameters()], config)
        schedule = build_schedule(optimizer, config)
        for _ in range(config.epochs):
            for pixels, rows in self._batches("train", task.train, task.train_rows, self.train_transform, True):
                l1 = torch.cat([p.flatten() for p in luca.parameters()]).abs().sum()
                loss = F.cross_entropy(classifier(luca(self._features(pixels))), rows) + config.l1 * l1
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if schedule is not None:
                schedule.step()
        with torch.no_grad():
            batches = self._batches("train", task.train, task.train_rows, self.test_transform, False)
            found = torch.cat([luca(self._features(pixels)) for pixels, _ in batches])
            rows = torch.from_numpy(task.train_rows) - task.rows.start
            classifier.weight[task.rows.start :] = class_means(found, rows, len(task.rows))
        return luca

    @torch.no_grad()
    def _evaluate(self, modules: Sequence[nn.Module], classifier: CosineClassifier, index: int) -> float:
        hits = total = 0
        for task in self.stream.tasks[: index + 1]:
            for pixels, classes in self._batches("test", task.test, task.test_classes, self.test_transform, False):
                logits = torch.stack([classifier(luca(self._features(pixels))) for luca in modules])
                module = entropy(logits).argmin(dim=0)
                hits += int((logits[module, torch.arange(len(classes))].argmax(dim=1) == classes).sum())
                total += len(classes)
        return 100 * hits / total


def _config_file(folder: Path, args: argparse.Namespace) -> Path:
    data = args.data or make_jpegs(folder / "images", classes=12, train=30, test=10, size=(500, 375))
    classes = sum(path.is_dir() for path in (data / "train").iterdir())
    step = -(-classes // args.tasks)
    values = {
        "dataset": "imagefolder",
        "data_path": str(data),
        "init_cls": step,
        "increment": step,
        "backbone_type": args.backbone,
        "image_size": args.image_size,
        "pretrained": False,
        "backbone_weights": str(args.weights.resolve()) if args.weights else None,
        "device": ["-1"],
        "epochs": args.epochs,
        "precision": args.precision,
        **{key: str(folder / key) for key in ("cache_dir", "checkpoint_dir", "log_dir")},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), help="folder with train/ and test/")
    parser.add_argument("--weights", type=Path, help="of the backbone; else random")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4, help="and augmented views")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of main.py's runs")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)  # this process is the reference
    args = parser.parse_args()
    if args.loop:
        loop = ReferenceLoop(load_config(args.loop, ["precision=fp32"]))
        print(json.dumps({"curve": loop.run(), "forwards": loop.forwards}))
        return
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        config = _config_file(Path(folder), args)
        print(f"start: {machine()}", flush=True)
        seconds = {}
        seconds["first run"] = timed_process("main.py", f"--config={config}")
        seconds["second run"] = timed_process("main.py", f"--config={config}", "--fresh")
        print(f"{seconds}; {machine()}", flush=True)
        seconds["reference"] = timed_process("-m", "benchmarks.reference", f"--loop={config}")
        runs = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("log_dir/**/*.json"))]
    for name, taken in seconds.items():
        print(f"{name:12}{taken:10.1f} s   reference / this: {seconds['reference'] / taken:6.1f}")
    print(f"backbone forwards of main.py: {sorted(run['backbone_forwards'] for run in runs)}; end: {machine()}")


if __name__ == "__main__":
    main()
