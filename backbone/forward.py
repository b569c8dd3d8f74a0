"""The forward pass of a frozen timm ViT: ``(images, 3, S, S)`` uint8 in, ``(images, dim)`` float32 features out.

Three ways, each an ``nn.Module`` that can be compiled and exported:

* ``PlainFeatures``: timm's own path for any model; in bf16 under autocast.
* ``ClassTokenFeatures``: fp32, a plain ViT read at its class token; the last block is computed for that token alone.
* ``ProductFeatures``: bf16, a plain ViT. The matrix products and the attention are bf16, while the residual stream
  and the statistics of every LayerNorm on it stay fp32. Autocast converts at every operation; here a value is
  converted once, where a product reads it.
"""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from backbone.adapters import SCALE, AdaptedBlock, Adapter, plus_adapter
from backbone.half import HALF, HalfProduct, drop_key_bias, fold_scale, use_half_products

TimmModel = Any  # timm's attributes have no types: nn.Module would make tensors of all of them


def make_features(model: TimmModel, *, precision: str, normalize: bool) -> "Features":
    """The fastest forward pass that computes what ``model`` does at ``precision``. It takes over ``model``."""
    if precision == "bf16":
        if is_plain_vit(model):
            return ProductFeatures(model, normalize=normalize)
        return PlainFeatures(model, normalize=normalize, autocast=True)
    if supports_cls_only(model):
        return ClassTokenFeatures(model, normalize=normalize)
    return PlainFeatures(model, normalize=normalize)


def is_plain_vit(model: TimmModel) -> bool:
    """Whether ``model`` is a ViT of unchanged pre-norm blocks, pooled without parameters of the pooling's own."""
    if type(model) is not VisionTransformer or getattr(model, "attn_pool", None) is not None or not len(model.blocks):
        return False
    return model.global_pool in ("token", "avg", "avgmax", "max") and all(_is_plain_block(b) for b in model.blocks)


def supports_cls_only(model: TimmModel) -> bool:
    """Whether ``cls_features`` computes exactly what ``plain_features`` does: a plain ViT read at its class token."""
    if type(model) is not VisionTransformer or model.cls_token is None or model.global_pool != "token":
        return False
    if getattr(model, "attn_pool", None) is not None or len(model.blocks) == 0:
        return False
    return _is_plain_block(model.blocks[-1])


def _is_plain_block(block: TimmModel) -> bool:
    plain = type(block) is Block or isinstance(block, AdaptedBlock)
    return plain and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


def plain_features(model: TimmModel, pixels: Tensor) -> Tensor:
    """timm's own path: ``(images, 3, S, S) -> (images, dim)``."""
    return cast(Tensor, model.forward_head(model.forward_features(pixels), pre_logits=True))


def cls_features(model: TimmModel, pixels: Tensor) -> Tensor:
    """``plain_features`` with the last block computed for the class token alone, 7 % less work in a ViT-B.

    Nothing reads the other tokens after the last block, so only their keys and values are needed there.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))  # (images, tokens, dim)
    x = model.blocks[:-1](x)
    x = cls_block(model.blocks[-1], x, torch.float32)
    return cast(Tensor, model.forward_head(model.norm(x), pre_logits=True))


def cls_block(block: TimmModel, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The class token's output of a timm ``Block``: ``(images, tokens, dim) -> (images, 1, dim)``.

    Args:
        block: its attention and MLP have weights of ``dtype``, its norms those of ``x``.
        x: the residual stream.
        dtype: of the products.
    """
    attn, y = block.attn, block.norm1(x).to(dtype)
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
    return x + plus_adapter(block, x, block.ls2(block.mlp(block.norm2(x).to(dtype))))


