"""What the workers of ``test_loader.py`` do; their processes find it here by name, and import little for it."""

import os
import signal
import time
from collections.abc import Callable

import numpy as np

from utils.errors import DataError


def square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))
    return number**2


def pixels(count: int) -> np.ndarray:
    print("a library that prints")  # must not get among the results
    return np.full(count, 7, dtype=np.uint8)


def fail(number: int) -> int:
    if number == 3:
        raise DataError("image 3 is broken")
    if number == 5:
        raise ZeroDivisionError("our own fault")
    if number == 6:
        raise TimeoutError("a disk's")
    return number


def never(number: int) -> int:
    if number:
        time.sleep(3600)
    return number


def die(number: int) -> int:
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def unpicklable(_: int) -> Callable[[], None]:
    return lambda: None
