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
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.api.classifier import load_same_backbone
from models.base import Learner, make_learner
from utils.errors import ConfigError, UserError
from utils.files import expanded, human_size, output_file

if TYPE_CHECKING:
    from models.api.predictor import Predictor

CPU = torch.device("cpu")
SUFFIXES = (".pt2", ".onnx")
ONNX_BYTES, OPSET, IR_VERSION = 2**31, 18, 10  # the most that a file of ONNX holds; what ONNX Runtime 1.18 reads
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
        self.features, self.learner, self.selection = features, learner, selection
        of_class = [(row_class == number).nonzero()[:, 0] for number in range(int(row_class.max()) + 1)]
        padded = nn.utils.rnn.pad_sequence(of_class, batch_first=True, padding_value=len(row_class))
        self.register_buffer("rows", padded)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        answer = self.learner.answer(self.features(images), self.selection)
        nothing = answer.scores.new_full((answer.scores.shape[0], 1), -torch.inf)
        scores = torch.cat([answer.scores, nothing], dim=1)[:, self.rows].amax(dim=2)  # a class scores its best row
        if answer.module is None or answer.entropy is None:
            return (scores,)
        return scores, answer.module, answer.entropy


def as_module(model: "Predictor", selection: str | None = None) -> ImageClassifier:
    """The model as one module on the CPU, its backbone in fp32."""
    if model.backbone.precision == "fp32":
        features = copy.deepcopy(model.backbone.features).to(CPU)
    else:
        features = load_same_backbone(
            replace(model.config, precision="fp32"), CPU, None, model.backbone.adapters
        ).features
    learner = model.learner
    if learner.device != CPU:
        learner = make_learner(model.config, learner.dim, CPU, learner.seed)
        learner.load_state_dict(model.learner.state_dict(), model.module_states())
    return ImageClassifier(features, learner, torch.from_numpy(model.row_class), selection or model.selection)


def export(model: "Predictor", path: str | Path, selection: str | None = None) -> Path:
    """Write the model as ``.pt2`` (``torch.export``) or ``.onnx``, for any number of images at a time.

    The names of the classes go with it: as ``classes.json`` in the archive, or in ONNX's metadata as ``classes``.
    ONNX Runtime reads the latter from 1.18 on.
    """
    path = output_file(expanded(path), "--export", *SUFFIXES)
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None] if path.suffix == ".onnx" else []
    if missing:
        raise UserError(f"{path.name} needs {' and '.join(missing)}: pip install onnx onnxscript")
    module, size = as_module(model, selection), model.config.image_size
    _check_size(path, module.features.state_dict().values())
    images = torch.zeros(EXAMPLES, 3, size, size, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("images", min=1, max=MOST_IMAGES)},)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
            held = [value for value in program.constants.values() if isinstance(value, Tensor)]
            _check_size(path, [*program.state_dict.values(), *held])
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


def _check_size(path: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse ONNX for more than one of its files holds, before it is made."""
    if path.suffix == ".onnx" and (size := sum(t.numel() * t.element_size() for t in tensors)) > ONNX_BYTES:
        limit = human_size(ONNX_BYTES)
        raise UserError(f"{path.name}: the model has {human_size(size)}, ONNX holds {limit}; give a name in .pt2")


def _save_onnx(program: torch.export.ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    import onnx

    outputs = ("scores", "module", "entropy")[: len(program.graph_signature.user_outputs)]
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    converted = torch.onnx.export(
        program, input_names=["images"], output_names=list(outputs), opset_version=OPSET, verbose=False
    )
    if converted is None:
        raise ConfigError("torch.onnx.export gave no program")
    model = converted.model_proto
    model.ir_version = min(model.ir_version, IR_VERSION)
    for name, value in about.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props.add(key=name, value=text)
    onnx.save(model, str(path))
