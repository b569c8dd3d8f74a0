import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import trainer
from utils.data.tasks import LearnedClasses
from utils.errors import DataError, NumericError
from utils.runs.checkpoint import CheckpointFolder


def split_folder(source, folder, train, test):
    """A data folder with the classes ``train`` of ``source`` to learn and those of ``test`` to test."""
    for split, classes in (("train", train), ("test", test)):
        for name in classes:
            shutil.copytree(source / split / name, folder / split / name)
    return folder


def tensors(checkpoint_dir):
    checkpoint = CheckpointFolder(checkpoint_dir)
    return checkpoint.load(checkpoint.read_manifest())


def assert_same_tensors(found, expected):
    torch.testing.assert_close(tensors(found), tensors(expected), rtol=0, atol=0)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def raising(error):
    def act(*_):
        raise error

    return act


def comparable(run):
    """What a run's JSON says about results: all but names, times and what it cost."""
    keys = ("results", "selection_accuracy", "confusion", "entropy", "class_order", "task_sizes", "sparsity")
    return {key: run[key] for key in keys}


@pytest.fixture(scope="session")
def whole(run_main, make_folder, tmp_path_factory):
    """Six classes in three tasks from the start."""
    folder = tmp_path_factory.mktemp("whole")
    return run_main(folder, data_path=str(make_folder(folder / "data", classes=6)), shuffle=False, train_views=2)


@pytest.fixture(scope="session")
def first(run_main, whole, tmp_path_factory):
    """The first four of those classes in two tasks."""
    folder = tmp_path_factory.mktemp("first")
    data = split_folder(whole.folder / "data", folder / "data", "0123", "0123")
    return run_main(folder, data_path=str(data), shuffle=False, train_views=2)


@pytest.fixture
def go_on(run_main, whole, first, tmp_path):
    """Learns classes 4 and 5 on top of ``first`` (or of ``base``), testing all six classes or those of ``test``."""

    def run(*arguments, base=first.checkpoints, test="012345", train="45", **keys):
        folder = tmp_path / f"{train}-{test}"
        if not folder.exists():
            split_folder(whole.folder / "data", folder, train, test)
        keys = {"data_path": str(folder), "shuffle": False, "train_views": 2, "continue_from": str(base), **keys}
        return run_main(tmp_path, *arguments, **keys)

    return run


# -- the same as from the start ---------------------------------------------------------------------------------------


def test_a_continued_run_equals_one_that_had_all_tasks(go_on, whole):
    grown = go_on()
    assert grown.code == 0
    assert_same_tensors(grown.checkpoints, whole.checkpoints)
    assert comparable(grown.json()) == comparable(whole.json())


def test_it_costs_the_forwards_of_its_own_images(go_on, first):
    grown = go_on(test="45")
    images = 2 * 4 * (1 + 2) + 2 * 3  # new training images under the test transform and two views; test images
    assert grown.json()["backbone_forwards"] == images


def test_the_saved_run_stays_as_it_is(go_on, first):
    before = files_of(first.checkpoints)
    go_on()
    assert files_of(first.checkpoints) == before


def test_twice_continued_equals_one_run(go_on, run_main, whole, first, tmp_path):
    two = go_on(train="4", test="01234", init_cls=1)
    three = go_on(base=two.checkpoints, train="5", init_cls=1, checkpoint_dir=str(tmp_path / "three"))
    expected = run_main(
        tmp_path / "expected",
        **{"data_path": str(whole.folder / "data"), "shuffle": False, "train_views": 2, "increment": 1, "init_cls": 2},
    )
    assert (three.code, expected.code) == (0, 0)
    assert three.json()["task_sizes"] == [2, 2, 1, 1]
    assert three.json()["class_order"] == expected.json()["class_order"]


def test_new_classes_are_shuffled_among_themselves(go_on):
    order = go_on(test="45", shuffle=True).json()["class_order"]
    assert (order[:4], sorted(order[4:])) == (list("0123"), list("45"))


# -- what is evaluated ------------------------------------------------------------------------------------------------


def test_without_old_test_data_the_new_classes_are_tested_alone(go_on):
    grown = go_on(test="45")
    run = grown.json()
    assert run["base"]["evaluation"] == "new classes alone"
    assert "evaluation covers new classes alone" in grown.log()
    assert "Of the new classes alone: the classes learned before were not tested" in grown.log()
    assert run["task_sizes"] == [2]
    for result in run["results"].values():
        assert len(result["top1_curve"]) == len(result["matrix"]) == len(result["matrix"][0]) == 1
        assert result["last"] == result["matrix"][0][0]
    assert "'00-01'" not in grown.log()
    assert "'04-05'" in grown.log()


def test_with_old_test_data_all_classes_are_tested(go_on):
    grown = go_on()
    assert grown.json()["base"]["evaluation"] == "old and new classes"
    assert "evaluation covers old and new classes" in grown.log()
    assert "Of the new classes alone" not in grown.log()
    assert len(grown.json()["results"]["sample"]["top1_curve"]) == 3


def test_some_of_the_old_test_data_is_an_error(go_on, capsys):
    assert go_on(test="0145").code == 2
    assert "not '2'; give the test images of all of them, or of none" in capsys.readouterr().err


# -- never lost, always resumable -------------------------------------------------------------------------------------


def test_in_its_own_folder_it_is_one_line_and_changes_nothing(go_on, first, tmp_path, capsys):
    own = shutil.copytree(first.checkpoints, tmp_path / "tosca")
    before = files_of(own)
    assert go_on(base=own).code == 2
    assert (
        "continue_from and checkpoint_dir are both" in (said := capsys.readouterr().err)
        and "set checkpoint_dir=<another>" in said
    )
    assert files_of(own) == before and not list(tmp_path.glob("tosca.*"))


