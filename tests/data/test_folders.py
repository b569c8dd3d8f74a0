"""What is an image, what is not, and what is said of the rest: one walk for training, the data check and predict."""

import json
import logging
import os
import re
import shutil
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
import predict
from tests.conftest import TINY, tiny_config
from utils.data.check import check_data
from utils.data.datasets import load_dataset
from utils.data.folders import Unused, Walk, find_images
from utils.data.images import image_suffixes, open_image
from utils.data.tasks import LearnedClasses, make_stream
from utils.errors import BankError, DataError
from utils.features.rows import TEST_VIEW, FolderRows

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def image(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, 0, 0)).save(path, "PNG")
    return path


def folder(root: Path, *files: str) -> Path:
    for level, name in enumerate(files):
        image(root / name, level)
    return root


def found(root: Path) -> list[str]:
    return list(Walk(Unused()).images(root))


def load(root: Path, **keys: object):
    return load_dataset(tiny_config(data_path=str(root), **keys))


# -- which files are images -------------------------------------------------------------------------------------------


def test_every_suffix_that_pillow_decodes_is_an_image_in_any_letter_case(tmp_path):
    names = [name for suffix in image_suffixes() for name in (f"a{suffix}", f"b{suffix.upper()}", f"c{suffix.title()}")]
    for name in names:
        (tmp_path / name).touch()
    assert found(tmp_path) == sorted(names)


def test_a_file_without_suffix_is_looked_into(tmp_path):
    image(tmp_path / "photo")
    (tmp_path / "LICENSE").write_text("no image")
    unused = Unused()
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._1.png"):  # files of machines are not even counted
        (tmp_path / name).touch()
    assert list(Walk(unused).images(tmp_path)) == ["photo"]
    assert unused.sentence() == "1 without suffix"


SYSTEM = ["__MACOSX", "@eaDir", ".Trash", "System Volume Information", "lost+found", "$RECYCLE.BIN", "#recycle", ".git"]


@pytest.mark.parametrize("name", [*SYSTEM, "recycler", ".NET"])
def test_folders_of_machines_are_no_data_at_any_depth_and_images_there_are_said(tmp_path, name, caplog):
    folder(tmp_path, "train/a/1.png", "test/a/1.png", f"train/{name}/2.png", f"train/a/deep/{name}/x/3.png")
    (tmp_path / "test" / name).mkdir()
    (tmp_path / "test" / name / "notes").touch()
    with caplog.at_level(logging.INFO):
        data = load(tmp_path)
    assert data.class_names == ("a",)
    assert data.train.keys == ("a/1.png",)
    said = f"not used of the train split: 2 folder(s) named {name!r}, which hold images"
    assert [record.getMessage() for record in caplog.records] == [f"Data: {said}"]
    checked = check_data(tiny_config(data_path=str(tmp_path), image_size=1))
    assert checked["images_by_class"]["train"] == {"a": 1} and said in checked["warnings"]
    unused = Unused()
    assert [path.name for path in find_images([tmp_path / "train"], unused)] == ["1.png"]
    assert unused.sentence() == f"2 folder(s) named {name!r}, which hold images"


def test_the_snapshots_of_a_network_disk_are_not_walked_to_their_end(tmp_path, monkeypatch):
    folder(tmp_path, "train/a/1.png", "test/a/1.png", *(f"train/.snapshot/hourly.{n}/a/1.png" for n in range(9)))
    walked, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda top: (walked.append(step[0]) or step for step in walk(top)))
    assert load(tmp_path).train.keys == ("a/1.png",)
    assert len(walked) == 3