def pooled_cls_block(block: TimmModel, x: Tensor) -> Tensor:
    """``cls_block`` without keys and values, for blocks that do not normalise their keys: nearly no work at all.

    The class token's query q meets a token y in q · (K y) = (Kᵀ q) · y, and the values enter as
    Σ p V y = V (Σ p y). So K and V multiply one vector for each image and head in place of every token. The bias of
    the keys adds the same number to all logits, which softmax ignores.
    """
    attn, y = block.attn, block.norm1(x)
    heads, width = (attn.num_heads, attn.head_dim), attn.num_heads * attn.head_dim
    query, key, value = attn.qkv.weight.split(width)  # (width, dim) each
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.split(width)
    q = attn.q_norm(F.linear(y[:, 0], query, biases[0]).unflatten(-1, heads))  # (images, heads, head_dim)
    logits = torch.einsum("nhd,hdc->nhc", q * attn.scale, key.unflatten(0, heads)) @ y.transpose(1, 2)
    pooled = logits.softmax(dim=-1) @ y  # (images, heads, dim)
    out = torch.einsum("nhc,hdc->nhd", pooled, value.unflatten(0, heads)).flatten(1)
    if biases[2] is not None:
        out = out + biases[2]
    x = x[:, :1] + block.ls1(attn.proj(attn.norm(out)))[:, None]
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
    """timm's own forward pass, for any model; in bf16 under autocast."""

    def __init__(self, model: TimmModel, *, normalize: bool, autocast: bool = False) -> None:
        super().__init__()
        self.pixels, self.autocast = Pixels(model, normalize=normalize), autocast
        for module in model.modules() if autocast else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)):  # autocast would convert these weights in every batch
                module.to(HALF)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.pixels(images)
        if not self.autocast:
            return plain_features(self.model, pixels).float()
        with torch.autocast(images.device.type, HALF):
            return plain_features(self.model, pixels).float()


class ClassTokenFeatures(Features):
    """fp32, the last block for the class token alone."""

    def __init__(self, model: TimmModel, *, normalize: bool) -> None:
        super().__init__()
        self.pixels, self.model = Pixels(model, normalize=normalize), model

    def forward(self, images: Tensor) -> Tensor:
        return cls_features(self.model, self.pixels(images))


class ProductFeatures(Features):
    """bf16 products around an fp32 residual stream, without autocast.

    What a frozen model allows is done once. Layer scales go into the weights of the product before them, and the
    scaling of pixels into the patch embedding; so a patch enters its product as whole numbers, pixel - 128, which
    bf16 holds exactly, in one pass over the image. The bias of the keys is dropped: it adds the same number to all
    logits of a query, which softmax ignores, but large biases cost the keys their last bits. Read at its class token,
    the last block has so little to multiply that it stays fp32.
    """

    numerics: ClassVar[str] = (
        "bf16-products-3"  # part of a bank's identity: rows differ in their last bits from those of autocast
    )

    def __init__(self, model: TimmModel, *, normalize: bool) -> None:
        super().__init__()
        self.model, self.embed = model, _embedding(model, normalize=normalize)
        self.cls_only = supports_cls_only(model)
        self.last_in_fp32 = self.cls_only and isinstance(model.blocks[-1].attn.k_norm, nn.Identity)
        for block in model.blocks[:-1] if self.last_in_fp32 else model.blocks:
            drop_key_bias(block.attn)
            fold_scale(block, "ls1", block.attn.proj)
            fold_scale(block, "ls2", getattr(block.mlp, "fc2", None))
        for block in model.blocks[:-1] if self.cls_only else model.blocks:
            use_half_products(block.attn)
            use_half_products(block.mlp)
            if isinstance(block, AdaptedBlock):
                block.adapter = HalfAdapter(cast(Adapter, block.adapter))
        if self.cls_only and not self.last_in_fp32:  # whose products ``cls_block`` takes apart
            model.blocks[-1].attn.to(HALF)
            model.blocks[-1].mlp.to(HALF)

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(self.embed(images))  # (images, tokens, dim) float32, as the residual stream stays
        for block in model.blocks[:-1] if self.cls_only else model.blocks:
            x = x.add_(block.ls1(block.attn(block.norm1(x).to(HALF))))
            x = x.add_(plus_adapter(block, x, block.ls2(block.mlp(block.norm2(x).to(HALF)))))
        if self.last_in_fp32:
            x = pooled_cls_block(model.blocks[-1], x)
        elif self.cls_only:
            x = cls_block(model.blocks[-1], x, HALF)
        return cast(Tensor, model.forward_head(model.norm(x), pre_logits=True))


