import hashlib
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from tests.conftest import ROOT, tiny_config
from utils.config import methods
from utils.data import datasets
from utils.data.datasets import DATASETS, load_dataset
from utils.data.transforms import Transforms
from utils.errors import DataError
from utils.seeds import derive_seed, fixed_seed


def image_file(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, 0, 0)).save(path)


def folder(root: Path, files: list[str]) -> Path:
    for level, name in enumerate(files):
        image_file(root / name, level)
    return root


def load(root: Path, dataset: str = "imagefolder"):
    return load_dataset(tiny_config(dataset=dataset, data_path=str(root)))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_classes_and_files_come_in_sorted_order(tmp_path):
    data = load(folder(tmp_path, ["train/b/2.png", "train/b/1.png", "train/a/9.png", "test/a/1.png", "test/b/1.png"]))
    assert data.class_names == ("a", "b")
    assert data.train.keys == ("a/9.png", "b/1.png", "b/2.png") and data.train.labels.tolist() == [0, 1, 1]
    assert [data.train.load(i).getpixel((0, 0))[0] for i in range(3)] == [2, 1, 0]
    assert data.test.labels.tolist() == [0, 1]


def test_upper_case_suffixes_and_nested_folders_are_read_and_hidden_files_skipped(tmp_path):
    names = ["train/a/1.PNG", "train/a/2.JpEg", "train/a/deep/er/3.png", "train/a/.4.png", "train/a/.hid/5.png"]
    root = folder(tmp_path, [*names, "train/.cache/6.png", "test/a/1.png"])
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    (root / "train" / "stray.png").write_bytes(b"")
    data = load(root)
    assert data.class_names == ("a",)
    assert data.train.keys == ("a/1.PNG", "a/2.JpEg", "a/deep/er/3.png")
    assert data.train.load(0).size == (6, 4)


