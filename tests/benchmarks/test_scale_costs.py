"""The page of growth holds what its command writes, and the numbers are those of hand."""

from pathlib import Path

import torch

from backbone.luca import make_luca
from benchmarks import scale_costs
from benchmarks.pages import publish
from benchmarks.scale import MadeTask
from models.tosca import TOSCA
from tests.conftest import ROOT, tiny_config


def test_the_page_holds_what_the_command_writes(tmp_path: Path) -> None:
    page = ROOT / "docs" / "scale.md"
    copy = tmp_path / "scale.md"
    copy.write_bytes(page.read_bytes())
    publish(copy, scale_costs.COMMAND, scale_costs.section())
    assert copy.read_bytes() == page.read_bytes()


def test_cifar_worked_by_hand() -> None:
    stream = scale_costs.paper_stream("cifar")
    assert (stream.classes, stream.tasks, stream.views) == (100, 20, 20)
    assert stream.forwards == 50_000 * 21 + 10_000
    scores, of_an_image = 240 * 100 * 6 * 4, 768 * 4 + 20 * 4 + 6 * (5 * 8 + 8 + 8 + 4 + 4)
    assert stream.evaluation_gb == (10_000 * of_an_image + scores) / 1e9


def test_a_module_has_the_parameters_that_are_counted() -> None:
    luca = make_luca(768, mlp_ratio=16, se_ratio=16, flow="tosca", first=True, seed=0)
    assert sum(p.numel() for p in luca.parameters()) == scale_costs.LUCA


def test_the_state_has_the_bytes_that_are_counted() -> None:
    learner = TOSCA(tiny_config(), 32, torch.device("cpu"), seed=0)
    for index in range(2):  # 400 images: the ridge statistics are a Gram matrix by then
        learner.learn(MadeTask(index, 32))
    saved = sum(tensor.nbytes for tensor in learner.state_dict().values())
    assert abs(saved - scale_costs.state_bytes(20, 32)) < 200  # scalars and the error of each λ
