"""A base model's directory → a headless model in float32, and where a checkpoint's tensors belong in it."""

import contextlib
import hashlib
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from lora_embed.errors import ChangedMeanwhile, EncoderError
from lora_embed.model.files import (
    MODEL_CONFIG,
    MODEL_INDEX,
    PROCESSOR_FILES,
    model_files,
    own_file,
    own_files,
    read_json,
    weight_files,
)
from lora_embed.model.follow import ADVICE
from lora_embed.store import hub
from lora_embed.store.fetch import fetch_directory
from lora_embed.text import in_one_line

MODEL_FILES = (MODEL_CONFIG, *PROCESSOR_FILES, "*.safetensors", MODEL_INDEX)  # patterns of what is copied of a model elsewhere
# What transformers and torch raise for a configuration or weights that nobody saved so.
_LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# Fields of config.json by which transformers opens files that are not hashed, or fetches code.
_LEADS_ELSEWHERE = {"configuration_files", "transformers_weights", "quantization_config", "fusion_config"}
_COUNTS = re.compile(r"layer|depth|stage|block|repeat|labels")
MOST_COUNTED = 100_000  # labels, layers and the like of any model
MOST_LAYERS = 1000  # where the files hold fewer tensors
MOST_BUFFERS = 2**28  # numbers that a model computes for itself when it is made

logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model's files on this machine, identified by their content."""

    uri: str
    folder: Path
    content_hash: str


def find_base(uri: str, revision: str | None, *, asks_hub: bool = True) -> Base:
    """Bring a base model's files to this machine and hash them; `owner/name` that is no directory here is of the hub.

    Unless it `asks_hub`, the hub's cache alone is looked at. Raises StorageError when they cannot be read, EncoderError when
    they are not a model's.
    """
    folder = _fetch(uri, revision, asks_hub)
    if own_file(folder, MODEL_CONFIG) is None:
        raise EncoderError(f"{uri}: is not a Hugging Face model directory: it has no config.json")
    if not own_files(folder, PROCESSOR_FILES):
        raise EncoderError(f"{uri}: has no preprocessor_config.json, so how images are prepared is unknown. Save it there.")
    return Base(uri=uri, folder=folder, content_hash=_hash(model_files(folder, uri)))


def _fetch(uri: str, revision: str | None, asks_hub: bool) -> Path:
    refusal = f"{uri}: neither a directory here nor a repository of the hub that can be read"
    if hub.is_repository(uri):
        repository, refusal = hub.parse(uri, revision), f"{uri}: no repository of the hub that can be read"
    elif os.path.exists(uri) or not hub.may_be_repository(uri):
        return fetch_directory(uri, revision, MODEL_FILES)
    else:
        repository = hub.Repository(name=uri, revision=revision, folder="")
    if not asks_hub:
        refusal = f"{uri}: is not in the hub's cache, and an encoder that lies elsewhere names it. {ADVICE.format(uri=uri)}"
    return hub.download(repository, MODEL_FILES, refusal, asks_hub=asks_hub)


def check_base(base: Base) -> None:
    """Raises ChangedMeanwhile when the files are others than those that were hashed: what was loaded may be of either."""
    if _hash(model_files(base.folder, base.uri)) != base.content_hash:
        raise ChangedMeanwhile(f"{base.uri}: changed while the encoder was built. Run the same command again.")


def is_base(base: Base, content_hash: str) -> bool:
    """Was this base hashed so? Before, safetensors files that no model is loaded from were hashed with the others."""
    if base.content_hash == content_hash:
        return True
    names = (MODEL_CONFIG, *PROCESSOR_FILES, *sorted(path.name for path in base.folder.glob("*.safetensors")))
    return _hash(own_files(base.folder, names)) == content_hash


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load_headless(folder: Path, where: str) -> PreTrainedModel:
    """Load the model without head and pooler, in float32, ready for inference; every weight must be in the files.

    Raises EncoderError, naming `where`, for a model type unknown to AutoModel and for missing weights.
    """
    config = read_model_config(folder, where)
    model, missing = _load(folder, where, config)
    if missing and all(name.endswith("mask_token") for name in missing) and getattr(config, "use_mask_token", False):
        config.use_mask_token = False  # of use in pretraining alone; not in the files, it would be random
        model, missing = _load(folder, where, config)
    if missing:
        raise EncoderError(f"{where}: {len(missing)} weights of {type(model).__name__} are not in its files: {missing[:3]}")
    return model.eval()  # type: ignore[no-any-return]


def _load(folder: Path, where: str, config: PretrainedConfig) -> tuple[Any, list[str]]:
    """The headless model, and its weights that the files lack."""
    files = weight_files(folder, where)
    try:
        with contextlib.ExitStack() as opened:
            # Told no folder, transformers looks for nothing in it: no adapter beside the model, no other weights.
            state: dict[str, torch.Tensor] = {}
            for file in files:
                tensors = opened.enter_context(safe_open(file, "pt"))
                state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            _check_size(config, state, where)
            model, info = model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                dtype=torch.float32,
                **without_pooler(config),
            )
    except _LIBRARY_ERRORS as error:
        raise EncoderError(f"{where}: cannot be loaded: {in_one_line(error, 300)}") from None
    return model, sorted(info["missing_keys"])


