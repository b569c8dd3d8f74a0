"""Class means of frozen features, counted in float64 so that they do not depend on the order of the images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.streaming.lda import finite_float64, float64_device


def row_means(features: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean feature of each of ``count`` rows, zero for a row without images, and how many it has.

    Shape: ``(images, dim), (images,) -> (count, dim), (count,)``, the means in float64.

    Raises:
        NumericError: a feature is NaN or infinite.
    """
    values = finite_float64(features, float64_device(features.device))
    member = F.one_hot(rows.to(values.device), count)  # (images, count); its products add in a fixed order
    images = member.sum(dim=0)
    return member.double().T @ values / images.clamp(min=1)[:, None], images


def appended(old: Tensor, new: Tensor) -> Tensor:
    """Return ``old`` with the rows of ``new`` behind it, in the type and on the device of ``old``."""
    return torch.cat([old, new.to(old)])
