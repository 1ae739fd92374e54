"""Find which weight of a headless model a checkpoint's tensor belongs to, by transformers' own loader."""

import contextlib
import copy
import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING, PretrainedConfig

from lora_embed.model.base_config import model_class, without_pooler
from lora_embed.model.transformers_private import dual_encoder_of
from lora_embed.model.weights import weights_of

_USUAL_HEADS = {"classifier", "head", "score"}
_OF_SEGMENTATION = {"decode_head", "auxiliary_head"}
_FIRST = 1024  # the first of the numbers that `locate` loads; no real weight begins with one of them


def locate(config: PretrainedConfig, shapes: dict[str, torch.Size]) -> dict[str, str | None]:
    """Ask transformers' checkpoint loader which weight of the headless model takes each named tensor.

    The loader knows base prefixes, and the modules renamed between transformers 4 and 5. Each name is loaded as a tensor of
    numbers that no other tensor has; it belongs to the weight that holds exactly these numbers afterwards. A name maps to
    None if that is no weight, several weights, a part of one, or one of another shape. Weights that were not loaded are not
    compared: their memory may hold anything.
    """
    names = sorted(shapes)
    probe = {name: _ramp(number, shapes[name]) for number, name in enumerate(names)}
    model, info = model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=dict(probe),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **without_pooler(config),
    )
    targets_of: dict[str, list[str]] = {name: [] for name in names}
    for target, weight in weights_of(model).items():
        if target in info["missing_keys"] or not weight.numel():
            continue
        first = float(weight.detach().flatten()[0])
        if _FIRST <= first < _FIRST + len(names) and torch.equal(weight, probe[names[int(first) - _FIRST]]):
            targets_of[names[int(first) - _FIRST]].append(target)
    return {name: targets[0] if len(targets) == 1 else None for name, targets in targets_of.items()}


def _ramp(number: int, shape: torch.Size) -> torch.Tensor:
    """Numbers that rise from `_FIRST + number` by less than one, so that a split, joined or transposed tensor differs."""
    return torch.linspace(0, 0.5, math.prod(shape)).add_(_FIRST + number).reshape(shape)


def head_names(config: PretrainedConfig) -> frozenset[str]:
    """Names of top-level modules that belong to a task: classifiers, poolers, the other half of a dual encoder.

    They are the children of the model classes that are used in training, without those of the headless model.
    """
    body = model_class(config)
    with torch.device("meta"):
        headless = body(config, **without_pooler(config))
        trained = [whole_class(whole) for whole_class, whole in _trained_classes(config)]
    headless_names = {name for name, _ in headless.named_children()} | {headless.base_model_prefix}
    children = [(name, child) for model in trained for name, child in model.named_children()]
    heads = {name for name, child in children if not isinstance(child, body)} - headless_names
    return frozenset(heads | {"pooler"} | (_OF_SEGMENTATION - headless_names) | (_USUAL_HEADS if len(trained) == 1 else set()))


def family_names(config: PretrainedConfig) -> frozenset[str]:
    """The model type and the prefix of its weights, and the type of the dual encoder that it may be a part of."""
    outer = dual_encoder_of(config)
    types = {config.model_type, model_class(config).base_model_prefix, *([outer.model_type] if outer is not None else [])}
    return frozenset(types)


def _trained_classes(config: PretrainedConfig) -> list[tuple[Any, PretrainedConfig]]:
    """The plain model with its pooler, the dual encoder that it is a part of, and the image classification models."""
    whole_config = copy.deepcopy(config)
    if config.model_type.startswith("siglip"):
        whole_config.vision_use_head = True
    classes = [(model_class(config), whole_config)]
    outer = dual_encoder_of(config)
    if outer is not None:
        with contextlib.suppress(StrictDataclassError):  # TIPSv2's takes no vision part whose width its text part lacks
            whole_config = outer(vision_config=whole_config.to_dict())
            classes.append((MODEL_MAPPING[outer], whole_config))
    classifiers: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(whole_config), ())
    return classes + [
        (classifier, whole_config) for classifier in (classifiers if isinstance(classifiers, tuple) else (classifiers,))
    ]


def weight_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """The shapes of all weights of the headless model, by name; none is allocated."""
    return {name: weight.shape for name, weight in weights_of(_on_meta(config)).items()}


def grouped_weights(config: PretrainedConfig) -> frozenset[str]:
    """The names of the weights of convolutions in groups, which keep channels apart."""
    convolutions = {name: m for name, m in _on_meta(config).named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    return frozenset(f"{name}.weight" for name, convolution in convolutions.items() if convolution.groups > 1)


def _on_meta(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return model_class(config)(config, **without_pooler(config))
