"""A base model's directory → its checked files, configuration and headless model in float32."""

import contextlib
import copy
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from lora_embed.errors import EncoderError
from lora_embed.model.files import MODEL_CONFIG, own_file, read_json, weight_files
from lora_embed.text import in_one_line

# Errors of transformers and torch for a damaged configuration or damaged weights.
_LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# Fields of config.json that make transformers open files that are not hashed, or fetch code.
_LEADS_ELSEWHERE = {"configuration_files", "transformers_weights", "quantization_config", "fusion_config"}
_ANOTHER = "Copy or download the model again, or name another base."
_COUNTS = re.compile(r"layer|depth|stage|block|repeat|labels")
_SIZES = re.compile(r"dim|channel|size|ratio|scale|eps|prob|stride|width")  # numbers of a layer or stage, such as its channels
# Models of videos have one of these fields; their `pixel_values` are of several frames.
_OF_VIDEO = ("num_frames", "tubelet_size", "frames_per_clip")
# Model types whose layers, weights and names of weights are those of another one, which AutoModel opens for images alone.
# ViT-MAE's own class masks random patches; for MetaCLIP 2's vision part, AutoModel has no class.
_READ_AS = {"vit_mae": "vit", "metaclip_2_vision_model": "clip_vision_model"}
_HEADLESS = (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING)
MOST_COUNTED = 100_000  # labels, layers and similar counts of any model
MOST_LAYERS = 1000  # layers of a model whose files hold fewer tensors than that
MOST_BUFFERS = 2**28  # numbers that a model computes for itself when it is created

logging.set_verbosity_error()
logging.disable_progress_bar()


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
            f"{where}: {len(missing)} weights of {type(model).__name__} are not in its files: {missing[:3]}. Copy or download "
            "the model again."
        )
    return model.eval(), prefix


def _load(folder: Path, where: str, config: PretrainedConfig, prefix: str = "") -> tuple[Any, list[str]]:
    """The headless model from the tensors below a prefix, and the names of its weights that are not among them."""
    fields = copy.deepcopy({name: value for name, value in vars(config).items() if not name.startswith("_")})
    try:
        with contextlib.ExitStack() as opened:
            # Without a folder, transformers cannot load other files from it, such as an adapter or other weights.
            state: dict[str, torch.Tensor] = {}
            for file in weight_files(folder, where):
                tensors = opened.enter_context(safe_open(file, "pt"))
                names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
                state |= {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
            _check_size(copy.deepcopy(config), state, where)
            model, info = model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                dtype=torch.float32,
                **without_pooler(config),
            )
    except ImportError as error:
        raise needs_package(config.model_type, error, where) from None
    except _LIBRARY_ERRORS as error:
        raise EncoderError(f"{where}: cannot be loaded: {in_one_line(error, 300)}. Copy or download the model again.") from None
    for name, value in fields.items():  # LeViT's class changes its configuration whenever a model is made
        if name != "dtype" and getattr(model.config, name) != value:
            setattr(model.config, name, value)
    return model, sorted(info["missing_keys"])


def needs_package(model_type: str, error: ImportError, where: str) -> EncoderError:
    """What to say when transformers cannot make models of this type, because a package of theirs is missing."""
    return EncoderError(
        f"{where}: is a model of type {model_type!r}, which needs a package that is not installed: "
        f"{in_one_line(error, 300).partition('. ')[0]}. Install it, also on the cluster, or name another base."
    )


def _tensor_names(folder: Path, where: str) -> list[str]:
    names: list[str] = []
    for file in weight_files(folder, where):
        with safe_open(file, "pt") as tensors:
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
            f"{where}: its files hold {type(model).__name__} {len(prefixes)} times, below {prefixes[:3]}. Save the one that "
            "you mean by itself, and name that base."
        )
    return prefixes[0] if prefixes else ""


def read_model_config(folder: Path, where: str) -> PretrainedConfig:
    """The configuration of the headless image model; for a dual encoder (CLIP, SigLIP), that of its vision part.

    Raises EncoderError if transformers has no headless model for it.
    """
    _check_config(folder, where)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # otherwise it asks at the terminal
    except ImportError as error:
        model_type = read_json(folder / MODEL_CONFIG).get("model_type")
        raise needs_package(str(model_type), error, where) from None
    except _LIBRARY_ERRORS as error:
        raise EncoderError(f"{where}: config.json is not that of a known model: {in_one_line(error)}. {_ANOTHER}") from None
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PretrainedConfig):
        config = vision
    if config.model_type in _READ_AS:
        read_as = CONFIG_MAPPING[_READ_AS[config.model_type]]
        known = read_as().to_dict()
        config = read_as(**{name: value for name, value in config.to_dict().items() if name in known and name != "model_type"})
    if all(type(config) not in mapping for mapping in _HEADLESS):
        raise EncoderError(
            f"{where}: transformers {transformers.__version__} has no headless model of type {config.model_type!r}: neither "
            "AutoModel nor AutoBackbone opens it. Install a newer transformers that has one, or name another base."
        )
    _check_takes_images(config, where)
    if config.model_type.startswith("siglip"):  # no attention pooling; older versions than 5.22 obey this field too
        config.vision_use_head = False
    # With other values, every forward pass would keep all layers' states, or return tuples.
    config.output_hidden_states, config.output_attentions, config.return_dict = False, False, True
    return config  # type: ignore[no-any-return]


