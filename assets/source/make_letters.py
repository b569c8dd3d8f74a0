"""Render letters of scripts that the shipped ViT never saw into a folder of images, as a data set for studies.

The letters are those that ``make_glyphs_vit.py`` keeps for measuring only: Hebrew and Georgian, from open fonts, bent
and brought to the 8x8 form of the digits by its functions. Font families are split: no family has both training and
test images. The pictures are a function of the fonts and the seed.

    sudo apt-get install culmus culmus-fancy fonts-bpg-georgian fonts-dejavu-extra fonts-freefont-otf fonts-sil-ezra
    python assets/source/make_letters.py --out letters
    python main.py --config=exps/tosca_demo.json dataset=imagefolder data_path=letters init_cls=10 increment=10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_glyphs_vit import CLASSES, NOVEL, TRAINED, Glyphs, drop_unreadable, fill_box, find_fonts, ink, render_fonts
from PIL import Image
from torch import Tensor

TEST_SHARE = 4  # every so many-th family of a script is for testing


def is_test_family(glyphs: Glyphs) -> Tensor:
    """Mark the glyphs of every fourth family, in the order of their names: bool ``[N]``."""
    present = glyphs.family.unique().tolist()  # sorted, as the names are
    return torch.isin(glyphs.family, torch.tensor(present[::TEST_SHARE]))


def draw(glyphs: Glyphs) -> Tensor:
    """Bend each letter at random and count its ink as in the UCI digits: uint8 ``[N, 8, 8]``, 0 to 255."""
    parts = []
    for part in torch.arange(len(glyphs.label)).split(256):
        box = fill_box(ink(glyphs.outline[part], glyphs.skeleton[part]))
        share = F.avg_pool2d((box > 0.5).float()[:, None], 4)[:, 0]
        parts.append((share * 255).round().to(torch.uint8))
    return torch.cat(parts)


def write_split(glyphs: Glyphs, folder: Path, copies: int) -> list[int]:
    """Write ``copies`` drawings of each glyph below ``folder``, one folder a class; return the images of each class."""
    many = glyphs.subset(torch.arange(len(glyphs.label)).repeat(copies))
    counts = [0] * len(NOVEL)
    for image, label in zip(draw(many).numpy(), many.label.tolist(), strict=True):
        letter = CLASSES[label]
        target = folder / f"U+{ord(letter):04X}"
        target.mkdir(parents=True, exist_ok=True)
        number = label - len(TRAINED)
        Image.fromarray(np.asarray(image)).save(target / f"{counts[number]:04d}.png")
        counts[number] += 1
    return counts


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Render letters that the shipped ViT never saw into <out>/train and <out>/test.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--fonts", type=Path, nargs="+", default=[Path("/usr/share/fonts")], help="searched for fonts")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--copies", type=int, default=3, help="drawings of each glyph, each bent in its own way")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bends")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    return parser.parse_args()


def main() -> None:
    """Render, split by font family, draw, write."""
    args = parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists; give the name of a new folder")
    torch.manual_seed(args.seed)
    glyphs = drop_unreadable(render_fonts(find_fonts(args.fonts), args.workers))
    novel = glyphs.subset(glyphs.label >= len(TRAINED))
    test = is_test_family(novel)
    for name, part in (("train", novel.subset(~test)), ("test", novel.subset(test))):
        counts = write_split(part, args.out / name, args.copies)
        families = len(part.family.unique())
        print(f"{name}: {sum(counts)} images of {families} families, {min(counts)} to {max(counts)} a class")


if __name__ == "__main__":
    main()
