"""A base model's directory → its headless model in float32."""

import contextlib
import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from lora_embed.errors import EncoderError
from lora_embed.model.adapter import first_names
from lora_embed.model.base_config import (
    LIBRARY_ERRORS,
    NOT_QUANTISED,
    counted,
    fields_of,
    model_class,
    needs_package,
    read_model_config,
    without_pooler,
)
from lora_embed.model.files import weight_files
from lora_embed.model.weights import shape_of, weights_of
from lora_embed.text import agree, in_one_line, number_of

MOST_LAYERS = 1000  # layers of a model whose files hold fewer tensors than that
MOST_BUFFERS = 2**28  # numbers that a model computes for itself when it is created


def load_headless(folder: Path, where: str) -> PreTrainedModel:
    """Load the model without head and pooler, in float32, for inference. Every weight must be in the files.

    Raises EncoderError, naming `where`, for a model type that transformers opens by itself with a head only, and for missing
    weights.
    """
    return open_headless(folder, where)[0]


def open_headless(folder: Path, where: str) -> tuple[PreTrainedModel, str]:
    """`load_headless`, and the prefix that stands before the model's weights in the files; "" for what transformers knows.

    A compiled model (`_orig_mod.`), a part of a user's own model (`backbone.`) and the images' part of a language model
    (`vision_tower.`) have one. Raises EncoderError as well if the files hold the model under two prefixes.
    """
    config, prefix = read_model_config(folder, where), ""
    model, missing = _load(folder, where, config)
    if missing:
        names = _tensor_names(folder, where)
        found = _prefix_in(names, where, model)
        # Transformers knows other names of the weights only with the family's own prefix, such as `vit.`, before them; and
        # where it knows all of them by other names, only what stands before all of them can be the prefix.
        for tried in dict.fromkeys([found, found.removesuffix(f"{model.base_model_prefix}."), *_common_prefixes(names)]):
            if tried and missing:
                prefix = tried
                model, missing = _load(folder, where, config, prefix)
    if missing and all(name.endswith("mask_token") for name in missing) and getattr(config, "use_mask_token", False):
        config.use_mask_token = False  # used in pretraining only; since it is not in the files, it would be random
        model, missing = _load(folder, where, config, prefix)
    if missing:
        raise EncoderError(
            f"{where}: {_weights(model, missing)} {agree(len(missing), 'is', 'are')} not in its files: "
            f"{first_names(missing)}. Copy or download the model again."
        )
    _check_finite(model, where)
    return model.eval(), prefix


def _weights(model: PreTrainedModel, names: Sequence[str]) -> str:
    return f"{number_of(len(names), 'weight')} of {type(model).__name__}"


def _check_finite(model: PreTrainedModel, where: str) -> None:
    damaged = [name for name, weight in weights_of(model).items() if not bool(torch.isfinite(weight).all())]
    if damaged:
        raise EncoderError(
            f"{where}: {_weights(model, damaged)} {agree(len(damaged), 'holds', 'hold')} NaN or infinity: "
            f"{first_names(damaged)}. Copy or download the model again; if its files are right, its training diverged: use "
            "another checkpoint."
        )


def _load(folder: Path, where: str, config: PretrainedConfig, prefix: str = "") -> tuple[Any, list[str]]:
    """The headless model from the tensors below a prefix, and the names of its weights that are not among them."""
    fields = copy.deepcopy({name: value for name, value in vars(config).items() if not name.startswith("_")})
    try:
        with contextlib.ExitStack() as opened:
            # Without a folder, transformers cannot load other files from it, such as an adapter or other weights.
            state: dict[str, torch.Tensor] = {}
            for file in weight_files(folder, where):
                tensors = opened.enter_context(_open(file))
                names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                state |= {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
            _check_quantised(state, where)
            _check_size(copy.deepcopy(config), {name: tensor.shape for name, tensor in state.items()}, where)
            model, info = model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
                dtype=torch.float32,
                **without_pooler(config),
            )
    except ImportError as error:
        raise needs_package(config.model_type, error, where) from None
    except LIBRARY_ERRORS as error:
        raise _not_loaded(where, error) from None
    _check_shapes(model, info["mismatched_keys"], where)
    for name, value in fields.items():  # LeViT's class changes its configuration whenever a model is made
        if name != "dtype" and getattr(model.config, name) != value:
            setattr(model.config, name, value)
    return model, sorted(info["missing_keys"])


