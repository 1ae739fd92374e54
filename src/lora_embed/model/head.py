"""The classification head that an adapter was saved with: logits from the hidden states of an encoder's model (the body).

What a head reads (in DINOv2, the class token and the mean of the patches) is decided by the classification model of
transformers. Its forward pass runs here without its own body: it gets the output that the encoder's model has just computed,
so a head needs no second pass of the body.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from lora_embed.errors import StorageError
from lora_embed.model.base_config import read_model_config
from lora_embed.model.base_files import Base
from lora_embed.model.files import MODEL_CONFIG, own_file, read_json
from lora_embed.model.whole import TYPES

if TYPE_CHECKING:
    from lora_embed.model.match import Adapter


@dataclass(frozen=True, kw_only=True)
class SavedHead:
    """An adapter's head, as it is sent to workers."""

    config: dict[str, Any]  # of the classification model
    weights: bytes  # safetensors, named as that model names them

    @property
    def classes(self) -> int:
        """The number of classes, which is the number of the head's outputs."""
        return len(self.config["id2label"])

    def to_bytes(self) -> bytes:
        """The configuration as a line of JSON, then the weights."""
        return json.dumps(self.config).encode() + b"\n" + self.weights

    @classmethod
    def from_bytes(cls, data: bytes) -> "SavedHead":
        config, _, weights = data.partition(b"\n")
        return cls(config=json.loads(config), weights=weights)


def find_head(base: Base, adapter: "Adapter") -> SavedHead | str:
    """The head that an adapter was saved with, or a text that says why none can be used with an encoder."""
    config = read_model_config(base.folder, base.uri)
    if MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None) is None:
        return f"transformers has no image classification model of type {config.model_type!r}"
    tensors = {name: adapter.saved.tensors[key] for name, key in adapter.heads.items()}
    if not tensors:
        return "the adapter was saved without a head (modules_to_save)"
    if adapter.own_head:
        return "the head belongs to a class of its own around the base, so nobody can know what it reads"
    types = {str(tensor.dtype) for tensor in tensors.values() if tensor.ndim and tensor.dtype not in TYPES}
    if types:
        return f"the head is saved as {', '.join(sorted(types))}, which only the library that quantised it can read"
    tensors = {name: tensor.float() if tensor.ndim else tensor for name, tensor in tensors.items()}
    for classes in sorted({len(tensor) for tensor in tensors.values() if tensor.ndim}):
        labelled = copy.deepcopy(config)
        labelled.num_labels = classes
        model, body = _classifier(labelled)
        if body is None:
            return f"{type(model).__name__} does not hold the headless model as a part"
        if _reads_own_pooler(getattr(model, body)):
            return f"the head of {type(model).__name__} reads a pooled output, which an encoder does not compute"
        delattr(model, body)
        if {name: tensor.shape for name, tensor in tensors.items()} == {n: p.shape for n, p in model.state_dict().items()}:
            return SavedHead(
                config=json.loads(labelled.to_json_string(use_diff=False)),
                weights=save({name: tensor.contiguous() for name, tensor in tensors.items()}),
            )
    return f"the tensors saved with the adapter are not the head of {type(model).__name__}: {', '.join(sorted(tensors))}"


def class_names(folder: Path) -> dict[int, str]:
    """The names of a head's outputs, from a `config.json` beside the adapter; empty if they are transformers' LABEL_0, …."""
    path = own_file(folder, MODEL_CONFIG)
    if path is None:
        return {}
    try:
        names = read_json(path).get("id2label") or {}
        by_number = {int(number): str(name) for number, name in names.items()}
    except (StorageError, ValueError, AttributeError):
        return {}
    return {} if all(name == f"LABEL_{number}" for number, name in by_number.items()) else by_number


class HeadOnBody:
    """Logits in addition to an encoder's vectors: the head runs after each forward pass of the body."""

    def __init__(self, head: SavedHead, body: PreTrainedModel) -> None:
        config = AutoConfig.for_model(**head.config)
        self._model, name = _classifier(config)
        assert name is not None, "find_head gives no head of such a model"
        self._body = _Computed()
        setattr(self._model, name, self._body)
        self._model.load_state_dict(load(head.weights), strict=True, assign=True)
        weight = next(body.parameters())
        nn.Module.to(self._model, weight.device, weight.dtype).eval()
        self._logits: list[torch.Tensor] = []
        body.register_forward_hook(self._follow, with_kwargs=True)

    def take(self, images: int) -> NDArray[np.float32]:
        """Logits (images, classes) of the passes since the last call, without those of padding images."""
        logits, self._logits = self._logits, []
        return torch.cat(logits)[:images].float().cpu().numpy()

    def _follow(self, _module: nn.Module, _inputs: Any, inputs_by_name: dict[str, Any], output: Any) -> None:
        self._body.output = output
        self._logits.append(self._model(pixel_values=inputs_by_name["pixel_values"]).logits)


class _Computed(nn.Module):
    """A stand-in for the body, whose output was already computed."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _classifier(config: PretrainedConfig) -> tuple[PreTrainedModel, str | None]:
    """The classification model without memory for its weights, and the name of its body in it, if it has one."""
    classes: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    classifier = classes[0] if isinstance(classes, tuple) else classes
    with torch.device("meta"):
        model = classifier(config)
    return model, next(_bodies(model, MODEL_MAPPING.get(type(config), ())), None)


def _bodies(model: PreTrainedModel, kind: Any) -> Iterator[str]:
    return (name for name, child in model.named_children() if isinstance(child, kind))


def _reads_own_pooler(body: nn.Module) -> bool:
    return getattr(body, "pooler", None) is not None
