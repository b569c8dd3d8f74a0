"""Linear layers in bf16: how often they round, on CPUs with oneDNN and elsewhere."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import nn

from backbone import forward as half


def _linear(outputs: int = 40) -> tuple[torch.Tensor, nn.Linear]:
    """bf16 inputs, and a layer whose weights bf16 holds exactly and whose bias it does not."""
    torch.manual_seed(0)
    linear = nn.Linear(24, outputs)
    linear.weight.data = linear.weight.data.to(half.HALF).float()
    linear.bias.data += 3
    return torch.randn(6, 5, 24).to(half.HALF), linear


@pytest.mark.skipif(not half.ONEDNN_IN_BF16, reason="oneDNN computes no bf16 on this CPU")
@pytest.mark.parametrize("gelu", ["", "none", "tanh"])
@torch.inference_mode()
def test_a_bf16_product_with_bias_and_gelu_is_rounded_once(gelu: str) -> None:
    x, linear = _linear()
    exact = linear(x.float())
    if gelu:
        exact = nn.functional.gelu(exact, approximate=gelu)
    product = half.HalfProduct(linear)
    product.gelu = gelu
    found = product(x)
    assert found.dtype == half.HALF
    assert ((found.float() - exact).abs() <= 1.01 * 2**-9 * 2 ** exact.abs().log2().ceil() + 1e-6).all()


@pytest.mark.parametrize("gelu", ["", "none", "tanh"])
@torch.inference_mode()
def test_a_bf16_product_is_pytorchs_where_onednn_is_not(gelu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, linear = _linear()
    product = half.HalfProduct(linear)
    product.gelu = gelu
    exported = torch.export.export(product, (x,))
    assert "mkldnn" not in str(exported.graph)
    monkeypatch.setattr(half, "ONEDNN_IN_BF16", False)
    expected = linear.to(half.HALF)(x)
    if gelu:
        expected = nn.functional.gelu(expected, approximate=gelu)
    assert torch.equal(product(x), expected) and torch.equal(exported.module()(x), expected)


@pytest.mark.parametrize(
    ("activation", "folded"), [(nn.GELU, "none"), (partial(nn.GELU, approximate="tanh"), "tanh"), (nn.SiLU, "")]
)
@torch.inference_mode()
def test_gelu_goes_into_the_product_before_it_and_any_other_function_stays(activation: Any, folded: str) -> None:
    torch.manual_seed(0)
    mlp = Mlp(24, 40, act_layer=activation)
    x = torch.randn(6, 24).to(half.HALF)
    expected = mlp(x.float())
    half.use_half_products(mlp)
    assert mlp.fc1.gelu == folded and mlp.fc2.gelu == "" and isinstance(mlp.act, nn.Identity) == bool(folded)
    assert (mlp(x).float() - expected).norm() < 0.02 * expected.norm()


def test_all_of_an_attention_is_bf16_but_the_biases_of_its_products() -> None:
    attention = Attention(24, num_heads=2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    half.use_half_products(attention)
    tensors = {**dict(attention.named_parameters()), **dict(attention.named_buffers())}
    assert {"qkv.bias", "proj.bias", "q_norm.weight", "k_norm.bias"} <= tensors.keys()
    exact = {name for name, tensor in tensors.items() if tensor.dtype != half.HALF}
    assert exact == {"qkv.bias", "proj.bias"} and tensors["qkv.bias"].dtype == torch.float32
