"""A saved run on the Hugging Face hub: a folder with the checkpoint, the backbone's file and a model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.config import KEYS
from utils.config.keys import REQUIRED
from utils.config.methods import Method
from utils.errors import CheckpointError, UserError
from utils.files import expanded, open_regular, partial_path, replacing
from utils.results.metrics import selection_name
from utils.results.record import run_json
from utils.runs.checkpoint import MANIFEST
from utils.words import counted, fixed

if TYPE_CHECKING:
    from models.api.classifier import ContinualClassifier

CARD, WEIGHTS = "README.md", "backbone"
_CARD = """\
---
library_name: tosca
pipeline_tag: image-classification
tags:
- continual-learning
- class-incremental-learning
- {method}
---

# {title}

A frozen {backbone} and what {method} learned on it, task after task.

## Data

`{dataset}`: {train} and {test}, {classes}.

## Protocol

{protocol} {kept}

## Results

Per cent, after the last task. Selections are different claims: never mix them.

{results}

## Use

```python
from models import ContinualClassifier

model = ContinualClassifier.from_pretrained("<user>/<repo>")
model.predict(["image.jpg"]).classes
```

## Run again

`python main.py --config=config.json data_path=<the data's folder>` with this config:

```json
{config}
```
"""
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
        kept = folder / f"{WEIGHTS}{Path(weights).suffix}" if weights else None
        if weights and kept:  # read before anything goes: the weights may be this folder's own
            with replacing(kept, partial_path(kept)) as file, open_regular(expanded(weights)) as source:
                shutil.copyfileobj(source, file)
        for old in folder.glob(f"{WEIGHTS}.*"):
            if old != kept:
                old.unlink()
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
    names = ", ".join(_plain(name) for name in model.class_names[:20])
    more = f" and {len(model.class_names) - 20} more" if len(model.class_names) > 20 else ""
    return _CARD.format(
        method=config.model_name,
        title=f"{_plain(config.model_name)} on {_plain(config.dataset)}",
        backbone=f"`{model.backbone.name}` ({model.backbone.pooling}, {config.image_size} px)",
        dataset=config.dataset,
        train=counted(run["data"]["train_images"], "training image"),
        test=counted(run["data"]["test_images"], "test image"),
        classes=f"{counted(len(model.class_names), 'class')}: {names}{more}",
        protocol=_protocol(model),
        kept=_kept(config.method),
        results=_results(run),
        config=json.dumps(_given(model), indent=1, ensure_ascii=False),
    )


def _kept(method: Method) -> str:
    """What the method needs of earlier tasks."""
    if not method.continual:
        return "Not continual: it saw the images of all tasks at once, an upper bound."
    return "The features of all earlier images are kept." if method.exemplars else "No earlier image is kept."


def _protocol(model: "ContinualClassifier") -> str:
    """How many tasks of how many classes, or which domains, in which order."""
    sizes, seed = [len(rows) for rows in model.manifest.learned().task_rows], f"seed {model.manifest.seed}"
    if model.domains:
        named = ", ".join(_plain(name) if name else "(no domain)" for name in model.domains)
        return f"{counted(model.tasks, 'domain')}, in this order: {named}; {seed}."
    each = f"{', '.join(map(str, sizes))} classes"
    if len(set(sizes)) == 1:
        each = counted(sizes[0], "class") + (" each" if len(sizes) > 1 else "")
    return f"{counted(model.tasks, 'task')} of {each}, {seed}."


def _results(run: dict[str, Any]) -> str:
    """The square of selections as a Markdown table."""
    if not run["results"]:
        return "Not evaluated."
    rows = ["| selection | Ā | A_T | forgetting |", "|---|---|---|---|"]
    for name, result in run["results"].items():
        numbers = " | ".join(fixed(result[key], 2) for key in _MEASURES)
        rows.append(f"| {selection_name(name)} | {numbers} |")
    return "\n".join(rows)


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
