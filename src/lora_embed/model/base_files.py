"""Find a base model's files, copy them to this machine and hash them. Needs no torch, so it is quick."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from lora_embed.errors import ChangedMeanwhile, EncoderError
from lora_embed.model.files import (
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    MODEL_INDEX,
    PROCESSOR_FILES,
    model_files,
    not_readable,
    own_file,
    own_files,
    read_json,
)
from lora_embed.model.follow import ADVICE
from lora_embed.store import hub
from lora_embed.store.fetch import fetch_directory

MODEL_FILES = (MODEL_CONFIG, *PROCESSOR_FILES, "*.safetensors", MODEL_INDEX)  # patterns of the files that are copied


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model's files on this machine, identified by their content."""

    uri: str
    folder: Path
    content_hash: str


def find_base(uri: str, revision: str | None, *, asks_hub: bool = True) -> Base:
    """Copy a base model's files to this machine and hash them. `owner/name` is a repository of the hub, unless it is a path.

    Without `asks_hub`, only the hub's cache is used. Raises StorageError if the files cannot be read, and EncoderError if
    they are not those of a model.
    """
    folder = _fetch(uri, revision, asks_hub)
    if own_file(folder, MODEL_CONFIG) is None and (folder / ADAPTER_WEIGHTS).is_file():
        raise EncoderError(f"{uri}: is an adapter, not a model. Name it under adapters, and the model it was trained on here.")
    if own_file(folder, MODEL_CONFIG) is None:
        raise EncoderError(f"{uri}: is not a Hugging Face model directory: it has no config.json. Name the model's directory.")
    if _is_of_timm(folder):
        raise EncoderError(
            f"{uri}: is a model of the library timm, which names weights and prepares images in its own way; that is not "
            "supported. Name the same model in the form of transformers, such as ViTModel or Dinov2Model."
        )
    if not own_files(folder, PROCESSOR_FILES):
        raise EncoderError(
            f"{uri}: has neither {' nor '.join(PROCESSOR_FILES)}, which say how images are prepared. Save the image processor "
            "there."
        )
    return Base(uri=uri, folder=folder, content_hash=_hash(model_files(folder, uri)))


def _is_of_timm(folder: Path) -> bool:
    path = own_file(folder, MODEL_CONFIG)
    try:
        config = read_json(path) if path is not None else None
    except ValueError:
        return False
    return isinstance(config, dict) and ("pretrained_cfg" in config or config.get("model_type") == "timm_wrapper")


def _fetch(uri: str, revision: str | None, asks_hub: bool) -> Path:
    refusal = f"{uri}: is neither a local directory nor a repository of the hub that can be read"
    if hub.is_repository(uri):
        repository, refusal = hub.parse(uri, revision), f"{uri}: this repository of the hub cannot be read"
    elif os.path.exists(uri) or not hub.may_be_repository(uri):
        return fetch_directory(uri, revision, MODEL_FILES)
    else:
        repository = hub.Repository(name=uri, revision=revision, folder="")
    if not asks_hub:
        refusal = (
            f"{uri}: is not in the hub's cache, and is not downloaded since an encoder from another store names it. "
            f"{ADVICE.format(uri=uri)}"
        )
    return hub.download(repository, MODEL_FILES, refusal, asks_hub=asks_hub)


def check_base(base: Base) -> None:
    """Raises ChangedMeanwhile if the files have changed since they were hashed: the loaded weights may be a mixture."""
    if _hash(model_files(base.folder, base.uri)) != base.content_hash:
        raise ChangedMeanwhile(f"{base.uri}: changed while the encoder was built. Run the same command again.")


def is_base(base: Base, content_hash: str) -> bool:
    """True if the base has this hash, or the hash of older releases, which included safetensors files that are not loaded."""
    if base.content_hash == content_hash:
        return True
    names = (MODEL_CONFIG, *PROCESSOR_FILES, *sorted(path.name for path in base.folder.glob("*.safetensors")))
    return _hash(own_files(base.folder, names)) == content_hash


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise not_readable(path, error) from None
    return digest.hexdigest()