def _check_config(folder: Path, where: str) -> None:
    """Refuse a config.json that makes transformers open other files or run code, before transformers reads it."""
    path = own_file(folder, MODEL_CONFIG)
    try:
        if path is None:
            raise ValueError("the file does not exist")
        for key, value in _fields_of(read_json(path)):
            if value and (key in _LEADS_ELSEWHERE or (key.endswith("_implementation") and "/" in str(value))):
                raise EncoderError(
                    f"{where}: config.json sets {key}, which makes transformers open files that are not checked. Remove that "
                    "key, or save the model again without it."
                )
            if _counted(key, value) > MOST_COUNTED:
                raise ValueError(f"{key} is {str(value)[:100]}, more than any model has")
    except ValueError as error:
        raise EncoderError(f"{where}: config.json is not that of a known model: {error}. {_ANOTHER}") from None


def _counted(key: str, value: Any) -> int:
    """How many layers, labels or similar parts a field asks for in total; 0 for other fields."""
    counts = value if isinstance(value, list | tuple) else [value]
    is_count = _COUNTS.search(key) and not _SIZES.search(key)
    return sum(count for count in counts if type(count) is int) if is_count else 0


def _fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of a configuration, nested ones too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from _fields_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _fields_of(item)


def _check_size(config: PretrainedConfig, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Refuse a configuration of a far larger model than the files hold, before it takes time and memory."""
    most = max(MOST_LAYERS, len(tensors))
    for key, value in _fields_of(config.to_dict()):
        if "labels" not in key and _counted(key, value) > most:
            raise EncoderError(
                f"{where}: config.json says {key} {str(value)[:100]}, but the weight files hold {len(tensors)} tensors. The "
                "files belong to different models, or were changed. Copy all files of one model again."
            )
    with torch.device("meta"):
        model = model_class(config)(config, **without_pooler(config))
    described, stored = (sum(weight.numel() for weight in weights) for weights in (model.parameters(), tensors.values()))
    if described > max(2 * stored, 2**20) or sum(buffer.numel() for buffer in model.buffers()) > MOST_BUFFERS:
        raise EncoderError(
            f"{where}: config.json describes a model of {described:,} numbers, but the weight files hold "
            f"{stored:,}. The files belong to different models, or were changed. Copy all files of one model again."
        )


def _check_takes_images(config: PretrainedConfig, where: str) -> None:
    """Raises EncoderError for a model of text or videos, and for one that needs more than pixels, such as SigLIP 2 NaFlex."""
    model = model_class(config)
    try:
        parameters = inspect.signature(model.forward).parameters
    except ImportError as error:
        raise needs_package(config.model_type, error, where) from None
    ordinary, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    inputs = [name for name, parameter in parameters.items() if parameter.kind is ordinary and parameter.default is required]
    others = [name for name in inputs if name not in ("self", "pixel_values")]
    if "pixel_values" not in parameters or others:
        reason = f"needs {', '.join(others)} as well" if others else "takes no pixel_values"
        raise EncoderError(
            f"{where}: {model.__name__} {reason}, but a base must take images alone. "
            "Name a vision model such as ViT, DINOv2, CLIP or SigLIP."
        )
    if "input_ids" in parameters:
        raise EncoderError(
            f"{where}: {model.__name__} reads texts too, but a base must take images alone. Name its vision model, or one such "
            "as ViT, DINOv2, CLIP or SigLIP."
        )
    if any(hasattr(config, field) for field in _OF_VIDEO):
        raise EncoderError(
            f"{where}: {model.__name__} takes videos, but a base must take single images. Name a vision model such as ViT, "
            "DINOv2, CLIP or SigLIP."
        )


def model_class(config: PretrainedConfig) -> Any:
    """The class of the headless model: AutoModel's, or AutoBackbone's for a type (PP-LCNet) that AutoModel does not know.

    Of several, it is the first, which is AutoModel's choice without further names.
    """
    classes = next(mapping[type(config)] for mapping in _HEADLESS if type(config) in mapping)
    return classes[0] if isinstance(classes, tuple) else classes


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """The arguments that make the model without a pooler; some families would add one with random weights."""
    accepted = inspect.signature(model_class(config)).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
