"""A saved run on the Hugging Face hub: a folder with the checkpoint, the backbone's file and a model card."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.config import KEYS
from utils.config.keys import REQUIRED
from utils.errors import CheckpointError, UserError
from utils.files import expanded, partial_path, replacing
from utils.results.metrics import selection_name
from utils.results.record import run_json
from utils.runs.checkpoint import MANIFEST
from utils.words import counted, fixed

if TYPE_CHECKING:
    from models.api.classifier import ContinualClassifier

CARD, WEIGHTS = "README.md", "backbone"
_CARD = """\
---
{{ card_data }}
---

# {{ title }}

A frozen {{ backbone }} and what {{ method }} learned on it, task after task.

## Data

`{{ dataset }}`: {{ data }}.

## Protocol

{{ protocol }} {{ kept }}

## Results

Per cent, after the last task. Selections are different claims: never mix them.

{{ results }}

## Use

```python
from models import ContinualClassifier

model = ContinualClassifier.from_pretrained("<user>/<repo>")
model.predict(["image.jpg"]).classes
```

## Run again

`python main.py --config=config.json data_path=<the data's folder>` with this config:

```json
{{ config }}
```
"""
_MEASURES = ("average", "last", "forgetting")
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests")  # whose errors are the hub's or the network's
HINT_PATHS = ("data_path", "backbone_weights", "continue_from")  # places on the machine of the run, beside "place" keys


def save_pretrained(model: "ContinualClassifier", folder: str | Path) -> Path:
    """Write ``model`` into ``folder``, also into that which it was loaded from; all of another run is moved aside."""
    folder, weights = expanded(folder), model.config.backbone_weights
    source = expanded(weights).resolve() if weights else None
    own = [path for path in (*folder.glob(f"{WEIGHTS}.*"), folder / CARD) if path.is_file()]
    foreign = [path for path in own if path.name != CARD and path.resolve() != source]
    if foreign and not (folder / MANIFEST).is_file():
        raise UserError(f"{foreign[0]} would be taken for the backbone of this model; give another folder")
    try:
        aside = model.save(folder)
        for path in own if aside else ():
            assert aside is not None
            of_model = path.resolve() == source
            moved = path.rename(aside / path.name)
            source = moved if of_model else source
        target = folder / f"{WEIGHTS}{source.suffix if source else ''}"
        if source and source != target.resolve():
            with open(source, "rb") as old, replacing(target, partial_path(target)) as new:
                shutil.copyfileobj(old, new)
        if not (folder / CARD).exists():
            (folder / CARD).write_text(model_card(model), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read or written ({error.strerror})") from error
    return folder


def find_pretrained(name: str | Path) -> Path:
    """The folder ``name``, or the downloaded copy of the hub's ``user/repo``."""
    folder = expanded(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name)))
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
    """Create the repository if need be and upload the model; return the address of the commit."""
    from huggingface_hub import ModelHubMixin

    class Upload(ModelHubMixin):
        def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
            save_pretrained(model, save_directory)

    try:
        return str(Upload().push_to_hub(repo_id, private=private, ignore_patterns=".lock"))
    except Exception as error:
        raise UserError(f"{repo_id} cannot be uploaded to the hub ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The first line of a fault of the hub, the network or the disk; any other error is raised again."""
    of_client = any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)
    if not of_client and not isinstance(error, OSError):
        raise error
    if type(error).__name__ in ("GatedRepoError", "RepositoryNotFoundError"):
        return "there is none, or it is private or gated: log in with hf auth login"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def model_card(model: "ContinualClassifier") -> str:
    """Markdown with the hub's header: data, protocol, results under every selection, how to load and to run again."""
    from huggingface_hub import ModelCard, ModelCardData

    run, config, counts = run_json(model.manifest), model.config, model.manifest.data
    names = ", ".join(_plain(name) for name in model.class_names[:20])
    more = f" and {len(model.class_names) - 20} more" if len(model.class_names) > 20 else ""
    images = f"{counted(counts['train_images'], 'training image')} and {counted(counts['test_images'], 'test image')}"
    tags = ["continual-learning", "class-incremental-learning", config.model_name]
    card = ModelCard.from_template(
        ModelCardData(library_name="tosca", pipeline_tag="image-classification", tags=tags),
        template_str=_CARD,
        method=config.model_name,
        title=f"{_plain(config.model_name)} on {_plain(config.dataset)}",
        backbone=f"`{model.backbone.name}` ({model.backbone.pooling}, {config.image_size} px)",
        dataset=config.dataset,
        data=f"{images}, {counted(len(model.class_names), 'class')}: {names}{more}",
        protocol=_protocol(model),
        kept=_kept(model),
        results=_results(run),
        config=json.dumps(_given(model), indent=1, ensure_ascii=False),
    )
    return str(card)


def _kept(model: "ContinualClassifier") -> str:
    """What the method needs of earlier tasks."""
    method = model.config.method
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
