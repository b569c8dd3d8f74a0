"""Adapters beside the MLPs of a ViT, the one part of the backbone that may be trained: on the first task, then no more.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, Section 3.2, set
as LAMDA-PILOT sets it: beside the MLP, on the same stream, with a fixed scale and no LayerNorm of its own.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from utils.errors import BackboneError
from utils.seeds import fixed_seed

Adapters = dict[str, Tensor]  # their parameters, on the CPU, under the names that they have in the model
WIDTH, SCALE, DROPOUT = 64, 0.1, 0.1


class Adapter(nn.Sequential):
    """``up(dropout(relu(down(x))))``, at first zero.

    ``down``'s weights are drawn as those of any linear layer, kaiming_uniform with a = √5; all else begins at zero.

    Shape: ``(…, dim) -> (…, dim)``.
    """

    def __init__(self, dim: int) -> None:
        down, up = nn.Linear(dim, WIDTH), nn.Linear(WIDTH, dim)
        super().__init__(OrderedDict(down=down, relu=nn.ReLU(), dropout=nn.Dropout(DROPOUT), up=up))
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)


class AdaptedBlock(nn.Module):
    """A timm ``Block`` with an adapter: ``x + ls2(mlp(norm2(x))) + 0.1 · adapter(x)``, x being what attention left.

    It takes over the block's parts under their names. Layer scale is the MLP's alone; stochastic depth is off in a
    frozen model.
    """

    def __init__(self, block: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        x = x + block.ls1(block.attn(block.norm1(x)))
        return x + plus_adapter(self, x, block.ls2(block.mlp(block.norm2(x))))


def plus_adapter(block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``y``, what a block's MLP makes of the stream ``x``, plus 0.1 of what its adapter makes of ``x``, if it has one.

    The sum takes the place of ``y`` and has its type: no further tensor of the stream's size is allocated.
    """
    return y.add_(block.adapter(x.to(y.dtype)), alpha=SCALE) if isinstance(block, AdaptedBlock) else y


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks that take an adapter."""
    from timm.models.vision_transformer import Block

    blocks = list(getattr(model, "blocks", ()))
    if not blocks or any(type(block) is not Block for block in blocks):
        raise BackboneError(
            f"first_session: adapters go into the plain blocks of a ViT, which {type(model).__name__} does not have; "
            "set first_session=none or another backbone_type"
        )
    return blocks


def add_adapters(model: Any, seed: int) -> None:
    """Freeze a timm ViT and put a new adapter into every block; the adapters alone require gradients.

    Their parameters are the model's ``blocks.<i>.adapter.{down,up}.{weight,bias}``.
    """
    blocks = blocks_of(model)
    model.requires_grad_(False)
    with fixed_seed(seed):
        adapters = [Adapter(model.embed_dim) for _ in blocks]
    for index, (block, adapter) in enumerate(zip(blocks, adapters, strict=True)):
        model.blocks[index] = AdaptedBlock(block, adapter)
    model.eval()


def adapter_state(model: nn.Module) -> Adapters:
    """A copy of the adapters' parameters on the CPU, under the model's names."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if ".adapter." in name}


def load_adapters(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put the adapters of a saved ``adapter_state`` into a plain model, frozen as all of it."""
    add_adapters(model, seed=0)
    model.load_state_dict(state, strict=False)
    model.requires_grad_(False)
