import ast
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import main
from backbone.luca import LuCA
from backbone.vit import load_backbone
from models.evaluation import BankTask
from tests.conftest import TEST_IMAGES, TRAIN_IMAGES, tiny_config
from utils.data.datasets import load_dataset
from utils.data.tasks import class_order, make_stream
from utils.features.rows import TEST_VIEW
from utils.runs.checkpoint import load_tensors

ORDER = class_order(6, shuffle=True, seed=1993).tolist()
TASK_IMAGES = [TEST_IMAGES[a] + TEST_IMAGES[b] for a, b in zip(ORDER[::2], ORDER[1::2], strict=True)]
REQUIRED_KEYS = {
    *("format", "status", "config", "seed", "backbone", "versions", "class_order", "task_sizes", "results"),
    *("selection_accuracy", "parameters", "sparsity", "seconds", "backbone_forwards"),
}


def without_times(run: dict) -> dict:
    """Without what is measured rather than computed: seconds, and of the cost times and memory."""
    counted = {name: value for name, value in run["cost"].items() if "GFLOPs" in name or "Params" in name}
    return {name: value for name, value in run.items() if name != "seconds"} | {"cost": counted}


@pytest.fixture(scope="module")
def run(finished_run) -> dict:
    return finished_run.json()


# -- the JSON ---------------------------------------------------------------------------------------------------------


def test_the_run_ends_well_and_its_json_has_every_key(finished_run, run):
    assert finished_run.code == 0
    assert REQUIRED_KEYS - run.keys() == set()
    assert (run["format"], run["status"], run["seed"]) == (1, "finished", 1993)
    assert {name: run["config"][name] for name in finished_run.config} == finished_run.config
    assert run["config"] == tiny_config(**finished_run.config).as_dict()
    backbone = load_backbone(tiny_config(), torch.device("cpu"))
    assert {"name": "vit_tiny_patch16_224", "weights_sha256": backbone.weights_sha256, "feature_dim": 192}.items() <= (
        run["backbone"].items()
    )
    assert run["versions"]["torch"] == torch.__version__ and {"python", "timm", "numpy"} <= run["versions"].keys()
    assert run["class_order"] == [str(c) for c in ORDER] and run["task_sizes"] == [2, 2, 2]
    assert {"features", "train", "evaluate", "total"} == run["seconds"].keys()
    parts = [run["seconds"][phase] for phase in ("features", "train", "evaluate")]
    assert min(parts) > 0 and run["seconds"]["total"] >= sum(parts) - 0.01


@pytest.mark.parametrize("selection", ["batch", "sample", "oracle"])
def test_every_number_follows_from_the_matrix(run, selection):
    result = run["results"][selection]
    matrix = result["matrix"]
    for after in range(3):
        assert matrix[after][after + 1 :] == [None] * (2 - after)
        for on in range(after + 1):  # so many of so many images
            hits = matrix[after][on] * TASK_IMAGES[on] / 100
            assert hits == pytest.approx(round(hits), abs=1e-9) and 0 <= hits <= TASK_IMAGES[on]
        weighted = sum(matrix[after][on] * TASK_IMAGES[on] for on in range(after + 1)) / sum(TASK_IMAGES[: after + 1])
        assert result["top1_curve"][after] == pytest.approx(weighted)
        assert result["top1_curve"][after] <= result["top5_curve"][after] <= 100
    assert result["average"] == pytest.approx(sum(result["top1_curve"]) / 3)
    assert result["last"] == result["top1_curve"][-1]
    drops = [max(matrix[after][on] for after in range(on, 3)) - matrix[2][on] for on in (0, 1)]
    assert result["forgetting"] == pytest.approx(sum(drops) / 2)


def test_tasks_of_different_size_make_the_weights_matter():
    assert len(set(TASK_IMAGES)) > 1  # else the test above could not tell a weighted mean from a plain one


