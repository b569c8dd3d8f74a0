"""One way to show progress: on standard error, often on a terminal, seldom in a log file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar; in a file (a cluster's log) it writes a line every ten seconds instead of ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, mininterval=interval, **options)


@contextmanager
def epoch_bar(title: str, epochs: int, *, shown: bool) -> Iterator[Callable[[float, float], None]]:
    """A bar over the epochs of a task; what it yields moves it on, called with an epoch's loss and accuracy in percent.

    Args:
        title: which task.
        epochs: how many there are.
        shown: false for a method that does not train in epochs.
    """
    with progress(total=epochs, desc=title, unit="epoch", leave=False, disable=not shown) as bar:

        def advance(loss: float, accuracy: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1f}", refresh=False)
            bar.update()

        yield advance
