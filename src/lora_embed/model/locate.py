"""Where a checkpoint's tensors belong in a headless model, by transformers' own loader."""

import copy
import math
from typing import Any

import torch
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING, PretrainedConfig

from lora_embed.model.base import model_class, without_pooler
from lora_embed.model.transformers_private import dual_encoder_of

_USUAL_HEADS = {"classifier", "head", "score"}
_FIRST = 1024  # of the numbers that `locate` loads: no weight begins as one of them


def locate(config: PretrainedConfig, shapes: dict[str, torch.Size]) -> dict[str, str | None]:
    """Ask transformers' checkpoint loader which weight of the headless model takes each named tensor.

    The loader knows base prefixes and the modules renamed between transformers 4 and 5. Each name is loaded as a
    tensor of numbers that no other has; the weight that holds exactly those afterwards is where it belongs. A name maps
    to None when it fits no weight, one of another shape, several, or a part of one.
    """
    names = sorted(shapes)
    probe = {name: _ramp(number, shapes[name]) for number, name in enumerate(names)}
    model = model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=dict(probe),
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **without_pooler(config),
    )
    targets_of: dict[str, list[str]] = {name: [] for name in names}
    for target, weight in model.named_parameters():
        number = int(weight.detach().flatten()[0]) - _FIRST if weight.numel() else -1
        if 0 <= number < len(names) and torch.equal(weight, probe[names[number]]):
            targets_of[names[number]].append(target)
    return {name: targets[0] if len(targets) == 1 else None for name, targets in targets_of.items()}


def _ramp(number: int, shape: torch.Size) -> torch.Tensor:
    """Numbers that rise from `_FIRST + number` by less than one: what is split, joined, turned or shuffled differs."""
    return torch.linspace(0, 0.5, math.prod(shape)).add_(_FIRST + number).reshape(shape)


def head_names(config: PretrainedConfig) -> frozenset[str]:
    """Top-level module names that belong to a task: classifiers, poolers, the other half of a dual encoder.

    They are the children of the classes that people train, less those of the headless model.
    """
    body = model_class(config)
    with torch.device("meta"):
        headless = body(config, **without_pooler(config))
        trained = [whole_class(whole) for whole_class, whole in _trained_classes(config)]
    own = {name for name, _ in headless.named_children()} | {headless.base_model_prefix}
    children = [(name, child) for model in trained for name, child in model.named_children()]
    heads = {name for name, child in children if not isinstance(child, body)} - own
    return frozenset(heads | {"pooler"} | (_USUAL_HEADS if len(trained) == 1 else set()))


def _trained_classes(config: PretrainedConfig) -> list[tuple[Any, PretrainedConfig]]:
    """The plain model with its pooler, a dual encoder that it is part of, and the image classification models."""
    whole = copy.deepcopy(config)
    if config.model_type.startswith("siglip"):
        whole.vision_use_head = True
    classes = [(model_class(config), whole)]
    outer = dual_encoder_of(config)
    if outer is not None:
        whole = outer(vision_config=whole.to_dict())
        classes.append((MODEL_MAPPING[outer], whole))
    classifiers: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(whole), ())
    return classes + [(classifier, whole) for classifier in (classifiers if isinstance(classifiers, tuple) else (classifiers,))]


def weight_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """The shapes of all weights of the headless model, by name; none is allocated."""
    with torch.device("meta"):
        model = model_class(config)(config, **without_pooler(config))
    return {name: weight.shape for name, weight in model.named_parameters()}