@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_selection_accuracy_is_the_diagonal_of_the_confusion(run, selection):
    chosen = run["selection_accuracy"][selection]
    confusion = np.array(run["confusion"][selection])
    assert len(chosen) == 3 and chosen[0] == 100.0  # one module alone is always right
    assert confusion.sum(axis=1).tolist() == TASK_IMAGES
    assert chosen[-1] == pytest.approx(100 * confusion.trace() / confusion.sum())
    assert "oracle" not in run["selection_accuracy"] and "oracle" in run["results"]


def test_parameters_are_counted(run):
    luca = sum(p.numel() for p in LuCA(192).parameters())
    backbone = sum(p.numel() for p in load_backbone(tiny_config(), torch.device("cpu")).model.parameters())
    classifier = 6 * 192 + 1
    expected = {"backbone": backbone, "luca_per_task": luca, "classifier": classifier, "trainable": luca + classifier}
    assert expected.items() <= run["parameters"].items()


def test_sparsity_is_what_the_saved_modules_have(finished_run, run):
    expected = []
    for task in range(3):
        state = torch.load(finished_run.checkpoints / f"task{task}.pth", weights_only=True)
        values = torch.cat([tensor.flatten() for tensor in state.values()])
        expected.append((values.abs() < 1e-3).double().mean().item())
    assert run["sparsity"] == pytest.approx(expected, abs=1e-6) and max(expected) > 0


def test_each_image_passes_the_backbone_once_for_each_of_its_views(run):
    assert run["backbone_forwards"] == TRAIN_IMAGES * (1 + 1) + sum(TEST_IMAGES)


def test_the_json_is_whole_after_every_task(finished_run):
    assert [values["status"] for values in finished_run.json_after_task] == ["running", "running", "finished"]
    for task, values in enumerate(finished_run.json_after_task):
        for selection in ("batch", "sample", "oracle"):
            curve = values["results"][selection]["top1_curve"]
            assert curve == finished_run.json()["results"][selection]["top1_curve"][: task + 1]


def test_earlier_modules_stay_bit_identical(finished_run):
    first, second, third = finished_run.modules_after_task
    assert list(third) == ["task0.pth", "task1.pth", "task2.pth"] and len(set(third.values())) == 3
    assert first.items() < second.items() < third.items()


