"""Write the shipped digits as image folders, material for the tutorial: FOLDER/train/<digit>/*.png and FOLDER/test/...

python assets/source/export_digits.py FOLDER [--classes 0-7]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: the project is one folder up

from utils.config.config import make_config
from utils.data.datasets import load_dataset


def export(folder: Path, classes: range) -> int:
    """Write the images of ``classes`` below ``folder``; return how many."""
    # the keys that are not about data have no effect here
    data = load_dataset(make_config({"dataset": "digits", "backbone_type": "none", "init_cls": 1, "increment": 1}))
    written = 0
    for name in ("train", "test"):
        split = data.split(name)
        for index, label in enumerate(split.labels.tolist()):
            if label in classes:
                path = folder / name / data.class_names[label] / f"{split.keys[index]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                split.load(index).save(path)
                written += 1
    return written


def _digit_range(text: str) -> range:
    first, _, last = text.partition("-")
    digits = range(int(first), int(last or first) + 1)
    if not digits or digits.start < 0 or digits.stop > 10:
        raise ValueError
    return digits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the shipped digits as image folders.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=_digit_range, default=range(10), metavar="0-7", help="which digits (0-9)")
    args = parser.parse_args()
    print(f"{args.folder}: {export(args.folder, args.classes)} images of {len(args.classes)} classes")


if __name__ == "__main__":
    main()
