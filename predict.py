"""Classify images with a saved run: python predict.py --checkpoint tosca photo.jpg folder/ ... (or - for a list)"""

import argparse
import codecs
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(globals().get("__file__", "predict.py")).resolve().parent))  # see main.py

from utils.cli import Parser, exit_process, run_command
from utils.errors import DataError, UserError
from utils.hardware import use_full_fp32

if TYPE_CHECKING:
    from models.api.predictor import FileAnswers
    from utils.data.folders import Unused
    from utils.results.answers import FeatureFile, Form

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how lists begin that some programs of Windows write


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    hint = "what was printed is complete"
    return run_command("predict.py", lambda: _checked_run(_parser().parse_args(argv)), hint=hint)


def _checked_run(args: argparse.Namespace) -> int:
    if args.top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {args.top_k}")
    if args.max_pixels is not None and args.max_pixels < 1:
        raise UserError(f"--max-pixels must be at least 1, got {args.max_pixels}")
    if args.export:
        return _export(args)
    if not args.paths:
        raise UserError("give images, folders, or - for a list on standard input")
    check_paths(args.paths)
    use_full_fp32()  # loads PyTorch
    return run(args)


def _export(args: argparse.Namespace) -> int:
    """Write the run as one file that needs nothing of this project."""
    if args.paths:
        raise UserError("--export writes the model and answers no image: leave out the paths")
    from models import ContinualClassifier
    from models.api.export import export

    model = ContinualClassifier.load(args.checkpoint, backbone_weights=args.backbone_weights, device=args.device)
    path = export(model, args.export, args.selection)
    print(f"{path}: {model!r}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="predict.py",
        description="Classify images with a saved run, each by itself.",
        epilog="Exit code: 0; 1 if an image could not be read (it is named, the rest goes on); 2 for a wrong call.",
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="images, folders (with all below), or - for one path a line on stdin")
    add("--checkpoint", type=Path, default=Path("tosca"), metavar="DIR", help="the run's checkpoint_dir (tosca)")
    add("--top-k", type=int, default=3, metavar="K", help="classes to name for each image (3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON object a line")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="comma-separated values")
    add("--selection", metavar="NAME", help="how the module is chosen; by default as the run, if it can, else sample")
    add("--explain", action="store_true", help="also what the selection compared: each module's entropy or score")
    add("--features", type=Path, metavar="FILE.npy", help="also write the features, a row for each line of the answer")
    add("--export", type=Path, metavar="FILE", help="write the whole model as .pt2 (torch.export) or .onnx, and stop")
    add("--backbone-weights", type=Path, metavar="FILE", help="where the run's backbone_weights are now")
    add("--max-pixels", type=int, metavar="N", help="refuse larger images; by default as the run")
    add("--device", metavar="N", help='"cpu", or the number of an accelerator; by default as the run')
    parser.set_defaults(form="table")
    return parser


def check_paths(paths: Sequence[str]) -> None:
    """What is named on the command line must be there; known before PyTorch is loaded."""
    for path in paths:
        with suppress(PermissionError):  # it is named when its turn comes, and the others are answered
            if path != "-" and not Path(path).exists():
                raise UserError(f"{path} does not exist; give images, folders, or - for a list on standard input")


def named_paths(paths: Sequence[str]) -> Iterator[Path]:
    """The paths given, those on standard input in place of ``-``; names that are not UTF-8 are kept as they are."""
    for path in paths:
        if path != "-":
            yield Path(path)
            continue
        if sys.stdin is None:
            raise UserError("- reads names from standard input, which is closed; give the images themselves")
        for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin)):
            if not number and line[:2] in UTF_16:
                raise UserError("the list on standard input is UTF-16; write it as UTF-8, a path a line")
            name = os.fsdecode(line.removeprefix(codecs.BOM_UTF8) if isinstance(line, bytes) and not number else line)
            if name := name.rstrip("\r\n"):
                yield Path(name)


def run(args: argparse.Namespace) -> int:
    """Load the run, answer image after image, return the exit code."""
    from models import ContinualClassifier
    from utils.data.folders import Unused, find_images
    from utils.logs import progress
    from utils.results.answers import FORMATS, FeatureFile

    unused = Unused()
    total = None if "-" in args.paths else sum(1 for _ in find_images(named_paths(args.paths), unused))
    if total == 0:
        raise DataError(f"{', '.join(args.paths)}: no image there{unused_sentence(unused)}")
    model = ContinualClassifier.load(args.checkpoint, backbone_weights=args.backbone_weights, device=args.device)
    model.max_pixels = args.max_pixels or model.max_pixels
    selection = args.selection or model.selection
    model.learner.check_selection(selection)
    top_k = min(args.top_k, len(model.class_names))
    tasks = model.tasks if model.has_modules else 0
    shown = {"top_k": top_k, "tasks": tasks, "selection": selection, "explain": args.explain, "domains": model.domains}
    form = FORMATS[args.form](model.class_names, **shown)
    files = find_images(named_paths(args.paths), unused if total is None else Unused())
    kept = FeatureFile(args.features, model.backbone.feature_dim) if args.features else nullcontext()
    with kept as features, progress(total=total, unit="img") as bar:
        unreadable = _answer_all(model.predict_files(files, top_k, selection), form, features, bar)
    if sentence := unused_sentence(unused):
        print(f"predict.py: not used{sentence}", file=sys.stderr)
    if unreadable:
        print(f"predict.py: {unreadable} could not be read, see above", file=sys.stderr)
    return 1 if unreadable else 0


def _answer_all(batches: Iterable["FileAnswers"], form: "Form", features: "FeatureFile | None", bar: Any) -> int:
    """Write an answer for each file, in order; return how many could not be read."""
    from tqdm import tqdm

    unreadable = 0
    _print(form.head())
    for files, predictions, errors in batches:
        answers = iter(predictions.to_dicts() if predictions is not None else ())
        for place, path in enumerate(files):
            if place in errors:
                tqdm.write(f"predict.py: {errors[place]}", file=sys.stderr)
                _print(form.failed(str(path), str(errors[place])))
            else:
                _print(form.lines({"file": str(path), **next(answers)}))
        if features is not None:
            rows = predictions.features.numpy() if predictions is not None else None
            features.write(rows, [place not in errors for place in range(len(files))])
        sys.stdout.flush()
        unreadable += len(errors)
        bar.update(len(files))
    return unreadable


def unused_sentence(unused: "Unused") -> str:
    """What folders hold beside images, after a colon; empty if there is nothing."""
    sentence = unused.sentence()
    return sentence and f": {sentence}"


def _print(lines: Sequence[str]) -> None:
    """To standard output, around the progress bar where both are the same screen."""
    from tqdm import tqdm

    for line in lines:
        if sys.stdout.isatty() and sys.stderr.isatty():
            tqdm.write(line, file=sys.stdout)
        else:
            sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    exit_process(main())
