"""A saved run as one ``nn.Module`` that needs nothing of this project: uint8 images in, class scores out.

    python predict.py --checkpoint tosca --export model.pt2      # torch.export; torch.export.load(...).module()(images)
    python predict.py --checkpoint tosca --export model.onnx     # ONNX; pip install onnx onnxscript

The module holds the backbone, in fp32, and the learner. Images are ``(images, 3, S, S)`` uint8 after the test
transform, any number of them.
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from backbone.vit import load_backbone
from models.base import Learner
from utils.errors import ConfigError, UserError
from utils.files import expanded

if TYPE_CHECKING:
    from models.api.predictor import Predictor

CPU = torch.device("cpu")
SUFFIXES = (".pt2", ".onnx")
MOST_IMAGES = 2**31 - 1  # at a time; some versions of torch.export refuse a number without a bound
EXAMPLES = 2  # images that the model is traced with: a batch of one would become a constant


class ImageClassifier(nn.Module):
    """Images to answers under one selection.

    ``forward`` returns the classes' scores ``(images, classes)``, whose softmax ``predict`` calls probabilities; of a
    method with modules also the module that answered ``(images,)`` int64, and its entropy ``(images,)`` in nats.

    Args:
        features: the backbone's forward pass.
        learner: what was learned.
        row_class: ``(rows,)`` int64, the class of each of the learner's rows.
        selection: how the module is chosen.
    """

    rows: Tensor  # (classes, most rows of a class) numbers of rows; one past the last row where a class has fewer

    def __init__(self, features: nn.Module, learner: Learner, row_class: Tensor, selection: str = "sample") -> None:
        super().__init__()
        learner.check_selection(selection)
        self.features, self.learned, self.selection = features, Held(learner), selection
        of_class = [(row_class == number).nonzero()[:, 0] for number in range(int(row_class.max()) + 1)]
        padded = nn.utils.rnn.pad_sequence(of_class, batch_first=True, padding_value=len(row_class))
        self.register_buffer("rows", padded)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        learner: Learner = self.learned()
        answer = learner.answer(self.features(images), self.selection)
        nothing = answer.scores.new_full((answer.scores.shape[0], 1), -torch.inf)
        scores = torch.cat([answer.scores, nothing], dim=1)[:, self.rows].amax(dim=2)  # a class scores its best row
        if answer.module is None or answer.entropy is None:
            return (scores,)
        return scores, answer.module, answer.entropy


class Held(nn.Module):
    """An object whose tensors are this module's buffers, so that tracing, saving and moving see them.

    Calling it gives a copy of the object that reads the buffers: tensors in dictionaries, tuples and objects of this
    project, at any depth.
    """

    def __init__(self, held: Any) -> None:
        super().__init__()
        self._held = held
        self._names: dict[int, str] = {}  # by the identity of a tensor
        self._hold(held)

    def forward(self) -> Any:
        return self._read(self._held)

    def _hold(self, value: Any) -> None:
        if isinstance(value, Tensor) and id(value) not in self._names:
            name = f"tensor{len(self._names)}"
            self._names[id(value)] = name
            self.register_buffer(name, value.detach().to(CPU).clone())
        for part in _parts(value).values():
            self._hold(part)

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return getattr(self, self._names[id(value)])
        if isinstance(value, torch.device):
            return CPU
        parts = {name: self._read(part) for name, part in _parts(value).items()}
        if not parts:
            return value
        if isinstance(value, dict):
            return parts
        if isinstance(value, tuple):
            return tuple(parts.values()) if type(value) is tuple else type(value)(*parts.values())  # a NamedTuple
        twin = copy.copy(value)
        twin.__dict__.update(parts)
        return twin


def _parts(value: Any) -> Mapping[Any, Any]:
    """What is inside a value that may hold tensors; nothing for all others."""
    if isinstance(value, dict):
        return value
    if isinstance(value, tuple):
        return dict(enumerate(value))
    return vars(value) if type(value).__module__.startswith("models.") else {}


def as_module(model: "Predictor", selection: str | None = None) -> ImageClassifier:
    """The model as one module on the CPU, its backbone in fp32.

    Raises:
        ConfigError: a selection that cannot answer single images.
    """
    if model.backbone.precision == "fp32":
        features = copy.deepcopy(model.backbone.features).to(CPU)
    else:
        features = load_backbone(replace(model.config, precision="fp32"), CPU).features
    return ImageClassifier(features, model.learner, torch.from_numpy(model.row_class), selection or model.selection)


def export(model: "Predictor", path: str | Path, selection: str | None = None) -> Path:
    """Write the model as ``.pt2`` (``torch.export``) or ``.onnx``, for any number of images at a time.

    The names of the classes go with it: as ``classes.json`` in the archive, or in ONNX's metadata as ``classes``.

    Raises:
        UserError: another suffix, a package that is missing, or a file that cannot be written.
        ConfigError: a selection that cannot answer single images.
    """
    path = expanded(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"--export {str(path)!r}: the suffix says the format; give a name that ends in .pt2 or .onnx")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None] if path.suffix == ".onnx" else []
    if missing:
        raise UserError(f"{path.name} needs {' and '.join(missing)}: pip install onnx onnxscript")
    module, size = as_module(model, selection), model.config.image_size
    images = torch.zeros(EXAMPLES, 3, size, size, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("images", min=1, max=MOST_IMAGES)},)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
            _drop_unused(program)
            about = {"classes": list(model.class_names), "image_size": size, "selection": module.selection}
            if path.suffix == ".pt2":
                torch.export.save(program, partial, extra_files={"classes.json": json.dumps(about, ensure_ascii=False)})
            else:
                _save_onnx(program, partial, about)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--export {str(path)!r} cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _drop_unused(program: torch.export.ExportedProgram) -> None:
    """Leave out the tensors that this selection does not read, such as what further learning would need."""
    unused = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    specs = program.graph_signature.input_specs
    for spec in [s for s in specs if s.kind != InputKind.USER_INPUT and s.arg.name in unused]:
        specs.remove(spec)
        program.graph.erase_node(unused[spec.arg.name])
        for tensors in (program.state_dict, program.constants):
            tensors.pop(str(spec.target), None)
    program.graph_module.recompile()


def _save_onnx(program: torch.export.ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    import onnx

    outputs = ("scores", "module", "entropy")[: len(program.graph_signature.user_outputs)]
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    converted = torch.onnx.export(program, input_names=["images"], output_names=list(outputs), verbose=False)
    if converted is None:
        raise ConfigError("torch.onnx.export gave no program")
    model = converted.model_proto
    for name, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props.add(key=name, value=text)
    onnx.save(model, str(path))
