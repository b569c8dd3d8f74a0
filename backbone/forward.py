"""The forward pass of a frozen timm ViT: ``(images, 3, S, S)`` uint8 in, ``(images, dim)`` float32 features out.

Two ways, each an ``nn.Module`` that can be exported:

* ``PlainFeatures``: timm's own path for any model; in bf16 under autocast. In fp32 the last block of a plain ViT that
  is read at its class token is computed for that token alone.
* ``ProductFeatures``: bf16, a plain ViT. The matrix products and the attention are bf16, while the residual stream
  and the statistics of every LayerNorm on it stay fp32. Autocast converts at every operation; here a value is
  converted once, where a product reads it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from backbone.adapters import AdaptedBlock, plus_adapter

TimmModel = Any  # timm's attributes have no types: nn.Module would make tensors of all of them
HALF = torch.bfloat16


def make_features(model: TimmModel, *, precision: str, normalize: bool) -> "Features":
    """The fastest forward pass that computes what ``model`` does at ``precision``. It takes over ``model``."""
    if precision == "bf16" and is_plain_vit(model):
        return ProductFeatures(model, normalize=normalize)
    return PlainFeatures(model, normalize=normalize, autocast=precision == "bf16")


def is_plain_vit(model: TimmModel) -> bool:
    """Whether ``model`` is a ViT of unchanged pre-norm blocks, pooled without parameters of its own."""
    return (
        _is_vit(model)
        and model.global_pool in ("token", "avg", "avgmax", "max")
        and all(_is_plain_block(block) for block in model.blocks)
    )


def supports_cls_only(model: TimmModel) -> bool:
    """Whether ``cls_features`` computes exactly what ``plain_features`` does: a plain ViT read at its class token."""
    return (
        _is_vit(model)
        and model.cls_token is not None
        and model.global_pool == "token"
        and _is_plain_block(model.blocks[-1])
    )


def _is_vit(model: TimmModel) -> bool:
    from timm.models.vision_transformer import VisionTransformer

    return type(model) is VisionTransformer and getattr(model, "attn_pool", None) is None and len(model.blocks) > 0


def _is_plain_block(block: TimmModel) -> bool:
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    plain = type(block) is Block or isinstance(block, AdaptedBlock)
    return plain and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


def plain_features(model: TimmModel, pixels: Tensor) -> Tensor:
    """timm's own path: ``(images, 3, S, S) -> (images, dim)``."""
    return cast(Tensor, model.forward_head(model.forward_features(pixels), pre_logits=True))


def cls_features(model: TimmModel, pixels: Tensor) -> Tensor:
    """``plain_features`` with the last block computed for the class token alone, 7 % less work in a ViT-B.

    Nothing reads the other tokens after the last block, so only their keys and values are needed there.
    """
    x = model.blocks[:-1](tokens_of(model, pixels))
    x = cls_block(model.blocks[-1], x)
    return cast(Tensor, model.forward_head(model.norm(x), pre_logits=True))


def tokens_of(model: TimmModel, pixels: Tensor) -> Tensor:
    """What enters the first block: ``(images, 3, S, S) -> (images, tokens, dim)``."""
    return cast(Tensor, model.norm_pre(model._pos_embed(model.patch_embed(pixels))))


def cls_block(block: TimmModel, x: Tensor) -> Tensor:
    """The class token's output of a timm ``Block``: ``(images, tokens, dim) -> (images, 1, dim)``."""
    attn, y = block.attn, block.norm1(x)
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias

    def heads(tokens: Tensor, rows: slice) -> Tensor:  # -> (images, heads, tokens, head_dim)
        projected = F.linear(tokens, weight[rows], None if bias is None else bias[rows])
        by_head: Tensor = projected.unflatten(-1, (attn.num_heads, attn.head_dim))
        return by_head.transpose(1, 2)

    q = attn.q_norm(heads(y[:, :1], slice(0, width)))
    k = attn.k_norm(heads(y, slice(width, 2 * width)))
    v = heads(y, slice(2 * width, 3 * width))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (images, 1, width)
    x = x[:, :1] + block.ls1(attn.proj(attn.norm(out)))
    return x + plus_adapter(block, x, block.ls2(block.mlp(block.norm2(x))))