def test_killed_before_its_first_commit_the_next_start_begins_with_the_saved_run(go_on, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "_with_lines", raising(KeyboardInterrupt))
        assert go_on().code == 130
    assert {path.name for path in (tmp_path / "tosca").glob("*.pth")} > {"task0.pth", "task2.pth"}
    grown = go_on()
    assert grown.code == 0
    assert not list(tmp_path.glob("tosca.*"))
    assert_same_tensors(grown.checkpoints, whole.checkpoints)
    assert comparable(grown.json()) == comparable(whole.json())


def test_stopped_after_a_task_it_goes_on(go_on, first, tmp_path, monkeypatch):
    evaluate, calls = trainer.evaluate, []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise NumericError("stopped")
        return evaluate(*arguments)

    keys = {"init_cls": 1, "increment": 1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", stop_at_the_second)
        assert go_on(**keys).code == 2
    assert len(CheckpointFolder(tmp_path / "tosca").read_manifest().tasks) == 3
    resumed = go_on(**keys)
    assert resumed.code == 0
    assert "Resuming from" in resumed.log()
    uninterrupted = go_on(**keys, checkpoint_dir=str(tmp_path / "other"))
    assert_same_tensors(resumed.checkpoints, uninterrupted.checkpoints)
    assert comparable(resumed.json()) == comparable(uninterrupted.json())


def test_another_run_in_the_folder_is_moved_aside(go_on, run_main, whole, tmp_path):
    other = run_main(tmp_path, data_path=str(whole.folder / "data"), epochs=1)
    before = files_of(other.checkpoints)
    go_on()
    assert [files_of(path) for path in tmp_path.glob("tosca.*")] == [before]


def test_an_api_run_can_be_continued(go_on, first, tmp_path):
    from models import ContinualClassifier

    model = ContinualClassifier.load(first.checkpoints)
    model.learn(torch.rand(2, 3, 32, 32), ["x", "y"])
    model.save(tmp_path / "by_hand")
    grown = go_on(base=tmp_path / "by_hand", test="45")
    assert grown.code == 0
    assert grown.json()["class_order"] == ["0", "1", "2", "3", "x", "y", "4", "5"]


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_a_class_that_is_known_is_an_error_with_the_ways_out(go_on, capsys):
    assert go_on(train="345").code == 2
    error = capsys.readouterr().err
    assert "class '3' is learned already" in error
    assert "rename" in error
    assert "scenario=domain" in error


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"flow": "tosca_r"}, "flow 'tosca_r' is not that of the run"),
        ({"mlp_ratio": 8}, "set mlp_ratio=16"),
        ({"normalize": True}, "set normalize=False"),
        ({"model_name": "simplecil"}, "set model_name=tosca"),
        ({"model_name": "linear_joint"}, "linear_joint needs the data of all tasks"),
        ({"seed": [1]}, "set seed=1993"),
        ({"seed": [1993, 1]}, "set seed=1993"),
        ({"backbone_type": "vit_small_patch16_224"}, "weights_sha256"),
        ({"continue_from": "nowhere"}, "'nowhere' holds no run"),
        ({"init_cls": 3}, "init_cls 3 is above"),
    ],
)
def test_a_run_that_does_not_fit_is_one_line_and_changes_nothing(go_on, tmp_path, capsys, keys, words):
    assert go_on(**keys).code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "tosca").exists()


def test_an_unfinished_run_is_to_be_finished_first(go_on, first, tmp_path, capsys):
    base = CheckpointFolder(shutil.copytree(first.checkpoints, tmp_path / "base"))
    manifest = base.read_manifest()
    base.write_manifest(replace(manifest, status="running", task_sizes=(2, 2, 2)))
    assert go_on(base=base.folder).code == 2
    assert "has learned 2 of 3 tasks; finish it" in capsys.readouterr().err


def test_a_damaged_base_is_found_before_anything_is_written(go_on, first, tmp_path, capsys):
    base = shutil.copytree(first.checkpoints, tmp_path / "base")
    (base / "task1.pth").write_bytes(b"damaged")
    assert go_on(base=base).code == 2
    assert "task1.pth is damaged" in capsys.readouterr().err
    assert not list((tmp_path / "tosca").glob("*.pth"))


def test_a_test_folder_of_an_unknown_class_is_an_error(go_on, whole, tmp_path, capsys):
    go_on(test="45")
    shutil.copytree(whole.folder / "data" / "test" / "0", tmp_path / "45-45" / "test" / "zebra")
    assert go_on(test="45").code == 2
    assert "class 'zebra' has test images, but there are no images to learn it from" in capsys.readouterr().err


# -- what was learned -------------------------------------------------------------------------------------------------


def test_learned_grows_by_classes():
    learned = LearnedClasses(("a", "b"), np.array([0, 1]), (2,)).with_task(["c"])
    assert (learned.class_names, learned.row_class.tolist()) == (("a", "b", "c"), [0, 1, 2])
    assert learned.task_rows == [range(0, 2), range(2, 3)]
    with pytest.raises(DataError, match="class 'a' is learned already"):
        learned.with_task(["a"])


def test_learned_grows_by_domains_with_a_row_for_each_class_again():
    learned = LearnedClasses(("a", "b"), np.array([0, 1]), (2,)).with_task(["b", "c"], "photo")
    assert (learned.class_names, learned.row_class.tolist()) == (("a", "b", "c"), [0, 1, 1, 2])
    assert learned.domains == ("", "photo")
    with pytest.raises(DataError, match="domain 'photo' is learned already"):
        learned.with_task(["a"], "photo")
