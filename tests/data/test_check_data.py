import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import main
from tests.conftest import ROOT, TINY


@pytest.fixture
def data(make_folder, tmp_path):
    return make_folder(tmp_path / "data", classes=3)


@pytest.fixture
def run(data, tmp_path, capsys):
    """Runs main.py --check-data on ``data``; returns exit code, standard output and standard error."""

    def call(*arguments, **keys):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TINY, "data_path": str(data), **keys}))
        code = main.main(["--check-data", f"--config={path}", *arguments])
        return code, *capsys.readouterr()

    return call


def found(run, **keys):
    code, out, _ = run("--json", **keys)
    return code, json.loads(out)


def test_good_data_is_told_in_numbers(run):
    code, facts = found(run)
    assert (code, facts["good"], facts["problems"]) == (0, True, {})
    assert facts["images"] == {"train": 12, "test": 9}
    assert facts["classes"] == {"train": 3, "test": 3}
    assert facts["sizes"] == [{"width": 40, "height": 36, "images": 21}]
    code, out, err = run()
    assert code == 0
    assert out.splitlines()[1] == "  train  12 images of 3 classes; smallest 0 (4), largest 0 (4)"
    assert out.splitlines()[3] == "  sizes  all 40×36" and out.splitlines()[-1] == "no problem found"
    assert "21/21" in err  # progress


def test_an_unreadable_file_is_a_problem(run, data):
    broken = data / "train" / "1" / "broken.png"
    broken.write_bytes(b"no image")
    whole = (data / "train" / "1" / "000.png").read_bytes()
    (data / "train" / "1" / "half.png").write_bytes(whole[: len(whole) // 2])
    code, facts = found(run)
    assert code == 1
    assert sorted(line.split(":")[0] for line in facts["problems"]["unreadable"]) == [
        str(broken),
        str(data / "train" / "1" / "half.png"),
    ]


def test_copies_are_found_by_content_not_by_name_or_format(run, data):
    original = data / "train" / "0" / "000.png"
    shutil.copy(original, data / "train" / "0" / "again.png")
    shutil.copy(data / "train" / "0" / "001.png", data / "train" / "1" / "other_class.png")
    Image.open(data / "train" / "0" / "002.png").save(data / "test" / "0" / "leaked.bmp")
    code, facts = found(run)
    problems = facts["problems"]
    assert code == 1
    assert {kind: len(lines) for kind, lines in problems.items()} == {
        "duplicates": 1,
        "duplicates under different classes": 1,
        "in both train and test": 1,
    }
    assert "leaked.bmp" in problems["in both train and test"][0]


def test_folders_that_do_not_match_are_problems(run, data):
    shutil.rmtree(data / "test" / "2")
    (data / "test" / "9" / "sub").mkdir(parents=True)
    code, facts = found(run)
    assert code == 1
    assert facts["problems"]["folders"] == [
        f"class '9' in {data / 'test'} holds no image; remove the folder or add images (such as .jpg or .png)",
        f"class '9' is in {data / 'test'} but not in {data / 'train'}",
        f"class '2' is in {data / 'train'} but not in {data / 'test'}",
    ]


def test_odd_counts_and_sizes_are_warnings(run, data):
    shutil.rmtree(data / "train" / "2")
    (data / "train" / "2").mkdir()
    Image.new("RGBA", (40, 40), "red").save(data / "train" / "2" / "one.png")
    code, facts = found(run, dataset="cub", image_size=38)
    assert code == 0
    assert facts["warnings"] == [
        "3 classes, 9 train and 9 test images; the split that LAMDA-PILOT publishes has 200 classes, 9430 train and "
        "2358 test images: numbers will not be comparable with published ones",
        "smaller than image_size 38, so enlarged: 17 images",
        "1 image with transparency: laid on white",
    ]
    assert facts["images_by_class"]["train"] == {"0": 4, "1": 4, "2": 1} and facts["kinds"] == {"alpha": 1}


def test_a_continued_run_may_test_what_is_not_learned_here(run, data):
    shutil.rmtree(data / "train" / "2")
    assert found(run)[0] == 1
    assert found(run, continue_from="tosca")[0] == 0


def test_domains_are_checked_class_by_class(run, data):
    for split in ("train", "test"):
        (data / split / "photo").mkdir()
        for name in ("0", "1", "2"):
            (data / split / name).rename(data / split / "photo" / name)
    code, facts = found(run, scenario="domain")
    assert code == 0
    assert list(facts["images_by_class"]["train"]) == ["photo/0", "photo/1", "photo/2"]


def test_the_bundled_digits_are_good(run):
    code, facts = found(run, dataset="digits", data_path=None, image_size=8)
    assert facts["classes"] == {"train": 10, "test": 10}
    assert (code, facts["problems"], facts["warnings"]) == (0, {}, [])


@pytest.mark.parametrize(
    ("keys", "words"), [({"data_path": "nowhere"}, "'nowhere' does not exist"), ({"epochs": 0}, "epochs must be")]
)
def test_a_wrong_call_is_one_line(run, keys, words):
    code, out, err = run(**keys)
    assert (code, out) == (2, "")
    assert words in err


def test_nothing_heavy_is_imported():
    command = [sys.executable, "-c", "import main, utils.data.check, sys; print('torch' in sys.modules)"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
