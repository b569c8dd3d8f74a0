"""FLOPs worked by hand, and the columns of the cost table in a run's JSON and log."""

import ast
import mmap
import sys

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbone.flops import FlopCounter, count_flops, counted_otherwise, quickest_ms
from backbone.forward import plain_features
from backbone.luca import make_luca
from models.base import Learner, make_learner
from models.cost import CostMeter, kept_numbers
from tests.conftest import tiny_config
from utils.hardware import forget_peak, peak_bytes
from utils.results.metrics import COLUMNS, EVAL_MS, INFERENCE, LEARNER, PEAK_MB, RELEASE_COLUMNS, TRAIN

CPU = torch.device("cpu")
DIM, ROWS, IMAGES = 32, 3, 8


class Task:
    """Features of one task of three classes."""

    def __init__(self, index: int = 0) -> None:
        self.index, self.first_row, self.new_rows = index, ROWS * index, ROWS
        self.labels = torch.arange(IMAGES) % ROWS + self.first_row
        self.features = torch.randn(IMAGES, DIM, generator=torch.Generator().manual_seed(index))

    def epoch(self, epoch: int) -> Tensor:
        return self.features

    def test_view(self) -> Tensor:
        return self.features


def learned(tasks: int = 1, **keys) -> tuple[Learner, float]:
    """A learner after some tasks, and the FLOPs of learning them."""
    learner, meter = make_learner(tiny_config(**{"epochs": 3, **keys}), DIM, CPU, seed=0), CostMeter({})
    for index in range(tasks):
        with meter.learning(CPU):
            learner.learn(Task(index))
    return learner, meter.counted[LEARNER] * 1e9


# -- counting ---------------------------------------------------------------------------------------------------------


def test_the_counter_is_torchs_own():
    luca = make_luca(64, mlp_ratio=16, se_ratio=16, flow="tosca", first=True, seed=0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32).eval()
    images = torch.zeros(2, 3, 32, 32)
    for work in (lambda: luca(torch.ones(3, 64)).sum().backward(), lambda: plain_features(model, images)):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with FlopCounterMode(display=False) as theirs:
                work()
            with FlopCounter() as ours:
                work()
        assert ours.total == theirs.get_total_flops() > 0


def test_solves_count_by_the_formulas_of_the_textbook():
    n, k, m = 20, 3, 30
    tall = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = tall.T @ tall + torch.eye(n, dtype=torch.float64)
    factor, right = torch.linalg.cholesky(square), torch.ones(n, k, dtype=torch.float64)
    assert count_flops(lambda: torch.linalg.cholesky(square)) == n**3 // 3
    assert count_flops(lambda: torch.cholesky_solve(right, factor)) == 2 * n**2 * k
    assert count_flops(lambda: torch.linalg.solve_triangular(factor, right, upper=False)) == n**2 * k
    assert count_flops(lambda: torch.linalg.qr(tall)) == 4 * m * n**2 - 4 * n**3 // 3
    assert count_flops(lambda: torch.linalg.eigh(square)) == 9 * n**3


def test_work_that_is_counted_otherwise_is_not_counted_twice():
    def product() -> Tensor:
        return torch.ones(2, 2) @ torch.ones(2, 2)

    with FlopCounter() as counter:
        product()
        with counted_otherwise() as add:
            product()
            add(100)
        product()
    assert counter.total == 2 * 16 + 100
    with counted_otherwise() as add:
        assert add is None


@pytest.mark.parametrize(("flow", "products"), [("tosca", 4), ("tosca_r", 4), ("adapter", 2), ("calibrator", 2)])
def test_learning_a_task_is_steps_prototypes_and_the_routers(flow, products):
    hidden = DIM // 16
    product = 2 * DIM * hidden  # of a feature with a bottleneck's weights: two for a multiply-add
    # every product again for the gradient of its weights and of its input; only the feature itself needs none, which
    # saves a product for each branch that reads it
    branches = 2 if flow == "tosca_r" else 1
    step = (3 * products - branches) * product + 3 * 2 * DIM * ROWS
    means = 2 * IMAGES * DIM * ROWS
    learner, found = learned(flow=flow)
    fresh, task = make_learner(learner.config, DIM, CPU, seed=0).routers.values(), Task()
    routers = count_flops(lambda: [router.update(task.features, task.labels, ROWS) for router in fresh])
    assert found == 3 * IMAGES * step + IMAGES * products * product + means + routers


