"""(i) CPU time of a forward pass against its bare matrix products, in one run on one thread.

    python -m benchmarks.forward [--backbone vit_base_patch16_224] [--image-size 224] [--batch 8] [--images FOLDER]
                                 [--adapter]

*Products*: the matrix products of every block alone, ready operands, nothing between them. *Autocast*: timm's modules
under bf16 autocast with the last block for the class token alone, as this project computed it before. *Forward*: the
backbone's own pass. *fp32*: the same at fp32, with its own products. *Attention*: scaled-dot-product attention on
strided and on contiguous heads, and as two batched products around a softmax. Times are CPU time of the thread, the
best of some rounds that alternate, so that a busy machine does not blur their ratios. The cosines to fp32 are over
``--images`` (the first 64 by name, at even distances), else over random pixels. With ``--adapter`` the same forward
passes with an adapter in every block, drawn at random, take part: their times by the plain ones', their cosine.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from backbone.adapters import add_adapters
from backbone.forward import HALF, Features, PlainFeatures, TimmModel, cls_features, make_features, supports_cls_only
from backbone.vit import load_backbone
from benchmarks.images import machine
from utils.config.config import make_config

IMAGES = 64  # that the cosines are taken over


class AutocastFeatures(PlainFeatures):
    """The forward pass in bf16 before there was one without autocast: the reference that the new one is set against."""

    def forward(self, images: Tensor) -> Tensor:
        if not supports_cls_only(self.model):
            return super().forward(images)
        pixels = self.pixels(images)
        with torch.autocast(images.device.type, HALF):
            return cls_features(self.model, pixels).float()


def products(model: TimmModel, images: int, dtype: torch.dtype) -> Callable[[], object]:
    """All matrix products of a forward pass over ``images`` images: the last block's for the class token alone."""
    blocks, tokens = list(model.blocks), model.pos_embed.shape[1]
    calls: list[tuple[Tensor, Tensor]] = []
    for number, block in enumerate(blocks):
        layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
        for layer in layers:
            last = number + 1 == len(blocks) and supports_cls_only(model)
            rows = 1 if last and layer is not block.attn.qkv else tokens
            inputs = torch.randn(images * rows, layer.in_features, device=layer.weight.device)
            calls.append((inputs.to(dtype), layer.weight.detach().to(dtype)))
    return lambda: [F.linear(x, weight) for x, weight in calls]


def attentions(model: TimmModel, images: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One block's attention, in the ways that were tried."""
    attn, tokens = model.blocks[0].attn, model.pos_embed.shape[1]
    shape = (images, tokens, 3, attn.num_heads, attn.head_dim)
    qkv = torch.randn(shape, device=attn.qkv.weight.device).to(dtype)

    def strided() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def contiguous() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def batched() -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0))
        scale = 1 / math.sqrt(q.shape[-1])
        weights = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(dim=-1)
        out: Tensor = torch.bmm(weights, v).unflatten(0, (images, -1)).transpose(1, 2).flatten(2)
        return out

    return {"attention, strided": strided, "attention, contiguous": contiguous, "attention, bmm + softmax": batched}


def best_of_rounds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU milliseconds of this thread that each took; the rounds alternate."""
    best = dict.fromkeys(work, math.inf)
    for _ in range(rounds + 1):  # the first round prepares kernels and caches, and is never the best
        for name, call in work.items():
            started = time.thread_time()
            call()
            best[name] = min(best[name], 1000 * (time.thread_time() - started))
    return best


def some_images(folder: Path | None, size: int) -> Tensor:
    """``(64, 3, size, size)`` uint8."""
    if folder is None:
        return torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    chosen = [files[index * len(files) // IMAGES] for index in range(IMAGES)]
    pixels = [np.array(Image.open(path).convert("RGB").resize((size, size))) for path in chosen]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds by name, and the smallest and mean cosines to fp32 of both bf16 forwards."""
    values = {
        "dataset": "imagefolder",
        "init_cls": 1,
        "increment": 1,
        "backbone_type": args.backbone,
        "backbone_weights": str(args.weights) if args.weights else None,
        "pretrained": False,
        "image_size": args.image_size,
        "precision": "fp32",
    }
    model = load_backbone(make_config(values), torch.device("cpu")).model
    exact = make_features(copy.deepcopy(model), precision="fp32", normalize=args.normalize)
    half = make_features(copy.deepcopy(model), precision="bf16", normalize=args.normalize)
    before = AutocastFeatures(copy.deepcopy(model), normalize=args.normalize, autocast=True)
    images = some_images(args.images, args.image_size)
    batch = images[: args.batch]
    with_adapters: dict[str, Features] = {}
    if args.adapter:
        add_adapters(model, seed=0)
        for block in model.blocks:
            nn.init.normal_(block.adapter.up.weight, std=0.02)  # about as large as 20 epochs at rate 0.5 make it
        for precision, name in (("fp32", "fp32, adapters"), ("bf16", "forward, adapters")):
            of = copy.deepcopy(model)
            with_adapters[name] = make_features(of, precision=precision, normalize=args.normalize)
    found = best_of_rounds(
        {
            "products, bf16": products(model, args.batch, HALF),
            "autocast": lambda: before(batch),
            "forward": lambda: half(batch),
            "products, fp32": products(model, args.batch, torch.float32),
            "fp32": lambda: exact(batch),
            **{name: partial(features, batch) for name, features in with_adapters.items()},
            **attentions(model, args.batch, HALF),
        },
        args.rounds,
    )
    compared = [("autocast", exact, before), ("forward", exact, half)]
    if args.adapter:
        compared.append(("forward, adapters", with_adapters["fp32, adapters"], with_adapters["forward, adapters"]))
    for name, wanted, features in compared:
        pairs = [(wanted(part), features(part)) for part in images.split(args.batch)]
        cosines = torch.cat([F.cosine_similarity(expected, rows) for expected, rows in pairs])
        found[f"{name}: smallest cosine"], found[f"{name}: mean cosine"] = cosines.min().item(), cosines.mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--weights", type=Path, help="of the backbone; else random")
    parser.add_argument("--images", type=Path, help="a folder of images; else random pixels")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--normalize", action="store_true")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"start: {machine()}; {args.backbone}, {args.batch} images of {args.image_size} px, one thread")
    found = measure(args)
    for name, value in found.items():
        if "cosine" in name:
            print(f"{name} to fp32: {value:.6f}")
        else:
            base = found["products, fp32" if "fp32" in name else "products, bf16"]
            print(f"{name:26} {value:9.1f} ms  {value / base:6.2f} of its bare products")
    for name in ("fp32", "forward") if args.adapter else ():
        print(f"{name} with adapters / plain: {found[f'{name}, adapters'] / found[name]:.3f}")
    print(f"forward / autocast: {found['forward'] / found['autocast']:.2f}")
    print(f"end: {machine()}")


if __name__ == "__main__":
    main()
