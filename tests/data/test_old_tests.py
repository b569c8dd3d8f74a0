"""Test images of old classes from recorded folders. Whole runs with them: tests/runs/test_continue.py."""

import shutil

import numpy as np
import pytest

from tests.conftest import tiny_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.old_tests import check_unchanged, folders_to_record, with_old_tests
from utils.data.splits import Dataset, ImageArray
from utils.data.tasks import LearnedClasses
from utils.errors import DataError

LEARNED = LearnedClasses(("0", "1", "2"), np.arange(3), (3,))


@pytest.fixture
def old(make_folder, tmp_path):
    """The folder of the first run: classes 0 to 2."""
    return make_folder(tmp_path / "old", classes=3)


@pytest.fixture
def recorded(old):
    return folders_of(old)


@pytest.fixture
def new(make_folder, old, tmp_path):
    """The data of the run that continues: classes 3 and 4."""
    root = make_folder(tmp_path / "new", classes=5)
    for split in ("train", "test"):
        for name in "012":
            shutil.rmtree(root / split / name)
    return load_dataset(tiny_config(data_path=str(root)))


def folders_of(root):
    data = load_dataset(tiny_config(data_path=str(root)))
    return folders_to_record(data, fingerprint_splits(data, None), [])


def look(new, recorded):
    joined = with_old_tests(new, recorded, LEARNED)
    check_unchanged(joined, fingerprint_splits(joined, None), recorded)
    return joined


def test_the_images_come_as_if_they_lay_beside_the_new_ones(new, old, recorded):
    joined = look(new, recorded)
    for name in "012":
        shutil.copytree(old / "test" / name, new.test.root / name)
    copied = load_dataset(tiny_config(data_path=str(new.test.root.parent), continue_from="tosca"))
    assert joined.class_names == copied.class_names
    assert joined.test.keys == copied.test.keys
    assert joined.test.labels.tolist() == copied.test.labels.tolist()
    assert fingerprint_splits(joined, None) == fingerprint_splits(copied, None)
    assert joined.test.path(len(new.test)).parent == old / "test" / "0"
    part = joined.test.subset(np.array([0, len(new.test)]))
    assert [part.path(0).parent.parent, part.path(1).parent.parent] == [new.test.root, old / "test"]


def test_the_record_names_each_folder_once_the_newest_last(new, old, recorded):
    both = folders_to_record(new, fingerprint_splits(new, None), recorded)
    assert [facts["folder"] for facts in both] == [str((old / "test").resolve()), str(new.test.root.resolve())]
    assert [facts["images"] for facts in both] == [9, 6]
    assert folders_to_record(new, fingerprint_splits(new, None), both) == both


def _move(test):
    test.rename(test.parent / "elsewhere")


def _exchange(test):
    first, second = sorted((test / "0").iterdir())[:2]
    second.write_bytes(first.read_bytes())


def _rename(test):
    image = min((test / "0").iterdir())
    image.rename(image.with_name("z.png"))


def _add_an_image(test):
    shutil.copy(min((test / "0").iterdir()), test / "1" / "new.png")


def _add_a_class(test):
    shutil.copytree(test / "0", test / "zebra")


def _remove_a_class(test):
    shutil.rmtree(test / "2")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_move, "old/test does not exist any more"),
        (_exchange, r"are not those that the saved run was tested on \(9 images now, 9 then\)"),
        (_rename, r"are not those that the saved run was tested on \(9 images now, 9 then\)"),
        (_add_an_image, r"are not those that the saved run was tested on \(10 images now, 9 then\)"),
        (_add_a_class, "holds class 'zebra', which is not one of those to be tested there"),
        (_remove_a_class, "records no test folder with class '2'"),
    ],
)
def test_other_images_than_those_recorded_are_refused(new, old, recorded, damage, words):
    damage(old / "test")
    with pytest.raises(DataError, match=words):
        look(new, recorded)


def test_data_that_has_some_of_the_old_classes_stays_as_it_is(new, old, recorded):
    shutil.copytree(old / "test" / "0", new.test.root / "0")
    data = load_dataset(tiny_config(data_path=str(new.test.root.parent), continue_from="tosca"))
    assert with_old_tests(data, recorded, LEARNED) is data  # the stream says that all or none are to be there


def test_arrays_are_not_in_folders(recorded):
    split = ImageArray(np.zeros((2, 4, 4), dtype=np.uint8), [0, 1])
    data = Dataset("mine", split, split, ("a", "b"))
    assert folders_to_record(data, {"train": "", "test": ""}, []) == []
    with pytest.raises(DataError, match="the images of mine are not in folders"):
        with_old_tests(data, recorded, LEARNED)


def test_a_run_without_a_recorded_folder_is_said(new):
    with pytest.raises(DataError, match="records no test folder: its images lay in none, or"):
        with_old_tests(new, [], LEARNED)


def test_the_newest_folder_counts_where_it_has_the_images_of_all_runs_before(new, old, recorded, tmp_path):
    early = shutil.copytree(old, tmp_path / "early")
    shutil.rmtree(early / "train" / "2")
    shutil.rmtree(early / "test" / "2")
    joined = look(new, [*folders_of(early), *recorded])
    assert joined.test.keys == look(new, recorded).test.keys
    assert {joined.test.root_of(index) for index in range(len(joined.test))} == {new.test.root, old / "test"}


def test_domains_come_from_the_folders_of_several_runs(old, tmp_path):
    def data_of(*domains):
        for domain in domains:
            for split in ("train", "test"):
                shutil.copytree(old / split, tmp_path / domains[0] / split / domain)
        keys = {"data_path": str(tmp_path / domains[0]), "scenario": "domain", "init_cls": None, "increment": None}
        return load_dataset(tiny_config(**keys))

    recorded = [
        facts
        for data in (data_of("dark", "dim"), data_of("plain"))
        for facts in folders_to_record(data, fingerprint_splits(data, None), [])
    ]
    learned = LearnedClasses(("0", "1", "2"), np.tile(np.arange(3), 3), (3, 3, 3), ("dark", "dim", "plain"))
    joined = with_old_tests(data_of("odd"), recorded, learned)
    assert joined.domain_names == ("odd", "dark", "dim", "plain")
    assert {key.split("/")[0] for key in joined.test.keys} == {"odd", "dark", "dim", "plain"}
    assert len(joined.test) == len(joined.test_domains) == 4 * 9
