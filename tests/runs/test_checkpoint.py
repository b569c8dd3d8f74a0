import errno
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from backbone.luca import LuCA, make_luca
from models.api.classifier import ContinualClassifier
from models.tosca import TOSCA
from tests.backbone.test_luca import SHAPES_OF_768
from tests.conftest import tiny_config
from utils import files
from utils.errors import CheckpointError, UserError
from utils.files import open_regular
from utils.runs import checkpoint
from utils.runs.checkpoint import CheckpointFolder, load_tensors
from utils.runs.manifest import RunManifest

SHAPES = {f"backbone.tosca.{name}": shape for name, shape in SHAPES_OF_768.items()}


def luca(seed: int) -> LuCA:
    return make_luca(768, mlp_ratio=16, se_ratio=16, flow="tosca", first=True, seed=seed)


def manifest() -> RunManifest:
    rows = range(24)
    return RunManifest(
        **{"identity": {}, "config": {}, "seed": 0, "backbone": {}, "data": {}, "versions": {}},
        class_order=tuple(map(str, rows)),
        task_sizes=(2,) * 12,
        row_class=tuple(rows),
    )


@pytest.fixture
def saved(tmp_path) -> tuple[CheckpointFolder, RunManifest, list[LuCA]]:
    """Two tasks of width 768."""
    folder, values, lucas = CheckpointFolder(tmp_path / "tosca"), manifest(), [luca(1), luca(2)]
    for task, module in enumerate(lucas):
        state = {"weight": torch.full((2 * task + 2, 768), float(task)), "sigma": torch.tensor(3.0)}
        values = folder.commit(values, state, {task: module.state_dict()})
    return folder, values, lucas


def test_a_module_file_is_a_plain_state_dict_with_the_releases_keys_and_shapes(saved):
    folder, _, lucas = saved
    for task, module in enumerate(lucas):
        state = torch.load(folder.folder / f"task{task}.pth", weights_only=True)
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SHAPES
        assert list(state) == list(SHAPES)
        for name, tensor in module.state_dict().items():
            assert torch.equal(state[f"backbone.tosca.{name}"], tensor)


