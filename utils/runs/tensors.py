"""State dicts of tensors from files that nobody needs to trust."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import CheckpointError, DamagedRunError

MODULE_PREFIX = "backbone.tosca."  # in front of LuCA's parameters in the release's files


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A plain state dict. No code in the file is ever run.

    Raises:
        CheckpointError: truncated, empty, not a state dict, or a pickle that wants to run code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedRunError(f"{path} is damaged and cannot be read ({first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError and what a hostile file may provoke
        raise DamagedRunError(
            f"{path} is not a plain state dict of tensors and was not loaded ({first_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DamagedRunError(f"{path} is not a plain state dict of tensors")
    return state


def module_from_file(path: Path) -> dict[str, Tensor]:
    """LuCA's parameters from a ``task<i>.pth``, the release's or ours."""
    return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in load_tensors(path).items()}


def first_line(error: Exception) -> str:
    """The first line of what an error says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
