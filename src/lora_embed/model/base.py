"""A base model's directory → a headless model in float32, and where a checkpoint's tensors belong in it."""

import copy
import hashlib
import inspect
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from lora_embed import hub
from lora_embed.errors import ChangedMeanwhile, EncoderError
from lora_embed.fetch import fetch_directory
from lora_embed.model.transformers_private import dual_encoder_of

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the second: with a tokenizer beside it (CLIP)
MODEL_FILES = ("config.json", *PROCESSOR_FILES, "*.safetensors", "*.safetensors.index.json")
_USUAL_HEADS = {"classifier", "head", "score"}
_FIRST = 1024  # of the numbers that `locate` loads: no weight begins as one of them

logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model's files on this machine, identified by their content."""

    uri: str
    folder: Path
    content_hash: str


def find_base(uri: str, revision: str | None) -> Base:
    """Bring a base model's files to this machine and hash them; `owner/name` that is no directory here is of the hub.

    Raises StorageError when they cannot be read, EncoderError when they are not a model's.
    """
    folder = _fetch(uri, revision)
    if not (folder / "config.json").is_file():
        raise EncoderError(f"{uri}: is not a Hugging Face model directory: it has no config.json")
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise EncoderError(f"{uri}: has no preprocessor_config.json, so how images are prepared is unknown. Save it there.")
    if not any(folder.glob("*.safetensors")):
        raise EncoderError(f"{uri}: has no .safetensors weights (pickled weights are never opened). Save it again.")
    return Base(uri=uri, folder=folder, content_hash=_content_hash(folder))


def _fetch(uri: str, revision: str | None) -> Path:
    if os.path.exists(uri) or not hub.may_be_repository(uri):
        return fetch_directory(uri, revision, MODEL_FILES)
    repository = hub.Repository(name=uri, revision=revision, folder="")
    refusal = f"{uri}: neither a directory here nor a repository of the hub that can be read"
    return hub.download(repository, MODEL_FILES, refusal)


def check_base(base: Base) -> None:
    """Raises ChangedMeanwhile when the files are others than those that were hashed: what was loaded may be of either."""
    if _content_hash(base.folder) != base.content_hash:
        raise ChangedMeanwhile(f"{base.uri}: changed while the encoder was built. Run the same command again.")


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    paths = [folder / name for name in ("config.json", *PROCESSOR_FILES) if (folder / name).is_file()]
    for path in [*paths, *sorted(folder.glob("*.safetensors"))]:
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
    try:
        model, info = _model_class(config).from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            **_without_pooler(config),
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"{where}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return model, sorted(info["missing_keys"])


def read_model_config(folder: Path, where: str) -> PretrainedConfig:
    """The configuration of the headless image model: of a dual encoder (CLIP, SigLIP), the vision part's.

    Raises EncoderError for one that AutoModel cannot make a model from.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it asks whoever sits at the terminal
    except (ValueError, OSError) as error:
        raise EncoderError(f"{where}: config.json is not a known model's: {' '.join(str(error).split())[:200]}") from None
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PretrainedConfig):
        config = vision
    if type(config) not in MODEL_MAPPING:
        raise EncoderError(f"{where}: model type {config.model_type!r} has no AutoModel in this version of transformers")
    _check_takes_images(_model_class(config), where)
    if config.model_type.startswith("siglip"):  # its attention pooling; a field since transformers 5.22, obeyed before as well
        config.vision_use_head = False
    # As saved, these would make every forward pass keep all layers' states, or give tuples.
    config.output_hidden_states, config.output_attentions, config.return_dict = False, False, True
    return config  # type: ignore[no-any-return]


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
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(f"{folder}/preprocessor_config.json: is not a known image processor's: {reason}") from None


def locate(config: PretrainedConfig, shapes: dict[str, torch.Size]) -> dict[str, str | None]:
    """Ask transformers' checkpoint loader which weight of the headless model takes each named tensor.

    The loader knows base prefixes and the modules renamed between transformers 4 and 5. Each name is loaded as a
    tensor of numbers that no other has; the weight that holds exactly those afterwards is where it belongs. A name maps
    to None when it fits no weight, one of another shape, several, or a part of one.
    """
    names = sorted(shapes)
    probe = {name: _ramp(number, shapes[name]) for number, name in enumerate(names)}
    model = _model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=dict(probe),
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **_without_pooler(config),
    )
    found: dict[str, list[str]] = {name: [] for name in names}
    for target, weight in model.named_parameters():
        number = int(weight.detach().flatten()[0]) - _FIRST if weight.numel() else -1
        if 0 <= number < len(names) and torch.equal(weight, probe[names[number]]):
            found[names[number]].append(target)
    return {name: targets[0] if len(targets) == 1 else None for name, targets in found.items()}


def _ramp(number: int, shape: torch.Size) -> torch.Tensor:
    """Numbers that rise from `_FIRST + number` by less than one: what is split, joined, turned or shuffled differs."""
    return torch.linspace(0, 0.5, math.prod(shape)).add_(_FIRST + number).reshape(shape)


def head_names(config: PretrainedConfig) -> frozenset[str]:
    """Top-level module names that belong to a task: classifiers, poolers, the other half of a dual encoder.

    They are the children of the classes that people train, less those of the headless model.
    """
    body = _model_class(config)
    with torch.device("meta"):
        headless = body(config, **_without_pooler(config))
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
    classes = [(_model_class(config), whole)]
    outer = dual_encoder_of(config)
    if outer is not None:
        whole = outer(vision_config=whole.to_dict())
        classes.append((MODEL_MAPPING[outer], whole))
    found: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(whole), ())
    return classes + [(one, whole) for one in (found if isinstance(found, tuple) else (found,))]


def weight_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """The shapes of all weights of the headless model, by name; none is allocated."""
    with torch.device("meta"):
        model = _model_class(config)(config, **_without_pooler(config))
    return {name: weight.shape for name, weight in model.named_parameters()}


def _model_class(config: PretrainedConfig) -> Any:
    return MODEL_MAPPING[type(config)]


def _without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Some families would otherwise add a pooler with random weights."""
    accepted = inspect.signature(_model_class(config)).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