class HalfAdapter(nn.Module):
    """An adapter in bf16, its scale in the weights of ``up``."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        for parameter in adapter.up.parameters():
            parameter.data.mul_(SCALE)
        self.down, self.up = HalfProduct(adapter.down), HalfProduct(adapter.up)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(F.relu(self.down(x.to(HALF)))))


def _embedding(model: TimmModel, *, normalize: bool) -> nn.Module:
    patch = model.patch_embed
    simple = (
        type(patch) is PatchEmbed
        and isinstance(patch.norm, nn.Identity)
        and not patch.dynamic_img_pad
        and patch.img_size is not None
        and model.pos_embed is not None  # without positions versions of timm differ in what becomes of the class token
        and patch.proj.kernel_size == patch.proj.stride
        and patch.proj.padding == (0, 0)
    )
    return PatchProduct(model, normalize=normalize) if simple else AnyEmbedding(model, normalize=normalize)


class AnyEmbedding(nn.Module):
    """timm's own embedding of any kind, such as a ResNet's stem, under autocast."""

    def __init__(self, model: TimmModel, *, normalize: bool) -> None:
        super().__init__()
        self.pixels, self.model = Pixels(model, normalize=normalize), model

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, HALF):
            patches = self.model.patch_embed(self.pixels(images))
        return cast(Tensor, self.model._pos_embed(patches.float()))


class PatchProduct(nn.Module):
    """Patches, class and register tokens with their positions: uint8 -> ``(images, tokens, dim)`` float32."""

    weight: Tensor  # (dim, 3 * patch * patch) bf16
    rest: Tensor  # the same shape: what bf16 could not hold of the weight, itself bf16
    prefix: Tensor  # (1, class and register tokens, dim)
    position: Tensor  # (1, patches, dim), the patch embedding's bias included

    def __init__(self, model: TimmModel, *, normalize: bool) -> None:
        super().__init__()
        patch, pixels = model.patch_embed, Pixels(model, normalize=normalize)
        self.patch, self.grid, self.image = patch.patch_size, patch.grid_size, patch.img_size
        zero, one = (pixels(torch.full((1, 3, 1, 1), value, dtype=torch.uint8)) for value in (128, 129))
        weight = patch.proj.weight.float()
        bias = (weight * zero).sum(dim=(1, 2, 3))  # of a patch whose pixels are all 128
        if patch.proj.bias is not None:
            bias = bias + patch.proj.bias
        step = pixels.std.new_tensor(255).reciprocal() / (pixels.std if normalize else torch.ones_like(one))
        tokens = [t for t in (model.cls_token, model.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else weight.new_zeros(1, 0, len(weight))
        position = model.pos_embed
        if not model.no_embed_class:
            count = prefix.shape[1]
            prefix, position = prefix + position[:, :count], position[:, count:]
        exact = (weight * step).flatten(1)
        self.register_buffer("weight", exact.to(HALF), persistent=False)
        self.register_buffer("rest", (exact - self.weight.float()).to(HALF), persistent=False)
        self.register_buffer("prefix", prefix.detach().clone(), persistent=False)
        self.register_buffer("position", (position + bias).detach().clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != tuple(self.image):
            raise ValueError(f"the backbone takes images of {self.image} pixels, got {tuple(images.shape[-2:])}")
        (rows, columns), (height, width) = self.grid, self.patch
        centred = images[..., : rows * height, : columns * width].to(HALF).sub_(128)
        patches = centred.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))  # (n, 3, rows, h, columns, w)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (images, patches, 3 * h * w)
        tokens = F.linear(patches, self.weight) + (F.linear(patches, self.rest) + self.position)
        return torch.cat([self.prefix.expand(len(images), -1, -1), tokens], dim=1)