def test_a_solve_is_what_ranpac_costs(monkeypatch):
    monkeypatch.setattr("models.ranpac.RANDOM_FEATURES", 40)
    _, found = learned(model_name="ranpac")
    assert found > 2 * IMAGES * DIM * 40 + IMAGES**3 // 3  # the projection, and at least one solve of the root's size


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_all_that_a_learner_keeps_counts():
    assert kept_numbers(learned(model_name="simplecil")[0]) == ROWS * DIM
    lda = ROWS + ROWS * DIM + DIM * DIM + (DIM * ROWS + ROWS)  # counts, means, scatter, the solution's weights and bias
    assert kept_numbers(learned(model_name="ncm_lda")[0]) == lda
    luca = 4 * DIM * (DIM // 16) + DIM // 16 + 3 * DIM
    whole, tasks = learned(2, model_name="tosca")[0], 2
    routers = sum(kept_numbers(router) for router in whole.routers.values())
    assert kept_numbers(whole) == tasks * luca + tasks * ROWS * DIM + 1 + routers
    white = learned(2, model_name="tosca_white", white_features=16)[0]
    whitenings, ridges = tasks * (DIM**2 + 2 * DIM), kept_numbers(white.routers["ridges"])
    assert ridges > 2 * 16 * DIM  # the random projections, and what is solved on them
    assert kept_numbers(white) == tasks * (luca + ROWS * DIM) + whitenings + 1 + ridges + kept_numbers(white.statistics)


# -- time and memory --------------------------------------------------------------------------------------------------


def test_the_fastest_of_several_tries_counts(monkeypatch):
    clock = iter([0, 0, 9, 10, 14, 14, 20, 22, 22, 30, 33, 33, 40, 47, 47, 50, 55])  # begun, each try, looks between
    monkeypatch.setattr("backbone.flops.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("backbone.flops.SECONDS", 100)
    assert quickest_ms(lambda: None, CPU) == 2000


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
    meter = CostMeter({})
    forget_peak()
    start = peak_bytes() / megabyte
    with meter.learning(CPU):
        learning = resident(64)
    assert whole - start > 300
    assert 60 < meter.counted[PEAK_MB] - start < 90
    learning.close()
    resident(384).close()
    with meter.learning(CPU):
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
    assert tuple(cost) == (*COLUMNS, *RELEASE_COLUMNS)
    assert all(value > 0 for value in cost.values())
    stored = finished_run.json()["cost"]
    assert all(value == pytest.approx(stored[name], rel=1e-3) for name, value in cost.items())
    assert {f"{INFERENCE}, lda", f"{INFERENCE}, ridge", f"{EVAL_MS}, ridge"} <= stored.keys()


def test_the_releases_account_is_a_backbone_for_each_module_and_for_each_image_in_each_epoch(finished_run):
    values = finished_run.json()
    cost, epochs, modules = values["cost"], 2, 3
    release_train, release_inference = RELEASE_COLUMNS[2], RELEASE_COLUMNS[1]
    whole = (cost[release_train] - cost[LEARNER]) / (values["data"]["train_images"] * (epochs + 1))
    spent_forward = (cost[TRAIN] - cost[LEARNER]) / values["backbone_forwards"]
    assert 0 < spent_forward < whole
    answering = cost[INFERENCE] - spent_forward
    assert cost[release_inference] == pytest.approx(modules * whole + answering)
    assert cost[RELEASE_COLUMNS[0]] > cost[EVAL_MS]


def test_a_full_bank_costs_nothing_more(finished_run, digit_folder, run_main, tmp_path):
    cache = str(finished_run.folder / "cache")
    outcome = run_main(tmp_path, data_path=str(digit_folder), model_name="simplecil", cache_dir=cache)
    cost = outcome.json()["cost"]
    images, dim, classes = 24, 192, 2
    assert cost[LEARNER] * 1e9 == 2 * images * dim * classes  # class means: members x features
    assert cost[TRAIN] == cost[LEARNER]
    assert cost[RELEASE_COLUMNS[0]] == cost[EVAL_MS]  # it has one module: the classifier
