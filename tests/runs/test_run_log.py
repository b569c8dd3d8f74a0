"""What a run says: PILOT's lines in the file, one line a task on the terminal, one way to count."""

import ast
import json
import re
import shutil

import pytest

from tests.conftest import tiny_config
from utils.runs.setup import run_paths
from utils.words import fixed


@pytest.fixture(scope="module")
def run(finished_run):
    return finished_run.json()


def lines_of(finished_run) -> list[str]:
    """The messages of the log file, without time and file name."""
    return [line.partition(" => ")[2] for line in finished_run.log().splitlines()]


def test_the_file_begins_with_a_line_for_each_key(finished_run, run):
    lines = lines_of(finished_run)
    for name, value in run["config"].items():
        assert f"{name}: {value}" in lines


def test_the_file_has_the_class_order_as_numbers(finished_run, run):
    (numbers,) = [line for line in lines_of(finished_run) if re.fullmatch(r"\[\d+(, \d+)*\]", line)]
    assert [sorted(run["class_order"])[number] for number in ast.literal_eval(numbers)] == run["class_order"]


def test_the_file_has_pilots_lines_of_a_task_in_their_order(finished_run, run):
    text = "\n".join(lines_of(finished_run))
    for task, (first, stop) in enumerate([(0, 2), (2, 4), (4, 6)]):
        module = re.escape(str(finished_run.checkpoints / f"task{task}.pth"))
        pattern = (
            rf"All params: (\d+)\nTrainable params: (\d+)\n"
            rf"Learning on {first}-{stop}\n"
            rf"Task {task}, Epoch 1/2 => Loss \d+\.\d{{3}}, Train_accy \d+\.\d{{2}}\n"
            rf"Task {task}, Epoch 2/2 => Loss \d+\.\d{{3}}, Train_accy \d+\.\d{{2}}\n"
            rf"tosca parameters saved to {module}\n"
            r"\[selection: .*\] (CNN|Accuracy): \{"
        )
        assert (found := re.search(pattern, text)), pattern
    parameters, coming = run["parameters"], 2 * 192  # the rows of the last task, which come while it is learned
    assert int(found[2]) == parameters["trainable"] - coming
    whole = parameters["backbone"] + 3 * parameters["luca_per_task"] + parameters["classifier"]
    assert int(found[1]) == whole - coming


def test_the_file_ends_with_forgetting_and_the_summary(finished_run, run):
    text = "\n".join(lines_of(finished_run))
    forgetting = round(run["results"]["sample"]["forgetting"], 2) + 0.0
    assert f"[selection: sample] Forgetting (CNN): {forgetting:.2f}" in text
    assert text.index("Forgetting (CNN)") < text.index("oracle: the accuracy when") < text.index("Summary: ")


def test_the_matrix_stands_before_forgetting_a_row_for_each_group_of_classes(finished_run, run):
    """As the release prints it: a column after each task, 0 before the group is learned."""
    lines = lines_of(finished_run)
    place = lines.index("[selection: sample] Accuracy Matrix (CNN):")
    assert sum("Accuracy Matrix" in line for line in lines) == 1
    rows = [[float(value) for value in line.strip("[]").split()] for line in lines[place + 1 : place + 4]]
    matrix = run["results"]["sample"]["matrix"]
    assert rows == [[round(matrix[after][on] or 0.0, 2) for after in range(3)] for on in range(3)]
    assert "Forgetting (CNN)" in lines[place + 4]


def test_every_epoch_is_in_the_json(finished_run, run):
    assert [len(epochs) for epochs in run["epochs"]] == [2, 2, 2]
    said = re.findall(r"Loss (\S+), Train_accy (\S+)", finished_run.log())
    epochs = [epoch for of_task in run["epochs"] for epoch in of_task]
    assert said == [(f"{epoch['loss']:.3f}", f"{epoch['accuracy']:.2f}") for epoch in epochs]


