"""A saved run on the Hugging Face hub: a folder with the checkpoint, the backbone's file and a model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import KEYS
from utils.errors import CheckpointError, UserError
from utils.files import expanded
from utils.keys import REQUIRED
from utils.results.metrics import selection_name
from utils.results.record import run_json
from utils.runs.checkpoint import MANIFEST
from utils.words import counted, fixed

if TYPE_CHECKING:
    from models.continual import ContinualClassifier

CARD, WEIGHTS = "README.md", "backbone"
_MEASURES = ("average", "last", "forgetting")
_HTTP_CLIENTS = ("httpx", "httpx2", "requests")  # one of them, as the version of huggingface_hub has it
HINT_PATHS = ("data_path", "backbone_weights", "continue_from")  # places on the machine of the run, beside "place" keys


def save_pretrained(model: "ContinualClassifier", folder: str | Path) -> Path:
    """Write ``model`` into ``folder``; what another run has there is moved aside.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = expanded(folder)
    model.save(folder)
    weights = model.config.backbone_weights
    try:
        for old in folder.glob(f"{WEIGHTS}.*"):
            old.unlink()
        if weights:
            shutil.copyfile(expanded(weights), folder / f"{WEIGHTS}{Path(weights).suffix}")
        (folder / CARD).write_text(model_card(model), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read or written ({error.strerror})") from error
    return folder


def find_pretrained(name: str | Path) -> Path:
    """The folder ``name``, or the downloaded copy of the hub's ``user/repo``.

    Raises:
        CheckpointError: no such folder and no such repository, or one without a run.
    """
    folder = expanded(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(snapshot_download(str(name)))
        except HFValidationError as error:
            raise CheckpointError(f"{str(name)!r} is no folder, and no user/repo of the Hugging Face hub") from error
        except Exception as error:
            reason = _reason(error)
            raise CheckpointError(f"{str(name)!r} is no folder, and cannot be had from the hub ({reason})") from error
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{str(name)!r} holds no saved run: there is no {MANIFEST}")
    return folder


def shipped_weights(folder: Path) -> Path | None:
    """The backbone's file that ``save_pretrained`` put there, if any."""
    return next(iter(sorted(folder.glob(f"{WEIGHTS}.*"))), None)


def push_to_hub(model: "ContinualClassifier", repo_id: str, *, private: bool = False) -> str:
    """Create the repository if need be and upload the model; return its address.

    Raises:
        UserError: the hub refused, in one line.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[".lock"])
        except Exception as error:
            raise UserError(f"{repo_id} cannot be uploaded to the hub ({_reason(error)})") from error
    return str(url)


def _reason(error: Exception) -> str:
    """The first line of a fault of the hub, the network or the disk; any other error is raised again."""
    known = type(error).__module__.partition(".")[0] in ("huggingface_hub", *_HTTP_CLIENTS)
    if not known and not isinstance(error, OSError):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def model_card(model: "ContinualClassifier") -> str:
    """Markdown with the hub's header: data, protocol, results under every selection, how to load and to run again."""
    run, config = run_json(model.manifest), model.config
    stream = "domains" if config.scenario == "domain" else "tasks"
    names = ", ".join(_plain(name) for name in model.class_names[:20])
    more = f" and {len(model.class_names) - 20} more" if len(model.class_names) > 20 else ""
    rows = [
        f"| {' | '.join([selection_name(name), *(fixed(result[key], 2) for key in _MEASURES)])} |"
        for name, result in run["results"].items()
    ]
    table = ["| selection | Ā | A_T | forgetting |", "|---|---|---|---|", *rows] if rows else ["Not evaluated."]
    command = "python main.py --config=config.json data_path=<the data's folder>"
    return "\n".join(
        [
            *("---", "library_name: tosca", "pipeline_tag: image-classification"),
            *("tags:", "- continual-learning", "- class-incremental-learning", f"- {config.model_name}", "---", ""),
            f"# {_plain(config.model_name)} on {_plain(config.dataset)}",
            "",
            f"A frozen `{model.backbone.name}` ({model.backbone.pooling}, {config.image_size} px) and what "
            f"{_plain(config.model_name)} learned on it, task after task.",
            *("", "## Data", ""),
            f"`{config.dataset}`: {run['data']['train_images']} training and {run['data']['test_images']} test images, "
            f"{counted(len(model.class_names), 'class')}: {names}{more}.",
            *("", "## Protocol", ""),
            f"{model.tasks} {stream} of {', '.join(map(str, run['task_sizes']))} classes, seed {run['seed']}. No image "
            "of an earlier task is kept.",
            *("", "## Results", "", "Per cent, after the last task. Selections are different claims: never mix them."),
            *("", *table, "", "## Use", "", "```python", "from models import ContinualClassifier", ""),
            'model = ContinualClassifier.from_pretrained("<user>/<repo>")',
            *('model.predict(["image.jpg"]).classes', "```", "", "## Run again", "", f"`{command}` with this config:"),
            *("", "```json", json.dumps(_given(model), indent=1, ensure_ascii=False), "```", ""),
        ]
    )


def _given(model: "ContinualClassifier") -> dict[str, object]:
    """What the run's config says beyond the defaults, but for places on the machine that it ran on."""
    values = model.config.as_dict()
    kept = {}
    for name, value in values.items():
        key = KEYS.get(name)
        if key is not None and (key.affects == "place" or name in HINT_PATHS):
            continue
        default = REQUIRED if key is None else key.default
        if key is None or value != (list(default) if isinstance(default, tuple) else default):
            kept[name] = value
    return kept


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
