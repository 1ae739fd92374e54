"""One PEFT LoRA directory → its configuration and tensors, read and checked, but not yet matched to a base.

PEFT's module injection is not used, since merges silently go wrong there.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors

from lora_embed.errors import AdapterMismatch, ChangedMeanwhile, LoraEmbedError
from lora_embed.model.adapter_config import MOST_NAMED, check_config, residual_kind
from lora_embed.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROCESSOR_FILES, not_readable, own_file, read_json
from lora_embed.store.fetch import fetch_directory
from lora_embed.store.hub import SCHEME

if TYPE_CHECKING:
    import torch

CONFIG_NAME, WEIGHTS_NAME, PROCESSOR_NAME = ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROCESSOR_FILES[0]
PREFIX = "base_model.model."

_PART = re.compile(r"adapter_model.*-of-\d+\.safetensors|.*\.index\.json")  # of weights in several files
_BLOCK = 2**20  # bytes that are read at a time
# Types of numbers, as safetensors names them, and as content hashes do. Others than floats can be part of a head only.
_DTYPES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
_DTYPES |= {name: name for name in ("I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64")}


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter as it is on disk."""

    uri: str
    folder: Path  # on this machine
    config: dict[str, Any]
    content_hash: str  # over all tensors, and the fields of the configuration that change the result

    @cached_property
    def tensors(self) -> "dict[str, torch.Tensor]":
        """All tensors by name, read when they are first needed. Raises AdapterMismatch for NaN and infinity."""
        import torch
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.folder / WEIGHTS_NAME)
        except (safetensors.SafetensorError, ValueError, OSError) as error:  # it was readable when it was hashed
            raise ChangedMeanwhile(f"{self.uri}: changed while it was read ({error}). Run the same command again.") from None
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor).all()):
                raise AdapterMismatch(
                    f"{self.uri}: {name} holds NaN or infinity. The training diverged; use another checkpoint."
                )
        return tensors


def find_adapter(uri: str, revision: str | None = None) -> SavedAdapter:
    """Find an adapter in a directory, at an fsspec URI or on the hub; check its configuration, and hash it without torch.

    Raises AdapterMismatch for an adapter that cannot be folded exactly, and StorageError if it cannot be read.
    """
    folder = fetch_directory(uri, revision, (CONFIG_NAME, WEIGHTS_NAME, PROCESSOR_NAME))
    config = _read_config(uri, folder)
    path = own_file(folder, WEIGHTS_NAME)
    if path is None:
        raise AdapterMismatch(f"{uri}: expected {WEIGHTS_NAME}, {_describe_other_files(folder)}")
    check_config(uri, config)
    return SavedAdapter(uri=uri, folder=folder, config=config, content_hash=_content_hash(uri, config, path))


def read_adapter(uri: str, revision: str | None = None) -> SavedAdapter:
    """`find_adapter`, with its tensors read and checked as well."""
    saved = find_adapter(uri, revision)
    assert isinstance(saved.tensors, dict)
    return saved


def check_adapter(saved: SavedAdapter) -> None:
    """Raises ChangedMeanwhile if the files have changed since they were read."""
    try:
        hash_now = find_adapter(str(saved.folder)).content_hash
    except LoraEmbedError:
        hash_now = ""
    if hash_now != saved.content_hash:
        raise ChangedMeanwhile(f"{saved.uri}: changed while the encoder was built. Run the same command again.")


def first_names(names: list[str], most: int = 3) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _describe_other_files(folder: Path) -> str:
    """Which other files an adapter without weights has, and what to do, for a message."""
    pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
    if pickled:
        return f"found {pickled[0]}, a pickle, which is never opened. Save the adapter again with safe_serialization=True."
    if (folder / WEIGHTS_NAME).exists():
        return "found a directory of that name. Copy or save the adapter again."
    weight_files = sorted(path.name for path in folder.glob("*.safetensors*"))
    if any(_PART.fullmatch(name) for name in weight_files):
        return (
            f"found {first_names(weight_files)}. Neither PEFT nor lora-embed reads an adapter in several files. Save it again "
            "in one file, with PEFT's save_pretrained."
        )
    if weight_files:
        return (
            f"found {first_names(weight_files)}. If these are its weights, rename the file, or save the adapter again in one "
            "file."
        )
    return "found no weights. Copy or save the adapter again."


def _other_places(uri: str, folder: Path) -> str:
    """Where an adapter may lie instead, for a message: PEFT saves adapters with names in folders of their own."""
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if len(inner) == 1:
        return f"Its folder {inner[0]} is an adapter. Name it."
    if inner:
        return f"Its folders {first_names(inner)} are adapters. Name one of them."
    if uri.startswith(SCHEME):
        return f"Name the adapter's own folder in the repository, as {SCHEME}owner/name/folder."
    return "Name the adapter's own directory."


def _read_config(uri: str, folder: Path) -> dict[str, Any]:
    path = own_file(folder, CONFIG_NAME)
    if path is None:
        raise AdapterMismatch(f"{uri}: is not a PEFT adapter: it has no {CONFIG_NAME}. {_other_places(uri, folder)}")
    try:
        config = read_json(path)
    except ValueError as error:
        raise AdapterMismatch(f"{path}: is not valid JSON ({error}). Copy it again, or save the adapter again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterMismatch(
            f"{uri}: expected a LoRA adapter (peft_type LORA), found {kind}. Name an adapter that was trained with LoRA. Or "
            "merge this one into its base by PEFT's merge_and_unload, if its kind has that, and name the result as the base."
        )
    return config


def _content_hash(uri: str, config: dict[str, Any], path: Path) -> str:
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    relevant = {field: config.get(field) or None for field in fields} | {"residual": residual_kind(config)}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    try:
        with path.open("rb") as file:
            for name, described, data in _tensors_of(path, file):
                if len(name) > MOST_NAMED:
                    raise AdapterMismatch(
                        f"{uri}: the name of a tensor has {len(name):,} characters, at most {MOST_NAMED:,} are read. Save the "
                        "adapter again."
                    )
                if not name.isprintable():
                    raise AdapterMismatch(
                        f"{uri}: the name {name[:100]!r} of a tensor cannot be printed. Save the adapter again."
                    )
                if described["dtype"] not in _DTYPES:
                    raise AdapterMismatch(
                        f"{uri}: {name} holds numbers of type {described['dtype']}, expected F64, F32, F16 or BF16. "
                        "Save it as one of these."
                    )
                digest.update(f"{name} {_DTYPES[described['dtype']]} {tuple(described['shape'])}\n".encode())
                for block in data:
                    digest.update(block)
    except (safetensors.SafetensorError, ValueError) as error:
        raise AdapterMismatch(f"{path}: is not a whole safetensors file ({str(error)[:200]}). Copy or save it again.") from None
    except OSError as error:
        raise not_readable(path, error) from None
    return digest.hexdigest()


def _tensors_of(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any], Iterator[bytes]]]:
    """Each tensor of a safetensors file, by name: its type and shape, and its bytes, which are read in blocks.

    The file is the length of a header (8 bytes), the header as JSON, and the bytes, to which the header has offsets.
    """
    safetensors.safe_open(path, framework="np")  # checks the header against the size of the file
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, described in sorted(header.items()):
        begin, end = described["data_offsets"]
        file.seek(8 + length + begin)
        yield name, described, (file.read(min(_BLOCK, end - at)) for at in range(begin, end, _BLOCK))
