"""FLOPs worked by hand, and the columns of the cost table in a run's JSON and log."""

import ast
import mmap
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbone import flops
from backbone.create import create_model
from backbone.forward import plain_features
from backbone.luca import make_luca
from backbone.vit import Backbone
from models.cost import (
    CostMeter,
    FlopCounter,
    count_flops,
    luca_flops,
    step_flops,
    training_flops,
)
from tests.conftest import tiny_config
from utils.data.tasks import Task
from utils.hardware import forget_peak, peak_bytes
from utils.results.cost import COLUMNS, EVAL_MS, INFERENCE, LEARNER, PEAK_MB, PUBLISHED_COLUMNS, TRAIN

DIM, ROWS, HIDDEN = 768, 10, 48
PRODUCT = 2 * DIM * HIDDEN  # one product of a feature with a bottleneck's weights: two for a multiply-add


def whole_forward_flops(name: str, image_size: int) -> int:
    return flops.whole_forward_flops(create_model(name, image_size), image_size)


def test_a_luca_is_four_products_with_its_bottlenecks():
    assert luca_flops(tiny_config(), DIM) == 4 * PRODUCT


def test_a_step_is_forward_weight_gradients_and_input_gradients():
    # every product again for the gradient of its weights and of its input; the feature itself needs no gradient
    classifier = 3 * 2 * DIM * ROWS
    assert step_flops(tiny_config(), DIM, ROWS) == (3 * 4 - 1) * PRODUCT + classifier


@pytest.mark.parametrize(("flow", "products"), [("tosca_r", 4), ("adapter", 2), ("calibrator", 2)])
def test_a_flow_costs_what_it_computes(flow, products):
    assert luca_flops(tiny_config(flow=flow), DIM) == products * PRODUCT


def test_a_vit_b_16_forward_is_the_published_number():
    assert whole_forward_flops("vit_base_patch16_224", 224) / 1e9 == pytest.approx(35.14, rel=1e-3)


def tiny_vit():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32).eval()


def test_a_vit_forward_worked_by_hand():
    dim, tokens, depth, patches = 192, 5, 12, 4
    products = 2 * tokens * dim * (3 * dim + dim + 4 * dim + 4 * dim)  # qkv, projection, both layers of the MLP
    attention = 2 * 2 * tokens * tokens * dim  # scores, and the weighted sum of the values
    patch_embedding = 2 * patches * dim * 3 * 16 * 16
    assert whole_forward_flops("vit_tiny_patch16_224", 32) == depth * (products + attention) + patch_embedding


def spent_forward(precision: str) -> int:
    backbone = Backbone.of(tiny_vit(), name="x", device=torch.device("cpu"), precision=precision, normalize=False)
    return count_flops(lambda: backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))


def test_the_forward_that_is_spent_is_the_whole_one_but_for_the_last_block():
    whole = whole_forward_flops("vit_tiny_patch16_224", 32)
    dim, tokens = 192, 5
    one_token = 2 * dim * (dim + dim + 4 * dim + 4 * dim)  # query, projection and MLP of a token in the last block
    attention = 2 * 2 * tokens * dim
    assert spent_forward("fp32") == whole - (tokens - 1) * (one_token + attention)


def test_in_bf16_patches_are_embedded_twice_and_the_last_block_has_no_keys_and_values():
    dim, tokens, heads, patches = 192, 5, 3, 4
    second_half = 2 * patches * dim * 3 * 16 * 16  # of the embedding's weights
    keys_and_values = 2 * tokens * dim * 2 * dim
    instead = 2 * 2 * dim * dim  # the query through the keys' weights, the mixed tokens through the values'
    attention = 2 * 2 * tokens * dim * (heads - 1)  # over whole tokens for each head
    assert spent_forward("bf16") - spent_forward("fp32") == second_half - keys_and_values + instead + attention


def test_the_counter_is_torchs_own():
    luca = make_luca(64, mlp_ratio=16, se_ratio=16, flow="tosca", first=True, seed=0)
    images = torch.zeros(2, 3, 32, 32)
    model = tiny_vit()
    for work in (lambda: luca(torch.ones(3, 64)).sum().backward(), lambda: plain_features(model, images)):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with FlopCounterMode(display=False) as theirs:
                work()
            with FlopCounter() as ours:
                work()
        assert ours.total == theirs.get_total_flops() > 0