@pytest.mark.parametrize(
    ("files", "remove", "message"),
    [
        ([], ".", r"data folder '.*' does not exist"),
        (["test/a/1.png"], None, r"train' does not exist"),
        (["train/a/1.png"], None, r"test' does not exist"),
        (["train/1.png", "test/a/1.png"], None, r"train holds no class folders"),
        (["train/a/1.png", "test/1.png"], None, r"test holds no class folders"),
        (["train/a/1.png", "test/a/1.png", "test/new/1.png"], None, r"class 'new' is in .*test but not in .*train"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png"], None, r"class 'b' is in .*train but not in .*test"),
    ],
)
def test_what_is_missing_is_one_error_that_shows_the_layout(tmp_path, files, remove, message):
    root = folder(tmp_path / "data", files)
    if remove is None:
        root.mkdir(exist_ok=True)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert "<folder>/train/<class>/<images>" in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_image_is_named_with_its_class(tmp_path):
    root = folder(tmp_path, ["train/a/1.png", "test/a/1.png"])
    (root / "train/a/1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"a/1\.png \(class 'a'\) is not a readable image"):
        load(root).train.load(0)


def test_without_data_path_the_environment_says_where(tmp_path, monkeypatch):
    folder(tmp_path / "cub", ["train/a/1.png", "test/a/1.png"])
    with pytest.raises(DataError, match=r"set data_path=<folder>, or the environment variable TOSCA_DATA.*cub/"):
        load_dataset(tiny_config(dataset="cub"))
    monkeypatch.setenv("TOSCA_DATA", str(tmp_path))
    assert load_dataset(tiny_config(dataset="cub")).class_names == ("a",)


def test_other_counts_than_the_published_split_give_one_warning_with_both_numbers(tmp_path, caplog):
    folder(tmp_path, ["train/a/1.png", "train/a/2.png", "test/a/1.png"])
    load(tmp_path, "imageneta")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert (
        "imageneta has 1 classes, 2 train and 1 test images" in message
        and "200 classes, 5981 train and 1519 test" in message
    )


def test_the_published_counts_are_those_of_the_benchmarks():
    published = {
        "cifar224": (100, 50_000, 10_000),
        "cub": (200, 9_430, 2_358),
        "imageneta": (200, 5_981, 1_519),
        "imagenetr": (200, 24_000, 6_000),
        "omnibenchmark": (300, 89_697, 5_985),
        "vtab": (50, 1_796, 8_619),
        "objectnet": (200, 26_509, 6_628),
    }
    assert {name: source.expected for name, source in DATASETS.items() if source.expected} == published
    assert set(DATASETS) == {*published, "imagefolder", "digits"} == set(methods.DATASETS)


# -- digits and CIFAR-100 ---------------------------------------------------------------------------------------------


def test_the_bundled_digits_have_1201_train_and_596_test_images_of_all_ten_classes(caplog):
    data = load_dataset(tiny_config(dataset="digits"))
    assert (len(data.train), len(data.test)) == (1_201, 596)
    assert data.class_names == tuple("0123456789")
    train, test = (np.bincount(split.labels, minlength=10) for split in (data.train, data.test))
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI and scikit-learn say
    assert test.tolist() == [n // 3 for n in (train + test).tolist()]  # every third image of every class
    assert data.train.pixels.max() == 255 and data.train.load(0).mode == "RGB"
    assert not caplog.records
    of_train, of_test = ({image.tobytes() for image in split.pixels} for split in (data.train, data.test))
    assert not of_train & of_test


def test_cifar_without_network_says_what_to_do(tmp_path, monkeypatch):
    def refuse(_, root, **__):
        Path(root).mkdir(exist_ok=True)  # as torchvision does first
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"CIFAR-100 is not in .*network is unreachable.*cifar-100-python\.tar\.gz"):
        load(tmp_path / "new", "cifar224")
    assert not (tmp_path / "new").exists()  # nothing is left of a download that failed


def test_a_cifar_folder_is_read_with_its_class_names_if_it_is_as_published(tmp_path, monkeypatch, caplog):
    pixels = np.arange(3 * 3072, dtype=np.uint64).reshape(3, 3072).astype(np.uint8)
    files = {
        "train": {"data": pixels, "fine_labels": [1, 0, 2]},
        "test": {"data": pixels[:2], "fine_labels": [2, 1]},
        "meta": {"fine_label_names": ["apple", "bear", "cloud"]},
    }
    assert {name: CIFAR100.meta["md5"] if name == "meta" else dict(CIFAR100.train_list + CIFAR100.test_list)[name]
            for name in files} == datasets.CIFAR_MD5  # fmt: skip
    for name, values in files.items():
        path = tmp_path / "cifar-100-python" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(values))
        monkeypatch.setitem(datasets.CIFAR_MD5, name, hashlib.md5(path.read_bytes()).hexdigest())
    data = load(tmp_path, "cifar224")
    assert data.class_names == ("apple", "bear", "cloud")
    assert data.train.labels.tolist() == [1, 0, 2] and data.test.labels.tolist() == [2, 1]
    image = np.asarray(data.train.load(1))
    np.testing.assert_array_equal(image, pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert "3 train and 2 test images" in caplog.text and "50000 train and 10000 test" in caplog.text
    monkeypatch.setitem(datasets.CIFAR_MD5, "test", "0" * 32)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="CIFAR-100 is not in"):  # another pickle is not opened
        load(tmp_path, "cifar224")


def test_digits_are_listed_without_the_files_for_folders_and_downloads():
    code = """
import main, sys
from utils.config.config import load_config
from utils.data import datasets, fingerprints, tasks
fingerprints.fingerprint_splits(datasets.load_dataset(load_config(main.DEMO, [])), None)
print({'torch', 'torchvision', 'utils.data.folders', 'utils.data.loader'} & set(sys.modules))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


# -- transforms -------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(digit_images) -> Image.Image:
    """A real image that is not square, in three different channels."""
    channels = [Image.fromarray(digit_images[name][0]).resize((61, 47), Image.Resampling.BICUBIC) for name in "358"]
    return Image.merge("RGB", channels)


def test_a_view_depends_on_seed_view_and_image_alone(photo):
    transforms = Transforms(16, augment_seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = transforms.view(photo, "a/1.png", 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    transforms.view(photo, "b/2.png", 5)
    assert torch.equal(transforms.view(photo, "a/1.png", 0), first)
    assert torch.equal(Transforms(16, augment_seed=1).view(photo, "a/1.png", 0), first)
    for other in (
        transforms.view(photo, "a/1.png", 1),
        transforms.view(photo, "a/2.png", 0),
        Transforms(16, augment_seed=2).view(photo, "a/1.png", 0),
    ):
        assert not torch.equal(other, first)


def test_seeds_differ_by_every_part_its_order_and_its_borders():
    parts = [(1, 2), (2, 1), (12,), (1, "2 "), ("12",), (1, 2, 0), ("view", 1, 2), ("view", 12)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts) - 1  # 12 and "12" are the same part
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("view", 1993, 0, "a/1.png") == 4621778148415235478  # features on disk were drawn from it


def test_a_fixed_seed_holds_for_a_while_and_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    with fixed_seed(5):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