def test_the_terminal_has_one_line_a_task_and_the_summary_last(digit_folder, run_main, tmp_path, capsys):
    outcome = run_main(tmp_path, data_path=str(digit_folder), selection="ridge")
    said = capsys.readouterr().out.splitlines()
    assert outcome.code == 0
    results = outcome.json()["results"]
    tasks = [line for line in said if re.search(r"Task \d of 3", line)]
    for task, line in enumerate(tasks):
        shown = [fixed(results[name]["top1_curve"][task], 1) for name in ("ridge", "sample", "oracle")]
        assert f"Task {task + 1} of 3: ridge {shown[0]}, sample {shown[1]}, oracle (true task) {shown[2]} %" in line
    assert len(tasks) == 3
    summary = next(number for number, line in enumerate(said) if "Summary: tosca on imagefolder, 3 tasks" in line)
    assert len(said) - summary == 1 + 1 + len(results) + 4  # title, head, selections, the best, backbone, times, cost
    assert summary < 12
    assert not any("CNN" in line or "curve" in line or "mean over" in line for line in said)


def test_the_bar_of_a_task_says_which_of_how_many(digit_folder, run_main, tmp_path, capsys):
    assert run_main(tmp_path, data_path=str(digit_folder)).code == 0
    bars = capsys.readouterr().err
    assert [f"Task {number} of 3: " in bars for number in (1, 2, 3)] == [True] * 3
    assert run_main(tmp_path / "baseline", data_path=str(digit_folder), model_name="ncm_euclidean").code == 0
    assert "epoch/s" not in capsys.readouterr().err


def test_domains_are_named(run_main, make_folder, tmp_path, capsys):
    for name in ("paper", "screen"):
        for split in ("train", "test"):
            made = make_folder(tmp_path / "flat" / name, classes=2, train=2, test=2)
            (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
            (made / split).rename(tmp_path / "data" / split / name)
    outcome = run_main(tmp_path, data_path=str(tmp_path / "data"), scenario="domain", shuffle=False)
    said = capsys.readouterr().out
    assert outcome.code == 0
    assert "2 classes, 2 domains" in said
    assert "Task 1 of 2 (domain paper): " in said
    assert "Task 2 of 2 (domain screen): " in said
    (log,) = (tmp_path / "logs").rglob("*.log")
    assert re.search(r"CNN: \{'total': \S+ 'domain paper': \S+ 'domain screen': ", log.read_text())


def test_one_task_is_said_in_the_singular(run_main, make_folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data", classes=2, train=1, test=1)
    assert run_main(tmp_path, data_path=str(data)).code == 0
    said = capsys.readouterr().out
    assert "1 task," in said
    assert "1 tasks" not in said
    assert "-0.0" not in said


def test_names_of_files_are_fit_for_every_system():
    config = tiny_config(backbone_type="hf-hub:user/repo", prefix='c:d*e?f"g<h>i|j')
    paths = run_paths(config, 7)
    assert paths.file(".json").name == "c_d_e_f_g_h_i_j_7_hf-hub_user_repo.json"
    assert paths.folder == run_paths(tiny_config(), 7).folder


# -- what is on disk counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".png"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_report_that_differs_from_the_manifest_is_made_again(finished_run, run_main, tmp_path, pictures, suffix, how):
    for name in ("tosca", "logs"):
        shutil.copytree(finished_run.folder / name, tmp_path / name)
    keys = {name: finished_run.config[name] for name in ("data_path", "cache_dir")}
    assert run_main(tmp_path, **keys).code == 0
    path = next((tmp_path / "logs").rglob("*.json")).with_suffix(suffix)
    before = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif suffix == ".json":  # as a kill after the last commit leaves it
        path.write_text(json.dumps({**json.loads(before), "status": "running"}))
    assert run_main(tmp_path, **keys).code == 0
    if suffix != ".png":
        assert path.read_bytes() == before
    assert path.stat().st_size > 0
