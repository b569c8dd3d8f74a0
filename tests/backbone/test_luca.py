import math

import numpy as np
import pytest
import torch

from backbone.luca import FLOWS, LuCA, make_luca

ALL_FLOWS = sorted(FLOWS)


def hand_worked_luca(flow: str) -> LuCA:
    """Width 2, both bottlenecks 1, numbers that can be followed with a pencil (see the test below)."""
    luca = LuCA(2, mlp_ratio=2, se_ratio=2, flow=flow)
    values = {
        "norm.weight": [2.0, 3.0],
        "norm.bias": [0.5, -0.5],
        "mlp.0.weight": [[1.0, -1.0]],
        "mlp.0.bias": [-2.0],
        "mlp.2.weight": [[7.0], [7.0]],
        "mlp.2.bias": [1.0, -1.0],
        "se.0.weight": [[1.0, -1.0]],
        "se.2.weight": [[0.0], [math.log(3) / 2]],
    }
    luca.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return luca


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        # h = (3, 1). mlp: 3 - 1 - 2 = 0, GELU(0) = 0, so mlp(h) = (1, -1), whose LayerNorm is (1, -1):
        # times (2, 3) plus (0.5, -0.5) gives (2.5, -3.5).
        ("adapter", [2.5, -3.5]),
        # se: 3 - 1 = 2, ReLU 2, sigmoid((0, ln 3)) = (1/2, 3/4).
        ("calibrator", [3 / 2, 3 / 4]),
        ("tosca_r", [3 / 2 + 2.5, 3 / 4 - 3.5]),
        # h + mlp(h) = (4, 0), normalised (1, -1), z = (2.5, -3.5).
        # se: 2.5 + 3.5 = 6, sigmoid((0, 3 ln 3)) = (1/2, 27/28).
        ("tosca", [2.5 / 2, -3.5 * 27 / 28]),
    ],
)
def test_every_flow_gives_the_values_worked_by_hand(flow, expected):
    output = hand_worked_luca(flow)(torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(output, torch.tensor([expected]), rtol=0, atol=1e-4)  # LayerNorm's eps is 1e-5


def numpy_luca(p: dict[str, np.ndarray], h: np.ndarray, flow: str) -> np.ndarray:
    """The formulas of the paper in double precision, with the exact (erf) GELU."""

    def mlp(x):
        u = x @ p["mlp.0.weight"].T + p["mlp.0.bias"]
        return (u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))) @ p["mlp.2.weight"].T + p["mlp.2.bias"]

    def norm(x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * p["norm.weight"] + p["norm.bias"]

    def se(x):
        return 1 / (1 + np.exp(-(np.maximum(x @ p["se.0.weight"].T, 0) @ p["se.2.weight"].T)))

    if flow == "tosca":
        z = norm(h + mlp(h))
        return z * se(z)
    return {"tosca_r": h * se(h) + norm(mlp(h)), "adapter": norm(mlp(h)), "calibrator": h * se(h)}[flow]


@pytest.mark.parametrize("flow", ALL_FLOWS)
def test_every_flow_equals_the_formulas_in_numpy(flow):
    luca = make_luca(12, mlp_ratio=3, se_ratio=4, flow=flow, first=True, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in luca.parameters():  # far from the initialisation, where parts of the formulas vanish
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    h = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    arrays = {name: value.detach().numpy() for name, value in luca.state_dict().items()}
    np.testing.assert_allclose(luca(h).detach().numpy(), numpy_luca(arrays, h.numpy(), flow), rtol=1e-10, atol=1e-12)


# the release's parameters for features of width 768, in its order
SHAPES_OF_768 = {
    "norm.weight": (768,),
    "norm.bias": (768,),
    "mlp.0.weight": (48, 768),
    "mlp.0.bias": (48,),
    "mlp.2.weight": (768, 48),
    "mlp.2.bias": (768,),
    "se.0.weight": (48, 768),
    "se.2.weight": (768, 48),
}


@pytest.mark.parametrize("flow", ALL_FLOWS)
def test_every_flow_owns_the_same_149808_parameters_in_the_releases_order(flow):
    luca = LuCA(768, flow=flow)
    assert {name: tuple(p.shape) for name, p in luca.named_parameters()} == SHAPES_OF_768
    assert [name.partition(".")[0] for name, _ in luca.named_parameters()] == ["norm"] * 2 + ["mlp"] * 4 + ["se"] * 2
    assert list(luca.state_dict()) == [name for name, _ in luca.named_parameters()]
    assert sum(p.numel() for p in luca.parameters()) == 149_808


def test_a_width_that_the_ratio_does_not_divide_is_rounded_down():
    luca = LuCA(10, mlp_ratio=4, se_ratio=3)
    assert (luca.mlp[0].out_features, luca.se[0].out_features) == (2, 3)


def spread(weight: torch.Tensor) -> float:
    return weight.abs().max().item()


def test_the_first_task_starts_from_pytorchs_default():
    luca = make_luca(768, mlp_ratio=16, se_ratio=16, flow="tosca", first=True, seed=3)
    wide, narrow = 1 / math.sqrt(768), 1 / math.sqrt(48)  # U(-1/√fan_in, 1/√fan_in), weights and biases alike
    assert 0.99 * wide < spread(luca.mlp[0].weight) <= wide
    assert 0.99 * narrow < spread(luca.mlp[2].weight) <= narrow
    assert 0.99 * wide < spread(luca.se[0].weight) <= wide
    assert 0.99 * narrow < spread(luca.se[2].weight) <= narrow
    assert 0 < spread(luca.mlp[0].bias) <= wide
    assert 0.9 * narrow < spread(luca.mlp[2].bias) <= narrow
    assert (luca.norm.weight == 1).all() and (luca.norm.bias == 0).all()


def test_later_tasks_start_from_xavier_weights_and_zero_biases():
    luca = make_luca(768, mlp_ratio=16, se_ratio=16, flow="tosca", first=False, seed=3)
    bound = math.sqrt(6 / (768 + 48))
    for layer in (luca.mlp[0], luca.mlp[2], luca.se[0], luca.se[2]):
        assert 0.99 * bound < spread(layer.weight) <= bound
    assert not luca.mlp[0].bias.any() and not luca.mlp[2].bias.any()
    assert (luca.norm.weight == 1).all() and (luca.norm.bias == 0).all()


def test_reset_also_resets_the_layer_norm():
    luca = hand_worked_luca("tosca")
    luca.reset_xavier(torch.Generator())
    assert (luca.norm.weight == 1).all() and (luca.norm.bias == 0).all()


@pytest.mark.parametrize("first", [True, False])
def test_the_seed_alone_decides_and_the_global_generator_is_untouched(first):
    def drawn(seed):
        luca = make_luca(8, mlp_ratio=2, se_ratio=2, flow="tosca", first=first, seed=seed)
        return torch.cat([p.detach().flatten() for p in luca.parameters()])

    torch.manual_seed(0)
    before = torch.get_rng_state()
    reference = drawn(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(drawn(5), reference)
    assert not torch.equal(drawn(6), reference)


@pytest.mark.parametrize(("ratio", "bottleneck"), [(1, 8), (8, 1)])
def test_a_bottleneck_may_be_as_wide_as_the_feature_and_as_narrow_as_one(ratio, bottleneck):
    luca = LuCA(8, mlp_ratio=ratio, se_ratio=ratio)
    assert luca.mlp[0].out_features == luca.se[0].out_features == bottleneck


@pytest.mark.parametrize(("name", "ratio"), [("mlp_ratio", 9), ("se_ratio", 9), ("mlp_ratio", 0)])
def test_a_ratio_that_leaves_no_bottleneck_is_named(name, ratio):
    with pytest.raises(ValueError, match=rf"{name} must be between 1 and the feature width 8, got {ratio}"):
        LuCA(8, **{"mlp_ratio": 2, "se_ratio": 2, name: ratio})


def test_an_unknown_flow_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"tosca, tosca_r, adapter, calibrator, got 'toska'"):
        LuCA(32, flow="toska")
