"""The blocks of a frozen timm ViT in bf16: their linear layers, and what goes into the weights before."""

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

HALF = torch.bfloat16


class HalfProduct(nn.Module):
    """A linear layer with bf16 weights and an fp32 bias, ``gelu`` behind it if that is not empty.

    On a CPU oneDNN adds the bias and applies GELU to the product's own fp32 sums: the result is rounded once, and no
    pass over it follows. Other devices, and exported or compiled programs, use PyTorch's operations, whose bias is
    bf16 and which round before GELU as well.

    Attributes:
        gelu: "" for none, else the ``approximate`` of ``nn.GELU``.
    """

    weight: Tensor  # (outputs, inputs) bf16
    bias: Tensor | None  # (outputs,) float32
    rounded: Tensor | None  # the same in bf16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.gelu = ""
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("weight", linear.weight.detach().to(HALF))
        self.register_buffer("bias", bias)
        self.register_buffer("rounded", None if bias is None else bias.to(HALF))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and ONEDNN_IN_BF16 and not torch.compiler.is_compiling():
            name = "gelu" if self.gelu else "none"
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], self.gelu))
        y = F.linear(x, self.weight, self.rounded)
        return F.gelu(y, approximate=self.gelu) if self.gelu else y


def onednn_computes_bf16() -> bool:
    """Whether PyTorch was built with oneDNN, and this CPU has what its bf16 needs."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


ONEDNN_IN_BF16 = onednn_computes_bf16()

if ONEDNN_IN_BF16:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _product_flops(x_shape: Sequence[int], w_shape: Sequence[int], *_: object, **__: object) -> int:
        """Two for each multiply-add, as of any product: torch's counter has no formula for this operation."""
        return 2 * prod(x_shape) * w_shape[0]


def use_half_products(part: nn.Module) -> None:
    """Let an attention or an MLP compute in bf16."""
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, HalfProduct(child))
    for parameter in part.parameters():  # of norms; a product has none
        parameter.data = parameter.data.to(HALF)
    if type(part) is Mlp and isinstance(part.fc1, HalfProduct) and type(part.act) is nn.GELU:
        part.fc1.gelu, part.act = part.act.approximate, nn.Identity()


def drop_key_bias(attn: Any) -> None:
    """Set the bias of an attention's keys to zero, where nothing normalises them: softmax ignores it."""
    if attn.qkv.bias is not None and isinstance(attn.k_norm, nn.Identity):
        width = attn.num_heads * attn.head_dim
        attn.qkv.bias.data[width : 2 * width] = 0


def fold_scale(block: Any, name: str, product: nn.Module | None) -> None:
    """Move a layer scale into the product whose output it scales, where that is a plain linear layer."""
    scale = getattr(block, name)
    if type(product) is nn.Linear and not isinstance(scale, nn.Identity):
        product.weight.data.mul_(scale.gamma[:, None])
        if product.bias is not None:
            product.bias.data.mul_(scale.gamma)
        setattr(block, name, nn.Identity())