def test_training_counts_every_image_in_every_epoch_and_once_for_the_prototypes():
    config = tiny_config(epochs=3)
    sizes = ((0, 2, 5), (2, 4, 7))  # first row, last row, images
    none = torch.zeros(0, dtype=torch.long).numpy()
    tasks = [
        Task(index=i, rows=range(a, b), train=range(n), train_rows=none, test=none, test_classes=none)
        for i, (a, b, n) in enumerate(sizes)
    ]
    expected = sum(n * (3 * step_flops(config, DIM, b) + luca_flops(config, DIM)) for _, b, n in sizes)
    assert training_flops(config, DIM, tasks) == expected


def resident(megabytes: int) -> mmap.mmap:
    """Memory from the system, in use; malloc might hand out what the process has free, and keep what it gets back."""
    memory = mmap.mmap(-1, megabytes << 20)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    return memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot forget its peak")
def test_the_peak_of_learning_is_not_that_of_what_the_process_did_before():
    megabyte = 1 << 20
    before = resident(384)
    whole = peak_bytes() / megabyte
    before.close()
    meter = CostMeter(tiny_config(model_name="simplecil"), SimpleNamespace(device=torch.device("cpu")), None, {})
    forget_peak()
    start = peak_bytes() / megabyte
    with meter.learning():
        learning = resident(64)
    assert whole - start > 300
    assert 60 < meter.counted[PEAK_MB] - start < 90
    learning.close()
    resident(384).close()
    with meter.learning():
        pass
    assert meter.counted[PEAK_MB] - start < 90  # what came between two tasks is none of learning


def test_the_peak_of_an_accelerator_is_what_its_tensors_took(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_000_000 + device.index)
    device = torch.device("cuda", 3)
    forget_peak(device)
    assert forgotten == [device] and peak_bytes(device) == 2_000_003


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_the_log_has_one_line_with_the_published_keys(finished_run):
    (line,) = [line for line in finished_run.log().splitlines() if "Cost summary: " in line]
    cost = ast.literal_eval(line.partition("Cost summary: ")[2])
    assert tuple(cost) == (*COLUMNS, *PUBLISHED_COLUMNS)
    assert all(value > 0 for value in cost.values())
    stored = finished_run.json()["cost"]
    assert all(value == pytest.approx(stored[name], rel=1e-3) for name, value in cost.items())


def test_as_published_is_a_backbone_for_each_module_and_for_each_image_in_each_epoch(finished_run):
    cost, values = finished_run.json()["cost"], finished_run.json()
    whole = whole_forward_flops("vit_tiny_patch16_224", 32) / 1e9
    epochs, images, modules = 2, values["data"]["train_images"], 3
    assert cost[TRAIN + " as published"] - cost[LEARNER] == pytest.approx(whole * images * (epochs + 1))
    spent_forward = (cost[TRAIN] - cost[LEARNER]) / values["backbone_forwards"]
    assert spent_forward < whole
    answering = cost[INFERENCE] - spent_forward
    assert cost[INFERENCE + " as published"] == pytest.approx(modules * whole + answering)
    assert cost[EVAL_MS + " as published"] > cost[EVAL_MS]


def test_parameters_are_those_of_the_finished_model(finished_run):
    cost, counts = finished_run.json()["cost"], finished_run.json()["parameters"]
    everything = counts["backbone"] + 3 * counts["luca_per_task"] + counts["classifier"]
    assert (cost["Params (M)"], cost["Trainable Params (M)"]) == (everything / 1e6, counts["trainable"] / 1e6)


def test_a_baseline_counts_what_it_does_and_a_full_bank_costs_nothing(finished_run, digit_folder, run_main, tmp_path):
    cache = str(finished_run.folder / "cache")
    outcome = run_main(tmp_path, data_path=str(digit_folder), model_name="simplecil", cache_dir=cache)
    cost = outcome.json()["cost"]
    images, dim, classes = 24, 192, 2
    assert cost[LEARNER] * 1e9 == 2 * images * dim * classes  # class means: members × features
    assert cost[TRAIN] == cost[LEARNER]
    assert cost[EVAL_MS + " as published"] == cost[EVAL_MS]  # it has one module: the classifier
