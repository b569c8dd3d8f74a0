import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile

import predict
from tests.conftest import ROOT
from utils.data.folders import find_images
from utils.data.given import loaded_ahead
from utils.runs.checkpoint import CheckpointFolder


@pytest.fixture(scope="session")
def three_classes(run_main, make_folder, tmp_path_factory):
    """Three classes in two tasks; returns what main.py left, with the images in ``data``."""
    folder = tmp_path_factory.mktemp("three")
    outcome = run_main(folder, data_path=str(make_folder(folder / "data", classes=3)), shuffle=False, epochs=1)
    assert outcome.code == 0
    return outcome


@pytest.fixture
def images(three_classes):
    return three_classes.folder / "data" / "test"


@pytest.fixture
def run(three_classes, capsys):
    """Runs predict.py in this process; returns its exit code, its lines and its standard error."""

    def call(*arguments):
        try:
            code = predict.main(["--checkpoint", str(three_classes.checkpoints), *map(str, arguments)])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def test_a_table_has_one_line_for_each_image_below_a_folder(run, images):
    code, lines, err = run(images)
    assert code == 0
    assert lines[0].startswith("selection sample: the module of lowest entropy for each image by itself")
    assert lines[1].split() == ["file", "class", "prob", "runners-up", "task", "entropy", "margin"]
    assert {" ".join(line.split()[-5:-2]) for line in lines[2:]} <= {"1 of 2", "2 of 2"}  # as people count
    assert [line.split()[0] for line in lines[2:]] == [str(path) for path in sorted(images.rglob("*.png"))]
    assert "9/9" in err  # the progress bar


def test_json_lines_hold_everything(run, images):
    code, lines, _ = run(images / "0", "--json", "--top-k", 2, "--explain")
    assert code == 0
    for line in lines:
        found = json.loads(line)
        assert found["class"] == found["top"][0]["class"]
        assert found["probability"] == found["top"][0]["probability"] >= found["top"][1]["probability"]
        assert len(found["top"]) == len(found["entropies"]) == 2
        assert found["selection"] == "sample"
        assert found["entropy"] == min(found["entropies"]) == found["entropies"][found["module"]]
        assert found["margin"] == pytest.approx(max(found["entropies"]) - min(found["entropies"]), abs=1e-6)


def test_csv_is_read_back(run, images):
    code, lines, _ = run(images, "--csv", "--explain", "--top-k", 99)
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert code == 0
    assert len(rows) == 9
    assert {row["class"] for row in rows} <= {"0", "1", "2"}
    assert sum(float(rows[0][k]) for k in ("probability", "probability_2", "probability_3")) == pytest.approx(1)
    assert float(rows[0]["entropy"]) == min(float(rows[0]["entropy_0"]), float(rows[0]["entropy_1"]))


def test_explain_shows_every_module(run, images):
    _, lines, _ = run(images / "0" / "004.png", "--explain")
    assert lines[3].split()[:4] == ["entropy", "by", "task", "1:"]


def test_features_are_rows_in_the_order_of_the_answer(run, images, tmp_path):
    file = tmp_path / "features.npy"
    assert run(images, "--features", file)[0] == 0
    features = np.load(file)
    assert (features.shape, features.dtype) == ((9, 192), np.float32)
    assert run(images / "1", "--features", tmp_path / "of_one.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "of_one.npy"), features[3:6], atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npy", "of_one.npy"]


def test_paths_come_from_standard_input(run, images, monkeypatch):
    named = [images / "2" / "004.png", images / "1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(str, named)) + "\n\n"))
    code, lines, _ = run("-", "--json")
    assert code == 0
    assert [json.loads(line)["file"] for line in lines] == [str(p) for p in (named[0], *sorted(named[1].iterdir()))]


def test_an_unreadable_image_is_reported_and_the_rest_goes_on(run, images, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    missing = tmp_path / "missing.png"
    good = images / "0" / "004.png"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{broken}\n{good}\n{missing}\n"))
    code, lines, err = run("-", "--json", "--features", tmp_path / "f.npy")
    found = [json.loads(line) for line in lines]
    assert code == 1
    files = [(f["file"], "error" in f) for f in found]
    assert files == [(str(broken), True), (str(good), False), (str(missing), True)]  # the order of the input
    assert f"{broken} is not a readable image" in err
    assert f"{missing} does not exist" in err
    assert "2 could not be read" in err
    assert np.isnan(np.load(tmp_path / "f.npy")).all(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], "nowhere.png does not exist"),
        ([".", "--checkpoint", "nowhere"], "no image there"),
        ([str(ROOT / "assets"), "--top-k", "0"], "--top-k must be at least 1, got 0"),
        ([], "give images, folders, or - for a list on standard input"),
        ([".", "--json", "--csv"], "not allowed with"),
    ],
)
def test_a_wrong_call_is_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, lines, err = run(*arguments)
    assert (code, lines) == (2, [])
    assert words in err
    assert "Traceback" not in err


