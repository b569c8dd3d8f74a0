"""Classify images with a saved run: python predict.py --checkpoint tosca photo.jpg folder/ ... (or - for a list)"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import Parser, exit_process, run_command
from utils.errors import DataError, UserError

if TYPE_CHECKING:
    from models.continual import Predictions
    from utils.results.answers import Answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    hint = "what was printed is complete"
    return run_command("predict.py", lambda: _checked_run(_parser().parse_args(argv)), hint=hint)


def _checked_run(args: argparse.Namespace) -> int:
    if args.top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {args.top_k}")
    check_paths(args.paths)
    return run(args)


def _parser() -> Parser:
    parser = Parser(
        prog="predict.py",
        description="Classify images with a saved run, each by itself (sample selection).",
        epilog="Exit code: 0; 1 if an image could not be read (it is named, the rest goes on); 2 for a wrong call.",
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="images, folders (with all below), or - for one path a line on stdin")
    add("--checkpoint", type=Path, default=Path("tosca"), metavar="DIR", help="the run's checkpoint_dir (tosca)")
    add("--top-k", type=int, default=3, metavar="K", help="classes to name for each image (3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON object a line")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated values")
    add("--explain", action="store_true", help="also the entropy of every module's prediction")
    add("--features", type=Path, metavar="FILE.npy", help="also write the features, a row for each line of the answer")
    add("--backbone-weights", type=Path, metavar="FILE", help="where the run's backbone_weights are now")
    add("--device", metavar="N", help='"cpu", or the number of an accelerator; by default as the run')
    parser.set_defaults(form="table")
    return parser


def check_paths(paths: Sequence[str]) -> None:
    """What is named on the command line must be there; known before PyTorch is loaded."""
    for path in paths:
        if path != "-" and not Path(path).exists():
            raise UserError(f"{path} does not exist; give images, folders, or - for a list on standard input")


def named_paths(paths: Sequence[str]) -> Iterator[Path]:
    """The paths given, those on standard input in place of ``-``."""
    for path in paths:
        if path != "-":
            yield Path(path)
            continue
        for line in sys.stdin:
            if name := line.rstrip("\r\n"):
                yield Path(name)


def run(args: argparse.Namespace) -> int:
    """Load the run, answer image after image, return the exit code."""
    from tqdm import tqdm

    from models import ContinualClassifier
    from utils.data.folders import find_images
    from utils.progress import progress
    from utils.results.answers import FORMATS, FeatureFile

    total = None if "-" in args.paths else sum(1 for _ in find_images(named_paths(args.paths)))
    if total == 0:
        raise DataError(f"{', '.join(args.paths)}: no image there")
    model = ContinualClassifier.load(args.checkpoint, backbone_weights=args.backbone_weights, device=args.device)
    top_k = min(args.top_k, len(model.class_names))
    modules = model.tasks if model.has_modules else 0
    form = FORMATS[args.form](model.class_names, top_k=top_k, modules=modules, explain=args.explain)
    features = FeatureFile(args.features, model.backbone.feature_dim) if args.features else nullcontext()
    unreadable = 0
    files = find_images(named_paths(args.paths))
    with features, progress(total=total, unit="img") as bar:
        _print(form.head())
        for paths, predictions, errors in model.predict_files(files, top_k):
            for path, error in errors:
                unreadable += 1
                tqdm.write(f"predict.py: {error}", file=sys.stderr)
                _print(form.failed(str(path), str(error)))
            if predictions is not None:
                for answer in answers(paths, predictions):
                    _print(form.lines(answer))
                if args.features:
                    features.write(predictions.features.numpy())
            sys.stdout.flush()
            bar.update(len(paths) + len(errors))
    if unreadable:
        print(f"predict.py: {unreadable} could not be read, see above", file=sys.stderr)
    return 1 if unreadable else 0


def _print(lines: Sequence[str]) -> None:
    """To standard output, around the progress bar where both are the same screen."""
    from tqdm import tqdm

    for line in lines:
        if sys.stdout.isatty() and sys.stderr.isatty():
            tqdm.write(line, file=sys.stdout)
        else:
            sys.stdout.write(f"{line}\n")


def answers(paths: Sequence[Path], predictions: "Predictions") -> Iterator["Answer"]:
    """One dictionary of plain numbers for each image."""
    from utils.results.answers import finite_or_none

    top, shares = predictions.top.tolist(), predictions.probabilities.tolist()
    with_modules = predictions.module is not None
    for i, path in enumerate(paths):
        named = [(predictions.class_names[number], share) for number, share in zip(top[i], shares[i], strict=True)]
        yield {
            "file": str(path),
            "class": named[0][0],
            "probability": named[0][1],
            "top": named,
            "module": int(predictions.module[i]) if with_modules else None,
            "entropy": float(predictions.entropy[i]) if with_modules else None,
            "margin": finite_or_none(float(predictions.margin[i])) if with_modules else None,
            "entropies": predictions.entropies[i].tolist() if with_modules else None,
        }


if __name__ == "__main__":
    exit_process(main())