def _check_shapes(model: PreTrainedModel, mismatched: Iterable[tuple[str, torch.Size, torch.Size]], where: str) -> None:
    """`mismatched`: names with the shapes of the files and those of the configuration."""
    differing = [f"{name} {shape_of(stored)}, expected {shape_of(expected)}" for name, stored, expected in sorted(mismatched)]
    if differing:
        other = agree(len(differing), "has another shape", "have other shapes")
        raise EncoderError(
            f"{where}: {_weights(model, differing)} {other} in the files than in config.json: {'; '.join(differing[:3])}. The "
            "files belong to different models, or were changed. Copy all files of one model again."
        )


def _check_quantised(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Refuse weights of 8 bits or fewer: without the scales of the library that made them, they are other numbers."""
    for name, tensor in tensors.items():
        if tensor.element_size() == 1 and tensor.dtype != torch.bool:
            raise EncoderError(
                f"{where}: {name} holds numbers of type {str(tensor.dtype).removeprefix('torch.')}, so the weights are "
                f"quantised. {NOT_QUANTISED}"
            )


def check_base_size(folder: Path, where: str) -> None:
    """Raises EncoderError if config.json describes a far larger model than the files hold; reads no weights."""
    shapes: dict[str, torch.Size] = {}
    try:
        for file in weight_files(folder, where):
            with _open(file) as tensors:
                names = tensors.keys()
                shapes |= {name: torch.Size(tensors.get_slice(name).get_shape()) for name in names}
        config = read_model_config(folder, where)
        _check_size(config, shapes, where)
    except ImportError as error:
        raise needs_package(config.model_type, error, where) from None
    except LIBRARY_ERRORS as error:
        raise _not_loaded(where, error) from None


def _open(file: Path) -> Any:
    """A safetensors file that tensors can be read from."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise EncoderError(
            f"{file}: is not a whole safetensors file ({in_one_line(error)}). Copy or download it again."
        ) from None


def _not_loaded(where: str, error: Exception) -> EncoderError:
    return EncoderError(f"{where}: cannot be loaded: {in_one_line(error, 300)}. Copy or download the model again.")


def _tensor_names(folder: Path, where: str) -> list[str]:
    names: list[str] = []
    for file in weight_files(folder, where):
        with _open(file) as tensors:
            names += tensors.keys()
    return names


def _common_prefixes(names: list[str]) -> list[str]:
    """The parts of names that stand before every tensor's name, the shortest first: `module.`, `module._orig_mod.`."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    common = [of_all[0] for of_all in itertools.takewhile(lambda of_all: len(set(of_all)) == 1, parts)]
    return [".".join(common[: number + 1]) + "." for number in range(len(common))]


def _prefix_in(names: list[str], where: str, model: PreTrainedModel) -> str:
    """The prefix below which the files hold most of the model's weights by name; "" if no prefix does."""
    weights = set(model.state_dict())
    # transformers saves DINOv3 without the `model.` that the names of its weights begin with.
    expected, found = weights | {name.removeprefix("model.") for name in weights}, Counter[str]()
    for name in names:
        parts = name.split(".")
        tails = (".".join(parts[number:]) for number in range(1, len(parts)))
        found.update(name.removesuffix(tail) for tail in tails if tail in expected)
    most = max(found.values(), default=0)
    prefixes = sorted(prefix for prefix, count in found.items() if count == most)
    if len(prefixes) > 1:
        raise EncoderError(
            f"{where}: its files hold {type(model).__name__} {len(prefixes)} times, below "
            f"{first_names(list(map(repr, prefixes)))}. Save the one that you mean by itself, and name that base."
        )
    return prefixes[0] if prefixes else ""


def _check_size(config: PretrainedConfig, shapes: dict[str, torch.Size], where: str) -> None:
    """Refuse a configuration of a far larger model than the files hold, before it takes time and memory."""
    most = max(MOST_LAYERS, len(shapes))
    for key, value in fields_of(config.to_dict()):
        if "labels" not in key and counted(key, value) > most:
            raise EncoderError(
                f"{where}: config.json says {key} {str(value)[:100]}, but the weight files hold {len(shapes)} tensors. The "
                "files belong to different models, or were changed. Copy all files of one model again."
            )
    with torch.device("meta"):
        model = model_class(config)(config, **without_pooler(config))
    described, stored = sum(weight.numel() for weight in model.parameters()), sum(map(math.prod, shapes.values()))
    if described > max(2 * stored, 2**20) or sum(buffer.numel() for buffer in model.buffers()) > MOST_BUFFERS:
        raise EncoderError(
            f"{where}: config.json describes a model of {described:,} numbers, but the weight files hold "
            f"{stored:,}. The files belong to different models, or were changed. Copy all files of one model again."
        )