def test_a_missing_checkpoint_is_one_line(images, capsys, tmp_path):
    assert predict.main(["--checkpoint", str(tmp_path), str(images)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["simplecil", "knn", "ranpac"])
def test_a_baseline_has_no_modules_to_speak_of(run_main, three_classes, images, tmp_path, capsys, monkeypatch, method):
    monkeypatch.setattr("models.ranpac.RANDOM_FEATURES", 50)
    outcome = run_main(tmp_path, data_path=str(three_classes.folder / "data"), model_name=method)
    capsys.readouterr()
    for form in ([], ["--json"], ["--csv"]):
        assert predict.main(["--checkpoint", str(outcome.checkpoints), *form, "--explain", str(images)]) == 0
        head = capsys.readouterr().out.splitlines()[0]
        assert (
            not {"entrop", "module", "task"} & set(head.replace("entropy", "entrop").split()) and "entrop" not in head
        )
        assert "module" not in head


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_with_a_mark_of_its_encoding(run, images, monkeypatch, encoding):
    text = f"{images / '2' / '004.png'}\r\n".encode(encoding)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    code, lines, err = run("-", "--json")
    if encoding == "utf-8-sig":
        assert (code, [json.loads(line)["file"] for line in lines]) == (0, [str(images / "2" / "004.png")])
    else:
        assert code == 2 and "the list on standard input is UTF-16; write it as UTF-8" in err


class Gone(io.StringIO):
    """Standard output whose reader, such as head, has seen enough."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return self.file.fileno()


def test_the_reader_of_the_output_may_stop_early(three_classes, images, tmp_path, monkeypatch):
    with open(tmp_path / "pipe", "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone(file))
        code = predict.main(["--checkpoint", str(three_classes.checkpoints), str(images)])
    assert code == 1


# -- selections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["sample", "lda", "ridge"])
def test_the_selection_is_the_users_choice_and_every_answer_names_it(run, images, selection):
    code, lines, _ = run(images, "--json", "--explain", "--selection", selection)
    assert code == 0
    for line in lines:
        found = json.loads(line)
        assert found["selection"] == selection
        looked_at = found["entropies" if selection == "sample" else "task_scores"]
        assert len(looked_at) == 2
        best = min(looked_at) if selection == "sample" else max(looked_at)
        assert looked_at[found["module"]] == best
        assert found["margin"] == pytest.approx(abs(looked_at[0] - looked_at[1]), abs=1e-4)
        assert ("entropies" in found) != ("task_scores" in found)
    _, table, _ = run(images, "--explain", "--selection", selection)
    assert table[0].startswith(f"selection {selection}: ")
    assert table[3].startswith(
        "    entropy by task  1: " if selection == "sample" else f"    {selection} score by task"
    )
    _, rows, _ = run(images, "--csv", "--explain", "--selection", selection)
    assert {row["selection"] for row in csv.DictReader(rows)} == {selection}
    assert rows[0].endswith("entropy_0,entropy_1" if selection == "sample" else "score_0,score_1")


def test_the_default_selection_is_that_of_the_run_if_it_answers_single_images(run, images, three_classes, tmp_path):
    saved = CheckpointFolder(shutil.copytree(three_classes.checkpoints, tmp_path / "tosca"))
    manifest = saved.read_manifest()
    for of_run, used in [("ridge", "ridge"), ("batch", "sample"), ("sample", "sample")]:
        saved.write_manifest(replace(manifest, config={**manifest.config, "selection": of_run}))
        _, lines, _ = run(images, "--json", "--checkpoint", saved.folder)
        assert {json.loads(line)["selection"] for line in lines} == {used}


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("batch", "the answer would depend on their order); choose one of: sample, lda, ridge"),
        ("oracle", "choose one of: sample, lda, ridge"),
    ],
)
def test_a_selection_that_cannot_answer_single_images_is_refused_with_the_reason(run, images, selection, words):
    code, lines, err = run(images, "--selection", selection)
    assert (code, lines) == (2, [])
    assert words in err


# -- files that are none, places that are none ------------------------------------------------------------------------


def test_pipes_and_devices_are_passed_over_with_a_line(run, images, tmp_path):
    pipe, device = tmp_path / "pipe.png", tmp_path / "zero.png"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    code, lines, err = run(pipe, device, images / "0" / "004.png", "--csv")
    assert (code, len(lines)) == (1, 2)
    assert f"{pipe} is not a readable image (it is a device, pipe or socket, no regular file)" in err
    assert f"{device} is not a readable image (it is a device, pipe or socket, no regular file)" in err


def test_a_thin_picture_is_answered_and_one_that_memory_does_not_hold_is_named(run, images, tmp_path, monkeypatch):
    thin, huge = tmp_path / "thin.png", tmp_path / "huge.png"
    Image.new("RGB", (1, 100_000)).save(thin)
    Image.new("RGB", (50, 50)).save(huge)
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda i: bytearray(2**62) if i.size == (50, 50) else load(i))
    code, lines, err = run(huge, thin, images / "0" / "004.png", "--csv")
    assert (code, len(lines)) == (1, 3)
    assert f"{huge} is not a readable image (there is too little memory to decode it)" in err


def test_what_a_folder_holds_beside_images_is_said(run, images, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(images / "0", folder / "0")
    (folder / "notes.txt").touch()
    (folder / "@eaDir").mkdir()
    shutil.copy(images / "0" / "004.png", folder / "@eaDir" / "thumb.png")
    code, lines, err = run(folder, "--csv")
    assert (code, len(lines)) == (0, 4)
    assert "predict.py: not used: 1 .txt, 1 folder(s) named '@eaDir', which hold images" in err
    for path in (folder / "0").iterdir():
        path.unlink()
    assert "no image there: 1 .txt, 1 folder(s) named '@eaDir', which hold images" in run(folder)[2]


def test_the_limit_of_pixels_is_an_option(run, images):
    file = images / "0" / "004.png"
    code, lines, err = run(file, "--csv", "--max-pixels", 1439)
    assert (code, len(lines)) == (1, 1)
    assert "40 × 36 = 1440 pixels are above max_pixels 1439" in err
    assert run(file, "--csv", "--max-pixels", 1440)[0] == 0
    assert "--max-pixels must be at least 1" in run(file, "--max-pixels", 0)[2]


def test_features_never_replace_a_device_and_follow_links(run, images, tmp_path):
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    before = os.stat("/dev/null")
    code, _, err = run(images, "--features", device)
    assert code == 2
    assert f"--features {str(device)!r} is a device, pipe or socket" in err
    assert os.stat("/dev/null").st_rdev == before.st_rdev
    target, link = tmp_path / "disk" / "real.npy", tmp_path / "link.npy"
    target.parent.mkdir()
    link.symlink_to(target)
    assert run(images, "--features", link)[0] == 0
    assert link.is_symlink() and np.load(target).shape == (9, 192)
    assert "is a folder" in run(images, "--features", tmp_path)[2]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "f.npy")
    said = f"{link} (a link to {tmp_path}/nowhere/f.npy)' cannot be written (No such file or directory)"
    assert said in run(images, "--features", link)[2]


def test_a_file_name_steers_neither_terminal_nor_spreadsheet(run, images, tmp_path):
    name = tmp_path / "\x1b[31mred\u202e.png"
    shutil.copy(images / "0" / "004.png", name)
    _, table, _ = run(name)
    assert not {"\x1b", "\u202e"} & set("".join(table))
    assert json.loads(run(name, "--json")[1][0])["file"] == str(name)
    shutil.copy(name, tmp_path / "=1+1.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        _, lines, _ = run("=1+1.png", "--csv")
    assert lines[1].startswith("'=1+1.png,")


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("utf-8", marks=pytest.mark.slow)])
def test_names_that_are_not_utf8_are_answered_from_standard_input_too(three_classes, images, tmp_path, encoding):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(images / "0" / "004.png", os.fsdecode(name))
    command = [sys.executable, "predict.py", "--checkpoint", str(three_classes.checkpoints), "--json", "-"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    found = subprocess.run(command, cwd=ROOT, input=name + b"\n", capture_output=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    assert os.fsencode(json.loads(found.stdout)["file"]) == name


# -- finding and loading ----------------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_without_hidden_files_and_loops(tmp_path):
    for name in ("b/2.png", "b/10.jpg", "a/deep/1.PNG", "a/notes.txt", ".hidden/3.png", "c/.4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path])]
    assert found == ["a/deep/1.PNG", "b/10.jpg", "b/2.png"]


def test_no_more_than_a_window_is_loaded_ahead(tmp_path):
    taken = []

    def paths():
        for number in range(50):
            taken.append(number)
            yield tmp_path / str(number)

    stream = loaded_ahead(paths(), lambda path: path.name, ahead=4)
    assert [next(stream)[1] for _ in range(10)] == [str(number) for number in range(10)]
    assert len(taken) <= 14
    stream.close()
