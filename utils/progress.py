"""One way to show progress: on standard error, often on a terminal, seldom in a log file."""

import sys
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar; in a file (a cluster's log) it writes a line every ten seconds instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, mininterval=interval, **options)
