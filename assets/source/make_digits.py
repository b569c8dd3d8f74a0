"""Rebuild ``digits.npz`` from an installed scikit-learn.

The archive holds the 1,797 handwritten 8x8 digits of the test part of the UCI "Optical Recognition of Handwritten
Digits" data set, exactly as ``sklearn.datasets.load_digits`` returns them, in file order.

    pip install scikit-learn
    python assets/source/make_digits.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np


def load_uci_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 ``[1797, 8, 8]`` (values 0..16) and labels uint8 ``[1797]``, in file order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("scikit-learn is not installed; it carries the digits: pip install scikit-learn")
    bunch = load_digits()
    images, labels = bunch.images, bunch.target
    # scikit-learn hands out floats; make sure that uint8 loses nothing before storing it.
    if not np.array_equal(images, images.astype(np.uint8)) or images.shape != (1797, 8, 8) or images.max() > 16:
        sys.exit("scikit-learn's digits are not the expected 1797 images of 8x8 whole numbers 0..16")
    return images.astype(np.uint8), labels.astype(np.uint8)


def main() -> None:
    """Write the archive."""
    parser = argparse.ArgumentParser(description="Rebuild digits.npz from an installed scikit-learn.")
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--out", type=Path, default=here / "digits.npz", help="file to write")
    args = parser.parse_args()
    images, labels = load_uci_digits()
    np.savez_compressed(args.out, images=images, labels=labels)
    print(f"{args.out}: images {images.shape}, labels {labels.shape}, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
