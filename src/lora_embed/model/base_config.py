"""A base model's config.json → the configuration of the headless image model that transformers makes, or why it is refused."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import logging

from lora_embed.errors import EncoderError
from lora_embed.model.files import MODEL_CONFIG, own_file, read_json
from lora_embed.text import in_one_line

# Errors of transformers and torch for a damaged configuration or damaged weights.
LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# Fields of config.json that make transformers open files that are not hashed, or fetch code.
_LEADS_ELSEWHERE = {"configuration_files", "transformers_weights", "fusion_config"}
_ANOTHER = "Copy or download the model again, or name another base."
NOT_QUANTISED = "A base needs weights of float numbers of 16 bits or more: name the model before it was quantised."
_COUNTS = re.compile(r"layer|depth|stage|block|repeat|labels")
_SIZES = re.compile(r"dim|channel|size|ratio|scale|eps|prob|stride|width")  # numbers of a layer or stage, such as its channels
# Models of videos have one of these fields; their `pixel_values` are of several frames.
_OF_VIDEO = ("num_frames", "tubelet_size", "frames_per_clip")
# Model types whose layers, weights and names of weights are those of another one, which AutoModel opens for images alone.
# ViT-MAE's own class masks random patches; for MetaCLIP 2's vision part, AutoModel has no class.
_READ_AS = {"vit_mae": "vit", "metaclip_2_vision_model": "clip_vision_model"}
_HEADLESS = (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING)
MOST_COUNTED = 100_000  # labels, layers and similar counts of any model

logging.set_verbosity_error()
logging.disable_progress_bar()


def needs_package(model_type: str, error: ImportError, where: str) -> EncoderError:
    """What to say when transformers cannot make models of this type, because a package of theirs is missing."""
    reason = in_one_line(error, 300).partition(". ")[0]
    which = "natten 0.17.5 or earlier" if "natten" in reason else "it"  # 0.20 has no natten2dqkrpb
    return EncoderError(
        f"{where}: is a model of type {model_type!r}, which needs a package that is not installed: {reason}. Install {which}, "
        "also on the cluster, or name another base."
    )


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
    except LIBRARY_ERRORS as error:
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
            f"{where}: neither AutoModel nor AutoBackbone of transformers {transformers.__version__} opens a model of type "
            f"{config.model_type!r}. Name another base, or install a newer transformers if that opens it."
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
        about = _read(path, where)
        _check_type(about if isinstance(about, dict) else {}, where)
        for key, value in fields_of(about):
            if value and key == "quantization_config":
                raise EncoderError(f"{where}: config.json sets {key}, so its weights are quantised. {NOT_QUANTISED}")
            if key.endswith("_implementation") and "/" in str(value):
                raise EncoderError(
                    f"{where}: config.json sets {key} to {str(value)[:100]!r}, a repository whose code transformers would run. "
                    "Remove that key."
                )
            if value and key in _LEADS_ELSEWHERE:
                raise EncoderError(
                    f"{where}: config.json sets {key}, which makes transformers open files that are not checked. Remove that "
                    "key, or save the model again without it."
                )
            if counted(key, value) > MOST_COUNTED:
                raise ValueError(f"{key} is {str(value)[:100]}, more than any model has")
    except ValueError as error:
        raise EncoderError(f"{where}: config.json is not that of a known model: {error}. {_ANOTHER}") from None


def _read(path: Path, where: str) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise EncoderError(f"{where}: config.json is not valid JSON ({in_one_line(error)}). {_ANOTHER}") from None


def _check_type(about: dict[str, Any], where: str) -> None:
    """Without a type, transformers would take one from the name of the folder."""
    model_type = about.get("model_type")
    if not isinstance(model_type, str):
        raise EncoderError(f"{where}: config.json has no model_type, which says what kind of model this is. {_ANOTHER}")
    if model_type in CONFIG_MAPPING:
        return
    lead = f"{where}: config.json says model_type {model_type[:100]!r}"
    if about.get("auto_map"):
        raise EncoderError(
            f"{lead}, whose code lies beside the model (auto_map) and is never run. Name a base of a type that transformers "
            "has."
        )
    raise EncoderError(
        f"{lead}, which transformers {transformers.__version__} does not know. Install a newer transformers, or name another "
        "base."
    )


def counted(key: str, value: Any) -> int:
    """How many layers, labels or similar parts a field asks for in total; 0 for other fields."""
    counts = value if isinstance(value, list | tuple) else [value]
    is_count = _COUNTS.search(key) and not _SIZES.search(key)
    return sum(count for count in counts if type(count) is int) if is_count else 0


def fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of a configuration, nested ones too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), item
            yield from fields_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from fields_of(item)


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