def test_the_accuracies_are_those_of_the_saved_files_on_the_images(finished_run, run):
    """Everything anew from the files on disk, without the bank, the stream or the stacked evaluation."""
    root = Path(finished_run.config["data_path"])
    backbone = load_backbone(tiny_config(), torch.device("cpu"))
    look = T.Compose([T.Resize(36, T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.PILToTensor()])

    def features(split: str, label: int) -> torch.Tensor:
        paths = sorted((root / split / run["class_order"][label]).iterdir())
        return backbone(torch.stack([look(Image.open(path).convert("RGB")) for path in paths]))

    lucas = []
    for task in range(3):
        lucas.append(LuCA(192))
        lucas[-1].load_state_dict(load_tensors(finished_run.checkpoints / f"task{task}.pth"))
    state = torch.load(finished_run.checkpoints / "classifier2.pth", weights_only=True)
    with torch.no_grad():
        for label in (4, 5):  # the rows of the last task are its class means, and nothing trained them since
            torch.testing.assert_close(state["weight"][label], lucas[2](features("train", label)).mean(dim=0))
        h = torch.cat([features("test", label) for label in range(6)])
        z = torch.stack([luca(h) for luca in lucas])  # (modules, images, dim)
        logits = state["sigma"] * torch.cosine_similarity(z[:, :, None], state["weight"], dim=3)
    true = torch.tensor([label for label in range(6) for _ in range(TEST_IMAGES[ORDER[label]])])
    p = logits.softmax(dim=2)
    entropy = -(p * (p + 1e-9).log()).sum(dim=2)
    images = torch.arange(len(true))
    chosen = {"sample": entropy.argmin(dim=0), "oracle": true // 2}
    chosen["batch"] = entropy.mean(dim=1).argmin().expand(len(true))  # fewer than 48 images: one batch
    for selection, module in chosen.items():
        hits = logits[module, images].argmax(dim=1) == true
        per_task = [100 * hits[true // 2 == task].double().mean().item() for task in range(3)]
        assert run["results"][selection]["matrix"][2] == pytest.approx(per_task), selection


@pytest.mark.parametrize(("views", "read"), [(3, [0, 1, 2, 0, 1]), (1, [0] * 5), (0, [TEST_VIEW])])
def test_fewer_views_than_epochs_are_reused_in_turn(views, read):
    class Bank:
        def __init__(self):
            self.calls = []

        def read(self, split, view, rows):
            self.calls.append((split, view, rows.tolist()))
            return np.full((len(rows), 2), view, dtype=np.float32)

    stream = make_stream(load_dataset(tiny_config(dataset="digits")), tiny_config(dataset="digits"), seed=1993)
    bank, task = Bank(), stream.tasks[1]
    data = BankTask(bank, stream, task, views, torch.device("cpu"))
    found = [data.epoch(epoch) for epoch in range(5)]
    assert [int(f[0, 0]) for f in found] == (read if views else read * 5)
    assert bank.calls == [("train", view, task.train.tolist()) for view in read]  # the test view is read once
    assert data.labels.tolist() == task.train_rows.tolist() and (data.first_row, data.new_rows) == (2, 2)


# -- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_has_pilots_lines_with_plain_numbers(finished_run, run):
    log = finished_run.log()
    result = run["results"]["sample"]
    for k in (1, 5):
        curves = [ast.literal_eval(text) for text in re.findall(rf"CNN top{k} curve: (\[.*?\])", log)]
        assert curves == [[round(v, 2) for v in result[f"top{k}_curve"][: t + 1]] for t in range(3)]
    groups = [ast.literal_eval(text) for text in re.findall(r"CNN: (\{.*?\})", log)]
    assert [list(group) for group in groups] == [
        ["total", "00-01", "old", "new"],
        ["total", "00-01", "02-03", "old", "new"],
        ["total", "00-01", "02-03", "04-05", "old", "new"],
    ]
    for task, group in enumerate(groups):
        values = [result["top1_curve"][task], *result["matrix"][task][: task + 1]]
        assert list(group.values())[: task + 2] == [round(v, 2) for v in values]
        assert group["new"] == round(result["matrix"][task][task], 2)
    averages = re.findall(r"Average Accuracy \(CNN\): ([\d.]+)", log)
    assert [float(a) for a in averages] == [round(sum(result["top1_curve"][:t]) / t, 2) for t in (1, 2, 3)]
    assert "np." not in log and "tensor(" not in log
    assert "Backbone: vit_tiny_patch16_224, 192 features" in log and run["backbone"]["weights_sha256"] in log


def test_every_accuracy_in_the_log_names_its_selection(finished_run):
    names = {"batch": "batch (class order)", "sample": "sample", "oracle": "oracle (true task)"}
    lines = [line for line in finished_run.log().splitlines() if re.search(r"curve: |Accuracy.*: |CNN: ", line)]
    assert [line for line in lines if "[selection: " not in line] == []
    for selection, name in names.items():
        of_selection = [line for line in lines if f"[selection: {name}]" in line]
        assert len(of_selection) == 3 * 4
        assert all(("CNN" in line) == (selection == "sample") for line in of_selection)


def test_the_summary_shows_the_selections_side_by_side(finished_run, run):
    summary = finished_run.log().partition("Summary:")[2]
    for selection, name in {"batch": r"batch \(class order\)", "sample": "sample", "oracle": "oracle"}.items():
        result = run["results"][selection]
        numbers = [f"{result[key]:.1f}" for key in ("average", "last", "forgetting")]
        assert re.search(rf"  {name}.* +{numbers[0]} +{numbers[1]} +{numbers[2]} ", summary), (name, summary)


# -- the same again ---------------------------------------------------------------------------------------------------


def test_a_second_run_into_other_folders_never_calls_the_backbone(finished_run, run, run_main, tmp_path):
    keys = {**finished_run.config, "checkpoint_dir": str(tmp_path / "t"), "log_dir": str(tmp_path / "l")}
    second = run_main(tmp_path, **{**keys, "selection": "batch"})
    assert second.code == 0 and second.json()["backbone_forwards"] == 0
    for key in ("results", "selection_accuracy", "confusion", "entropy", "sparsity"):
        assert second.json()[key] == run[key], key
    for task in range(3):
        old, new = (torch.load(r.checkpoints / f"task{task}.pth") for r in (finished_run, second))
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    curves = re.findall(r"\[selection: (.*?)\] CNN top1 curve: (\[.*?\])", second.log())
    assert {name for name, _ in curves} == {"batch (class order)"}
    assert ast.literal_eval(curves[-1][1]) == [round(v, 2) for v in run["results"]["batch"]["top1_curve"]]


def test_the_same_seed_gives_the_same_json_and_another_seed_another(digit_folder, run_main, tmp_path):
    first = run_main(tmp_path, data_path=str(digit_folder))
    first_json = first.json()
    torch.manual_seed(12345)
    np.random.seed(6)
    again = run_main(tmp_path, "--fresh", data_path=str(digit_folder))
    assert without_times(again.json()) == without_times(first_json)
    kept = sorted(first.log_file().parent.glob("1993_vit_tiny_patch16_224.*.json"))
    assert [json.loads(path.read_text()) for path in kept] == [first_json]  # moved aside, not overwritten
    assert len(list(tmp_path.glob("tosca.*/task2.pth"))) == 1
    other = run_main(tmp_path / "other", data_path=str(digit_folder), seed=[2])
    assert other.json()["class_order"] != first_json["class_order"]
    assert other.json()["entropy"] != first_json["entropy"]


def test_several_seeds_give_a_json_each_and_a_closing_line(finished_run, run_main, digit_folder, tmp_path, capsys):
    seeds = [1993, 2, 3]
    outcome = run_main(
        tmp_path, data_path=str(digit_folder), seed=seeds, train_views=0, cache_dir=str(tmp_path / "cache")
    )
    runs = [outcome.json(seed) for seed in seeds]
    assert [values["seed"] for values in runs] == seeds
    assert [values["backbone_forwards"] for values in runs] == [TRAIN_IMAGES + sum(TEST_IMAGES), 0, 0]
    for seed, values in zip(seeds, runs, strict=True):
        assert sorted(path.name for path in (outcome.checkpoints / f"seed{seed}").glob("task*")) == [
            "task0.pth",
            "task1.pth",
            "task2.pth",
        ]
        assert f"Seed {seed}, class order: {values['class_order']}" in outcome.log(seed)
        assert not any(f"Seed {other}," in outcome.log(seed) for other in seeds if other != seed)
    assert not list(outcome.checkpoints.glob("*.pth"))
    output = capsys.readouterr().out
    for name, label in (("batch", r"batch \(class order\)"), ("sample", "sample"), ("oracle", r"oracle \(true task\)")):
        (numbers,) = re.findall(rf" {label} +(\S+) ± (\S+) +(\S+) ± (\S+) .* 3\b", output)
        expected = []
        for key in ("average", "last"):
            values = [values["results"][name][key] for values in runs]
            mean = sum(values) / 3
            expected += [mean, math.sqrt(sum((v - mean) ** 2 for v in values) / 2)]
        assert [float(n) for n in numbers] == pytest.approx(expected, abs=0.0051)


# -- data and settings at the edges -----------------------------------------------------------------------------------


def test_one_class_in_the_last_task_and_one_image_in_a_class(make_folder, run_main, tmp_path):
    data = make_folder(tmp_path / "data", classes=6, train=[1, 2, 3, 1, 2, 3], test=[1, 2, 1, 2, 1, 2])
    outcome = run_main(tmp_path, data_path=str(data), init_cls=3, increment=2, shuffle=False)
    run = outcome.json()
    assert outcome.code == 0 and run["task_sizes"] == [3, 2, 1] and run["class_order"] == list("012345")
    assert outcome.log_file().parent.relative_to(tmp_path / "logs").parts == ("tosca", "imagefolder", "3", "2")
    last = ast.literal_eval(re.findall(r"CNN: (\{.*?\})", outcome.log())[-1])
    assert list(last) == ["total", "00-02", "03-04", "05-05", "old", "new"]
    assert last["05-05"] == last["new"] == round(run["results"]["sample"]["matrix"][2][2], 2)
    assert run["backbone_forwards"] == 12 * 2 + 9


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_fewer_than_five_classes(make_folder, run_main, tmp_path, classes):
    data = make_folder(tmp_path / "data", classes=classes, train=2, test=2)
    outcome = run_main(tmp_path, data_path=str(data), init_cls=1, increment=1)
    assert outcome.code == 0
    for result in outcome.json()["results"].values():
        assert result["top5_curve"] == [100.0] * classes
        assert len(result["top1_curve"]) == classes


@pytest.mark.parametrize(
    ("flow", "scheduler", "optimizer"),
    [("tosca_r", "constant", "adam"), ("adapter", "steplr", "adamw"), ("calibrator", "constant", "sgd")],
)
def test_every_flow_schedule_and_optimiser_runs_to_the_end(
    finished_run, run_main, tmp_path, flow, scheduler, optimizer
):
    keys = {"flow": flow, "scheduler": scheduler, "optimizer": optimizer, "lr": 0.005, "milestones": [1]}
    cache, data = finished_run.config["cache_dir"], finished_run.config["data_path"]
    outcome = run_main(tmp_path, data_path=data, cache_dir=cache, **keys)
    assert outcome.code == 0 and outcome.json()["status"] == "finished"
    assert outcome.json()["backbone_forwards"] == 0  # the bank is shared by every flow and setting
    assert outcome.json()["results"]["oracle"]["last"] > 100 / 6


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        ({"train_views": 0}, 1),  # it trains on the test transform
        ({"train_views": None, "epochs": 3}, 1 + 3),  # by default every epoch has views of its own
        ({"model_name": "simplecil", "train_views": 2}, 1),  # it reads no augmented view, so it pays for none
        ({"model_name": "linear_joint", "train_views": 2}, 1),
    ],
)
def test_a_training_image_passes_the_backbone_once_for_each_view_that_is_read(
    digit_folder, run_main, tmp_path, keys, passes
):
    outcome = run_main(tmp_path, data_path=str(digit_folder), **keys)
    assert outcome.code == 0 and outcome.json()["backbone_forwards"] == TRAIN_IMAGES * passes + sum(TEST_IMAGES)


def test_a_config_of_the_release_runs_without_an_accelerator_with_one_warning(
    digit_folder, run_main, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    outcome = run_main(tmp_path, data_path=str(digit_folder), device=["0"], prefix="reproduce")
    assert outcome.code == 0
    folder = tmp_path / "logs" / "tosca" / "imagefolder" / "0" / "2"
    run = json.loads((folder / "reproduce_1993_vit_tiny_patch16_224.json").read_text())
    assert run["status"] == "finished" and run["config"]["device"] == ["0"]
    assert capsys.readouterr().out.count("no accelerator") == 1


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["{config}", "epochs=1", "lr=0.5"],
        ["epochs=1", "lr=0.5", "{config}"],
        ["epochs=1", "{config}", "lr=0.5"],
        ["{config}", "epochs=1", "--fresh", "lr=0.5"],
    ],
)
def test_overrides_may_stand_anywhere(tmp_path, monkeypatch, arguments):
    path = tmp_path / "exp.json"
    path.write_text('{"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": "glyphs_vit"}')
    seen = []
    monkeypatch.setattr("trainer.run", lambda cells, fresh, jobs: seen.append((cells[0].config, fresh, jobs)))
    assert main.main([argument.format(config=f"--config={path}") for argument in arguments]) == 0
    assert [(config.epochs, config.lr, fresh, jobs) for config, fresh, jobs in seen] == [
        (1, 0.5, "--fresh" in arguments, 1)
    ]


def test_without_arguments_the_demo_runs(monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.run", lambda cells, fresh, jobs: seen.append(cells[0].config))
    assert main.main([]) == 0
    assert (seen[0].dataset, seen[0].backbone_type, seen[0].selection) == ("digits", "glyphs_vit", "sample")