def test_what_is_not_used_is_counted_by_suffix_in_log_and_data_check(tmp_path, caplog):
    folder(tmp_path, "train/a/1.png", "test/a/1.png", "train/stray.png")
    for name in ["train/a/x.txt", "train/a/deeper/y.TXT", "train/a/clip.mp4", "test/a/notes"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    expected = {
        "train": "not used of the train split: 1 .mp4, 1 .png beside the folders, 2 .txt",
        "test": "not used of the test split: 1 without suffix",
    }
    for sentence in expected.values():
        assert caplog.text.count(sentence) == 1
    assert check_data(tiny_config(data_path=str(tmp_path)))["warnings"][:2] == list(expected.values())


def test_training_the_data_check_and_predict_find_the_same(tmp_path):
    folder(tmp_path, "train/a/1.png", "train/a/x/2.JPG", "train/a/@eaDir/3.png", "train/a/photo", "test/a/1.png")
    (tmp_path / "train/a/notes.txt").touch()
    expected = {"a/1.png", "a/photo", "a/x/2.JPG"}
    assert set(load(tmp_path).train.keys) == expected
    predicted = find_images(predict.named_paths([str(tmp_path / "train")]))
    assert {path.relative_to(tmp_path / "train").as_posix() for path in predicted} == expected
    assert check_data(tiny_config(data_path=str(tmp_path)))["images_by_class"]["train"] == {"a": 3}


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("a/all", "train"),  # its parent, which holds the other classes
        ("b/more", "train/a"),  # another class, which is walked before
        ("a/more", "train/b"),  # and one that is walked after
        ("a/deep", ""),  # what holds both splits
        ("b/up", ".."),  # and what lies above that
        ("a/twice", "other"),  # of elsewhere, and there is a second link
    ],
)
def test_nothing_is_walked_twice_in_a_split_wherever_a_link_leads(tmp_path, caplog, link, to):
    root = folder(
        tmp_path / "data", *(f"{split}/{name}/{split}-{name}.png" for split in ("train", "test") for name in "ab")
    )
    image(tmp_path / "data" / "other" / "0.png", 9)
    (root / "train" / link).symlink_to(root / to)
    (root / "train" / "b" / "z").symlink_to(root / "other")
    with caplog.at_level(logging.INFO):
        data = load(root)
    names = sorted(Path(key).name for key in data.train.keys)
    assert names == ["0.png", "train-a.png", "train-b.png"]
    assert {key[0]: label for key, label in zip(data.train.keys, data.train.labels.tolist(), strict=True)} == {
        "a": 0,
        "b": 1,
    }
    said = "not used of the train split: 1 folder(s) that a link leads to again"
    assert said in caplog.text
    checked = check_data(tiny_config(data_path=str(root)))
    assert checked["images_by_class"]["train"] == {
        name: sum(key.startswith(f"{name}/") for key in data.train.keys) for name in "ab"
    }
    assert not checked["problems"] and said in checked["warnings"]


def test_a_class_that_is_a_link_to_another_is_a_problem_of_a_run_and_of_the_check(tmp_path):
    folder(tmp_path, "train/a/1.png", "test/a/1.png", "test/b/1.png")
    (tmp_path / "train" / "b").symlink_to("a")
    (tmp_path / "test" / "a" / "1.png").rename(tmp_path / "test" / "a" / "1.heic")
    others = r"class 'a' in .*test holds no image \(but 1 \.heic\)"
    assert re.search(others, check_data(tiny_config(data_path=str(tmp_path)))["problems"]["folders"][1])
    problem = r"class 'b' in .*train holds no image \(but links to another class\); remove the folder"
    with pytest.raises(DataError, match=problem):
        load(tmp_path)
    assert re.search(problem, check_data(tiny_config(data_path=str(tmp_path)))["problems"]["folders"][0])


def test_the_test_split_may_be_a_link_to_the_training_split(tmp_path):
    folder(tmp_path, "train/a/1.png")
    (tmp_path / "test").symlink_to("train")
    assert load(tmp_path).test.keys == ("a/1.png",)


def test_special_files_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "without")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.png"))
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        files = list(find_images([tmp_path]))
        said = {}
        for path in files:
            with pytest.raises(DataError) as caught:
                open_image(path)
            said[path.name] = str(caught.value)
    assert set(said) == {"pipe.png", "s.png", "zero.png"}  # each is one line of predict; without suffix: not used
    for name, line in said.items():
        assert "(it is a device, pipe or socket" in line, name


# -- a folder that does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["Train", "Test", "__MACOSX"], r"train' does not exist; found Test, Train; expected <folder>/train"),
        ([], "found nothing there"),
        ([f"c{number:02d}" for number in range(30)], r"found c00, .*c15, … ?;|found c00, .*c1\d, …;"),
    ],
)
def test_what_is_there_in_place_of_train_is_named(tmp_path, folders, words):
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=words):
        load(tmp_path)


def test_test_beside_val_is_said(tmp_path, caplog):
    folder(tmp_path, "train/a/1.png", "test/a/1.png", "val/a/1.png")
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    assert "has test/ and val/: test/ is used" in caplog.text
    shutil.rmtree(tmp_path / "test")
    assert len(load(tmp_path).test) == 1
    folder(tmp_path, "test/a/1.png")
    assert any("test/ is used" in warning for warning in check_data(tiny_config(data_path=str(tmp_path)))["warnings"])


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DECOMPOSED, f"{COMPOSED} ", f" {COMPOSED}"])
def test_names_that_look_the_same_are_one_class_in_train_and_test(tmp_path, name):
    data = load(folder(tmp_path, f"train/{COMPOSED}/1.png", f"test/{name}/1.png"))
    assert data.class_names == (COMPOSED,)
    assert data.test.load(0).size == (6, 4)  # found under the name that its folder has
    assert check_data(tiny_config(data_path=str(tmp_path)))["good"]


def test_two_folders_that_look_the_same_are_one_error(tmp_path):
    folder(tmp_path, f"train/{COMPOSED}/1.png", f"train/{DECOMPOSED}/2.png", "test/a/1.png")
    with pytest.raises(DataError, match=r"caf.*and .*caf.*, which look the same; rename one"):
        load(tmp_path)
    assert "look the same" in check_data(tiny_config(data_path=str(tmp_path)))["problems"]["folders"][0]