def read_model_config(folder: Path, where: str) -> PretrainedConfig:
    """The configuration of the headless image model: of a dual encoder (CLIP, SigLIP), the vision part's.

    Raises EncoderError for one that AutoModel cannot make a model from.
    """
    _check_config(folder, where)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it asks whoever sits at the terminal
    except _LIBRARY_ERRORS as error:
        raise EncoderError(f"{where}: config.json is not a known model's: {in_one_line(error)}") from None
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PretrainedConfig):
        config = vision
    if type(config) not in MODEL_MAPPING:
        raise EncoderError(f"{where}: model type {config.model_type!r} has no AutoModel in this version of transformers")
    _check_takes_images(model_class(config), where)
    if config.model_type.startswith("siglip"):  # its attention pooling; a field since transformers 5.22, obeyed before as well
        config.vision_use_head = False
    # As saved, these would make every forward pass keep all layers' states, or give tuples.
    config.output_hidden_states, config.output_attentions, config.return_dict = False, False, True
    return config  # type: ignore[no-any-return]


def _check_config(folder: Path, where: str) -> None:
    """Refuse a config.json that leads transformers to other files or to code, before it is given to it."""
    path = own_file(folder, MODEL_CONFIG)
    try:
        if path is None:
            raise ValueError("it is not there")
        for key, value in _fields_of(read_json(path)):
            if value and (key in _LEADS_ELSEWHERE or (key.endswith("_implementation") and "/" in str(value))):
                raise EncoderError(
                    f"{where}: config.json sets {key}, by which transformers opens other files than those that are checked "
                    "here. Remove it there, or save the model again without."
                )
            if _counted(key, value) > MOST_COUNTED:
                raise ValueError(f"it says {key} {str(value)[:100]}, more than any model has")
    except ValueError as error:
        raise EncoderError(f"{where}: config.json is not a known model's: {error}") from None


def _counted(key: str, value: Any) -> int:
    """How many layers, labels and the like a field asks for, all in all; 0 for other fields."""
    counts = value if isinstance(value, list | tuple) else [value]
    return sum(count for count in counts if type(count) is int) if _COUNTS.search(key) else 0


def _fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of a configuration, those within others too."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield str(key), one
            yield from _fields_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _fields_of(one)


def _check_size(config: PretrainedConfig, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Refuse a configuration of a model that is larger than its files, before time and memory are spent on it."""
    most = max(MOST_LAYERS, len(tensors))
    for key, value in _fields_of(config.to_dict()):
        if "labels" not in key and _counted(key, value) > most:
            raise EncoderError(
                f"{where}: config.json says {key} {str(value)[:100]}, but its files hold {len(tensors)} tensors. They are of "
                "different models, or were changed. Bring together those of one."
            )
    with torch.device("meta"):
        model = model_class(config)(config, **without_pooler(config))
    needed, held = (sum(weight.numel() for weight in some) for some in (model.parameters(), tensors.values()))
    if needed > max(2 * held, 2**20) or sum(buffer.numel() for buffer in model.buffers()) > MOST_BUFFERS:
        raise EncoderError(
            f"{where}: config.json is of a model of {needed:,} numbers, but its files hold {held:,}. They are of different "
            "models, or were changed. Bring together those of one."
        )


def _check_takes_images(model_class: Any, where: str) -> None:
    """A model of text takes no pixels; one of flexible resolution (SigLIP 2 NaFlex) needs more than pixels."""
    parameters = inspect.signature(model_class.forward).parameters
    ordinary = inspect.Parameter.POSITIONAL_OR_KEYWORD
    needed = [name for name, one in parameters.items() if one.kind is ordinary and one.default is inspect.Parameter.empty]
    others = [name for name in needed if name not in ("self", "pixel_values")]
    if "pixel_values" not in parameters or others:
        found = f"needs {', '.join(others)} as well" if others else "takes no pixel_values"
        raise EncoderError(
            f"{where}: {model_class.__name__} {found}, so it does not make vectors of images of one size alone. "
            "Name a vision model such as ViT, DINOv2, CLIP or SigLIP."
        )


def read_processor(folder: Path) -> Any:
    """The image processor, always the PIL one: with torchvision installed the default's pixels would differ."""
    own_files(folder, (MODEL_CONFIG, *PROCESSOR_FILES))
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except _LIBRARY_ERRORS as error:
        reason = in_one_line(error)
        raise EncoderError(f"{folder}/preprocessor_config.json: is not a known image processor's: {reason}") from None


def model_class(config: PretrainedConfig) -> Any:
    return MODEL_MAPPING[type(config)]


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Some families would otherwise add a pooler with random weights."""
    accepted = inspect.signature(model_class(config)).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
