"""A base model's directory → a headless model in float32, and where a checkpoint's tensors belong in it."""

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging

from lora_embed.errors import EncoderError
from lora_embed.fetch import fetch_directory

MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")

logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model's files on this machine, identified by their content."""

    uri: str
    folder: Path
    content_hash: str


def find_base(uri: str, revision: str | None) -> Base:
    """Bring a base model's files to this machine and hash them.

    Raises StorageError when they cannot be read, EncoderError when they are not a model's.
    """
    folder = fetch_directory(uri, revision, MODEL_FILES)
    if not (folder / "config.json").is_file():
        raise EncoderError(f"{uri}: is not a Hugging Face model directory: it has no config.json")
    if not (folder / "preprocessor_config.json").is_file():
        raise EncoderError(f"{uri}: has no preprocessor_config.json, so how images are prepared is unknown. Save it there.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise EncoderError(f"{uri}: has no .safetensors weights (pickled weights are never opened). Save it again.")
    digest = hashlib.sha256()
    for path in [folder / "config.json", folder / "preprocessor_config.json", *weights]:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return Base(uri=uri, folder=folder, content_hash=digest.hexdigest())


def load_headless(folder: Path, where: str) -> PreTrainedModel:
    """Load the model without head and pooler, in float32, ready for inference; every weight must be in the files.

    Raises EncoderError, naming `where`, for a model type unknown to AutoModel and for missing weights.
    """
    config = read_model_config(folder, where)
    try:
        model, info = AutoModel.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **_without_pooler(config)
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"{where}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EncoderError(f"{where}: {len(missing)} weights of {type(model).__name__} are not in its files: {missing[:3]}")
    return model.eval()  # type: ignore[no-any-return]


def read_model_config(folder: Path, where: str) -> PretrainedConfig:
    """The model's configuration. Raises EncoderError for one that AutoModel cannot make a model from."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise EncoderError(f"{where}: config.json is not a known model's: {' '.join(str(error).split())[:200]}") from None
    if type(config) not in MODEL_MAPPING:
        raise EncoderError(f"{where}: model type {config.model_type!r} has no AutoModel in this version of transformers")
    return config  # type: ignore[no-any-return]


def read_processor(folder: Path) -> Any:
    """The image processor, always the PIL one: with torchvision installed the default's pixels would differ."""
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(f"{folder}/preprocessor_config.json: is not a known image processor's: {reason}") from None


def locate(config: PretrainedConfig, shapes: dict[str, torch.Size]) -> dict[str, str | None]:
    """Ask transformers' checkpoint loader which weight of the headless model takes each named tensor.

    The loader knows base prefixes and the modules renamed between transformers 4 and 5. Each name is loaded as a
    tensor filled with its own number; where that number stands afterwards is where the tensor belongs. A name that
    fits no weight, or one of another shape, maps to None.
    """
    names = sorted(shapes)
    probe = {name: torch.full(shapes[name], float(number)) for number, name in enumerate(names)}
    model, info = _model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=probe,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **_without_pooler(config),
    )
    absent = set(info["missing_keys"]) | {mismatch[0] for mismatch in info["mismatched_keys"]}
    places: dict[str, str | None] = dict.fromkeys(names)
    for target, weight in model.named_parameters():
        if target not in absent:
            low, high = (int(bound) for bound in torch.aminmax(weight))
            if low == high:  # several names joined in one weight would show several numbers
                places[names[low]] = target
    return places


def _model_class(config: PretrainedConfig) -> Any:
    return MODEL_MAPPING[type(config)]


def _without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Some families would otherwise add a pooler with random weights."""
    accepted = inspect.signature(_model_class(config)).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