def test_our_module_loads_into_a_model_laid_out_like_the_releases(saved):
    network = nn.Module()
    network.backbone = nn.Module()
    network.backbone.tosca = luca(9)
    network.load_state_dict(torch.load(saved[0].folder / "task1.pth", weights_only=True), strict=True)
    torch.testing.assert_close(network.backbone.tosca.state_dict(), saved[2][1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_the_release_loads_here(tmp_path, zipped):
    module = luca(4)
    state = OrderedDict((f"backbone.tosca.{name}", tensor) for name, tensor in module.state_dict().items())
    torch.save(state, tmp_path / "task0.pth", _use_new_zipfile_serialization=zipped)
    ours = luca(5)
    ours.load_state_dict(load_tensors(tmp_path / "task0.pth"), strict=True)
    torch.testing.assert_close(ours.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_what_was_saved_comes_back_and_only_the_last_classifier_is_kept(saved):
    folder, values, lucas = saved
    assert folder.read_manifest() == values
    state, modules = folder.load(values)
    assert state["weight"].shape == (4, 768) and state["sigma"].item() == 3.0
    for found, module in zip(modules, lucas, strict=True):
        torch.testing.assert_close(found, dict(module.state_dict()), rtol=0, atol=0)
    assert sorted(path.name for path in folder.folder.glob("*.pth")) == ["classifier1.pth", "task0.pth", "task1.pth"]


def test_modules_come_back_in_the_order_of_their_tasks_also_beyond_ten(tmp_path):
    folder, values = CheckpointFolder(tmp_path), manifest()
    for task in range(12):
        module = {"norm.bias": torch.tensor([float(task)])}
        values = folder.commit(values, {"sigma": torch.tensor(1.0)}, {task: module})
    values = replace(values, files=dict(sorted(values.files.items())))  # task0, task1, task10, task11, task2 …
    assert [module["norm.bias"].item() for module in folder.load(values)[1]] == list(range(12))


def test_a_missing_file_is_named(saved):
    folder, values, _ = saved
    (folder.folder / "task1.pth").unlink()
    with pytest.raises(CheckpointError, match=r"task1\.pth is missing"):
        folder.load(values)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"weight": Hostile(tmp_path / "owned")}, tmp_path / "task0.pth")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        load_tensors(tmp_path / "task0.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("value", [{"weight": 3}, [torch.zeros(1)], torch.zeros(2)])
def test_what_is_no_state_dict_of_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "task0.pth")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        load_tensors(tmp_path / "task0.pth")


def test_another_run_is_moved_aside_whole_and_nothing_else_with_it(saved):
    folder, _, _ = saved
    (folder.folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.run_files()}
    aside = folder.move_aside()
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert folder.run_files() == [] and folder.read_manifest() is None
    assert (folder.folder / "notes.txt").read_text() == "mine"
    assert folder.move_aside() is None


def test_a_finished_run_predicts_from_its_files_alone(finished_run):
    folder = CheckpointFolder(finished_run.checkpoints)
    state, modules = folder.load(folder.read_manifest())
    assert len(modules) == 3 and state["weight"].shape == (6, 192)
    learner = TOSCA(tiny_config(), 192, torch.device("cpu"), 1993)
    learner.load_state_dict(state, modules)
    features = torch.randn(4, 192, generator=torch.Generator().manual_seed(1))
    assert learner.answer(features).scores.shape == (4, 6)
    for task, module in enumerate(modules):
        assert {f"backbone.tosca.{name}" for name in module} == SHAPES.keys()
        # no more than the module: torch.save of a view would write the tensor of all tasks behind it
        assert (folder.folder / f"task{task}.pth").stat().st_size < sum(p.numel() for p in module.values()) * 4 + 8_000


def test_the_default_type_of_the_process_does_not_matter(finished_run):
    images = sorted((Path(finished_run.config["data_path"]) / "test").rglob("*.png"))
    new = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    answers = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            model = ContinualClassifier.load(finished_run.checkpoints)
            model.learn(new, ["x", "y"])
            assert torch.get_default_dtype() == dtype
            answers.append(model.predict(images).probabilities)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*answers)


REFUSALS = {
    "open files": (OSError(errno.EMFILE, "Too many open files"), r"cannot be read \(Too many open .*ulimit -n"),
    "permission": (PermissionError(errno.EACCES, "Permission denied"), r"cannot be read \(Permission denied\)"),
    "memory": (MemoryError("Unable to allocate"), "Unable to allocate"),
    "PyTorch's memory": (RuntimeError("can't allocate memory: 9 bytes"), "can't allocate memory"),
}


@pytest.mark.parametrize("name", ["task0.pth", "classifier1.pth", "run.manifest", "results.jsonl"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_the_machine_refuses_is_not_called_damage(saved, monkeypatch, name, kind):
    folder, values, _ = saved
    error, words = REFUSALS[kind]

    def refusing(path: Path) -> object:
        if path.name == name:
            raise error
        return open_regular(path)

    for module in (files, checkpoint):
        monkeypatch.setattr(module, "open_regular", refusing)
    with pytest.raises((UserError, type(error)), match=words) as caught:
        folder.load(values)
        folder.read_manifest()
    assert "damaged" not in str(caught.value) and "--fresh" not in str(caught.value)


def test_a_folder_of_the_model_hubs_cache_is_read(saved, tmp_path):
    """The hub's client lays a snapshot of links out, to files that lie in ``blobs`` two folders above."""
    folder, values, _ = saved
    (snapshot := tmp_path / "cache" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for path in folder.run_files():
        path.rename(tmp_path / "cache" / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert CheckpointFolder(snapshot).read_manifest() == values
    assert len(CheckpointFolder(snapshot).load(values)[1]) == 2


def test_a_run_that_begins_writes_through_no_link(saved, tmp_path):
    folder, values, lucas = saved
    for path in folder.run_files():
        path.rename(outside := tmp_path / f"mine {path.name}")
        path.symlink_to(outside)
    before = {path: path.read_bytes() for path in tmp_path.glob("mine *")}
    folder.commit(values, {}, {0: lucas[0].state_dict(), 1: None})
    assert {path: path.read_bytes() for path in before} == before
