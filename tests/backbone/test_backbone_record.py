"""What is known of a backbone without building it, and that the later building gives the same one."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from backbone import vit
from backbone.vit import Backbone, load_backbone
from tests.conftest import ROOT, fork, tiny_config
from utils.errors import BackboneError

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "vit.pth"
    torch.save(load_backbone(tiny_config(), CPU).model.state_dict(), path)
    return path


def load(cache: Path | None, **keys: object) -> Backbone:
    return load_backbone(tiny_config(**keys), CPU, cache)


def test_a_second_load_knows_all_without_building_and_computes_the_same(tmp_path, weights, monkeypatch, caplog):
    keys = {"backbone_weights": str(weights), "pooling": "avg"}
    caplog.set_level(logging.INFO)
    first = load(tmp_path, **keys)
    said = list(caplog.messages)
    features = first(IMAGES)
    with monkeypatch.context() as patch:
        patch.setattr(vit, "load_model", lambda _: pytest.fail("it was built"))
        again = load(tmp_path, **keys)
        for name in (*vit.Record.FACTS, "flops", "whole_flops", "forward_ms"):
            assert getattr(again, name) == getattr(first, name) or name in ("remarks", "cost"), name
        assert str(again) == str(first) and caplog.messages == 2 * said and "mean of all patch tokens" in said[0]
        again.to(torch.device("cpu:0"))
    assert torch.equal(again(IMAGES), features)
    assert not any(tensor.is_inference() for tensor in again.features.state_dict().values())


def test_neither_timm_nor_torchvision_is_imported_where_there_is_a_record(tmp_path):
    load(tmp_path, backbone_type="glyphs_vit", pretrained=True)
    code = f"""
import sys
import time
from pathlib import Path
import torch
from backbone.vit import load_backbone
from tests.conftest import tiny_config
for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
    del sys.modules[name]
config = tiny_config(backbone_type="glyphs_vit", pretrained=True)
assert load_backbone(config, torch.device("cpu"), Path({str(tmp_path)!r})).feature_dim == 128
assert not {{"timm", "torchvision"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "changed", [{"image_size": 64}, {"normalize": True}, {"pooling": "avg"}, {"precision": "bf16"}], ids=str
)
def test_another_key_is_another_record(tmp_path, changed):
    first, other = load(tmp_path), load(tmp_path, **changed)
    assert len(list((tmp_path / "backbones").iterdir())) == 2
    assert (first.image_size, first.normalize, first.pooling, first.precision) != (
        *(other.image_size, other.normalize, other.pooling, other.precision),
    )


def test_changed_weights_are_read_at_once_and_such_as_look_unchanged_are_refused_when_they_are_needed(
    tmp_path, weights
):
    first = load(tmp_path, backbone_weights=str(weights))
    state, before = torch.load(weights), weights.stat()
    state["norm.bias"] += 1
    torch.save(state, weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    looks_unchanged = load(tmp_path, backbone_weights=str(weights))
    assert looks_unchanged.weights_sha256 == first.weights_sha256 and weights.stat().st_size == before.st_size
    with pytest.raises(BackboneError, match="the weights of vit_tiny_patch16_224 are others than its features were"):
        looks_unchanged(IMAGES)
    now = load(tmp_path, backbone_weights=str(weights))  # the record is gone
    state["norm.bias"] += 1
    torch.save(state, weights)
    os.utime(weights, ns=(0, 0))
    assert len({b.weights_sha256 for b in (first, now, load(tmp_path, backbone_weights=str(weights)))}) == 3


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"facts": {"name": 1}}', "\0"])
def test_a_record_that_cannot_be_read_or_written_is_none(tmp_path, damage):
    expected = load(tmp_path).weights_sha256
    (record,) = (tmp_path / "backbones").iterdir()
    record.write_text(damage)
    assert load(tmp_path).weights_sha256 == expected and len(record.read_text()) > 100
    (tmp_path / "file").touch()
    assert load(tmp_path / "file").weights_sha256 == expected


def test_a_forked_process_answers():
    threads, backbone = torch.get_num_threads(), load(None, image_size=224)
    images = torch.zeros(8, 3, 224, 224, dtype=torch.uint8)
    torch.set_num_threads(2)  # whose second one a forked process lacks
    try:
        backbone(images)
        if (child := fork()) == 0:
            backbone(images)
            os._exit(0)
    finally:
        torch.set_num_threads(threads)
    for _ in range(600):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("it hangs")