def test_domains_and_their_classes_have_one_spelling(tmp_path):
    files = [f"train/photo {COMPOSED}/cat/1.png", f"test/photo {DECOMPOSED}/cat/1.png"]
    files += [f"train/sketch/{DECOMPOSED}/1.png", f"test/sketch/{COMPOSED}/1.png"]
    data = load(folder(tmp_path, *files), scenario="domain")
    assert data.domain_names == (f"photo {COMPOSED}", "sketch")
    assert data.class_names == (COMPOSED, "cat")
    assert [data.test.load(i).size for i in range(2)] == [(6, 4)] * 2
    findings = check_data(tiny_config(data_path=str(tmp_path), scenario="domain"))
    assert "folders" not in findings["problems"]


def test_letter_case_tells_classes_apart_and_is_never_guessed(tmp_path):
    folder(tmp_path, "train/Cat/1.png", "test/cat/1.png")
    with pytest.raises(DataError, match=r"class 'cat' is in .*test but not in .*train"):
        load(tmp_path)
    folder(tmp_path, "train/cat/1.png", "test/Cat/1.png")
    assert load(tmp_path).class_names == ("Cat", "cat")


def test_old_test_images_find_their_class_under_another_form(tmp_path):
    folder(tmp_path, "train/new/1.png", "test/new/1.png", f"test/{DECOMPOSED} /1.png", "test/dog/1.png")
    config = tiny_config(data_path=str(tmp_path), init_cls=1, increment=1, continue_from="tosca")
    learned = LearnedClasses((COMPOSED, "dog"), np.arange(2), (2,))
    stream = make_stream(load_dataset(config), config, 1993, learned)
    assert stream.class_names == (COMPOSED, "dog", "new")
    assert [len(task.test) for task in stream.tasks] == [2, 1]


def test_names_that_are_not_utf8_survive_training_resuming_and_the_check(tmp_path, make_folder, capsys):
    data = make_folder(tmp_path / "data", classes=2)
    odd = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        (data / split / "0").rename(data / split / odd)
        first = next((data / split / odd).iterdir())
        first.rename(first.with_name(os.fsdecode(b"\xff.png")))
    keys = {"data_path": str(data), "checkpoint_dir": str(tmp_path / "tosca"), "log_dir": str(tmp_path / "logs")}
    keys |= {"init_cls": 1, "increment": 1, "cache_dir": str(tmp_path / "bank")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, **keys}))
    assert main.main([f"--config={path}"]) == 0
    text = (tmp_path / "tosca" / "run.manifest").read_bytes().decode("utf-8")  # any JSON reader can
    assert odd in json.loads(text)["class_order"]
    capsys.readouterr()
    assert main.main([f"--config={path}"]) == 0  # read back: nothing is computed again
    assert main.main(["--check-data", "--json", f"--config={path}"]) in (0, 1)
    out = capsys.readouterr().out
    assert odd in json.loads(out[out.index("{\n") :])["images_by_class"]["train"]


def test_the_key_max_pixels_reaches_every_reader_of_the_data(tmp_path):
    folder(tmp_path, "train/a/1.png", "test/a/2.png")
    small, enough = (tiny_config(data_path=str(tmp_path), max_pixels=limit) for limit in (23, 24))
    assert load_dataset(enough).train.load(0).size == (6, 4)
    with pytest.raises(DataError, match="above max_pixels 23"):
        load_dataset(small).train.load(0)
    assert len(check_data(small)["problems"]["unreadable"]) == 2


@pytest.fixture
def locked(tmp_path, monkeypatch) -> Path:
    """A folder that may not be searched, as another user's; root may search all."""
    folder, stat = tmp_path / "locked", os.stat

    def refused(path: object, *args: object, **options: object) -> os.stat_result:
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    folder.mkdir()
    monkeypatch.setattr(os, "stat", refused)
    return folder


def test_a_folder_that_may_not_be_searched_is_named(locked):
    with pytest.raises(DataError, match=rf"{locked}/data cannot be read \(Permission denied\)"):
        load(locked / "data")
    assert list(find_images([locked / "a.jpg"])) == [locked / "a.jpg"]  # decoding names it
    predict.check_paths([str(locked / "a.jpg")])
    with pytest.raises(BankError, match=rf"{locked}/bank/test.npy cannot be read \(Permission denied\); .*cache_dir"):
        FolderRows(locked / "bank", (1, 1), {}, 0).complete(TEST_VIEW)


def test_a_folder_that_cannot_be_read_costs_the_check_no_other_class(tmp_path):
    folder(tmp_path, *(f"{split}/{name}/{name}.png" for split in ("train", "test") for name in "ab"))
    (tmp_path / "train" / "a" / "loop").symlink_to("loop")
    (problem,) = check_data(tiny_config(data_path=str(tmp_path)))["problems"]["folders"]
    assert problem.startswith(f"{tmp_path}/train/a/loop cannot be read (Too many levels of symbolic links)")
