"""Classifiers from streamed statistics: they are no learners, learners use them."""

from collections.abc import Mapping

from torch import Tensor


def state_below(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with ``name`` and a dot, under their names without it."""
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