class Pixels(nn.Module):
    """``(images, 3, S, S)`` uint8 -> float32 in [0, 1], or with ``normalize`` by the model's mean and std."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: TimmModel, *, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        config = model.pretrained_cfg
        for name, default in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(config.get(name, (default,) * 3), dtype=torch.float32)
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels: Tensor = images.float() / 255
        if self.normalize:
            pixels = (pixels - self.mean) / self.std
        return pixels


class Features(nn.Module):
    """A forward pass. ``numerics`` names it where its rows differ in their last bits from those of older releases."""

    numerics: ClassVar[str] = ""
    model: TimmModel


class PlainFeatures(Features):
    """timm's own forward pass, for any model; in bf16 under autocast, in fp32 for the class token alone if it can."""

    def __init__(self, model: TimmModel, *, normalize: bool, autocast: bool = False) -> None:
        super().__init__()
        self.pixels, self.autocast = Pixels(model, normalize=normalize), autocast
        for module in model.modules() if autocast else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)):  # autocast would convert these weights in every batch
                module.to(HALF)
        self.model, self.cls_only = model, not autocast and supports_cls_only(model)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.pixels(images)
        if not self.autocast:
            return (cls_features if self.cls_only else plain_features)(self.model, pixels).float()
        with torch.autocast(images.device.type, HALF):
            return plain_features(self.model, pixels).float()


class ProductFeatures(Features):
    """bf16 products around an fp32 residual stream, without autocast.

    The patch embedding stays fp32, and so does the last block where it is computed for the class token alone: both have
    little to multiply. The bias of the keys is dropped: it adds the same number to all logits of a query, which softmax
    ignores, but large biases cost the keys their last bits.
    """

    numerics: ClassVar[str] = "bf16-products-5"  # part of a bank's identity: autocast gives other last bits

    def __init__(self, model: TimmModel, *, normalize: bool) -> None:
        super().__init__()
        self.pixels, self.model, self.cls_only = Pixels(model, normalize=normalize), model, supports_cls_only(model)
        for block in self._half_blocks():
            drop_key_bias(block.attn)
            use_half_products(block.attn)
            use_half_products(block.mlp)
            if isinstance(block, AdaptedBlock):
                use_half_products(block.adapter)

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = tokens_of(model, self.pixels(images))  # (images, tokens, dim) float32, as the residual stream stays
        for block in self._half_blocks():
            x = x.add_(block.ls1(block.attn(block.norm1(x).to(HALF))))
            x = x.add_(plus_adapter(block, x, block.ls2(block.mlp(block.norm2(x).to(HALF)))))
        if self.cls_only:
            x = cls_block(model.blocks[-1], x)
        return cast(Tensor, model.forward_head(model.norm(x), pre_logits=True))

    def _half_blocks(self) -> TimmModel:
        return self.model.blocks[:-1] if self.cls_only else self.model.blocks


# -- products in bf16 --------------------------------------------------------------------------------------------------


class HalfProduct(nn.Module):
    """A linear layer with bf16 weights and an fp32 bias, ``gelu`` behind it if that is not empty.

    On a CPU oneDNN adds the bias and applies GELU to the product's own fp32 sums: the result is rounded once, and no
    pass over it follows. Other devices, and exported programs, use PyTorch's operations, whose bias is
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


# whether PyTorch was built with oneDNN, and this CPU has what its bf16 needs
ONEDNN_IN_BF16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

if ONEDNN_IN_BF16:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _product_flops(x_shape: Sequence[int], w_shape: Sequence[int], *_: object, **__: object) -> int:
        """Two for each multiply-add, as of any product: torch's counter has no formula for this operation."""
        return 2 * prod(x_shape) * w_shape[0]


def use_half_products(part: nn.Module) -> None:
    """Let an attention or an MLP compute in bf16."""
    from timm.layers.mlp import Mlp

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
