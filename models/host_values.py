"""The one place where Python looks at the values of tensors while a learner learns or restores its state.

Each look waits for the device. Answering needs none: it goes through ``gather`` and masks, so that its shapes follow
from the shapes of its arguments. What does look (is a loss finite, which images are of a class, which λ is best)
goes through this file, so that the rest can be run without values, as tests do for devices that a machine lacks.
"""

import numpy as np
import torch
from torch import Tensor


def host_values(tensor: Tensor) -> np.ndarray:
    """The values of ``tensor`` in the memory of the host."""
    return tensor.detach().cpu().numpy()


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(host_values(tensor.isfinite().all()))


def places(mask: Tensor) -> Tensor:
    """Where a mask ``(n,)`` is true, as indices on its device."""
    return torch.from_numpy(np.flatnonzero(host_values(mask))).to(mask.device)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN equals NaN."""
    return bool(np.array_equal(host_values(first), host_values(second), equal_nan=True))
