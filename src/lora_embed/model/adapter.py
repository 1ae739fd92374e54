"""One PEFT LoRA directory → its configuration and tensors, read and checked, but not yet matched to a base.

PEFT's module injection is not used, since merges silently go wrong there. PEFT gives the configuration's defaults; this
module decides by name what each field means for the merge.
"""

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors

from lora_embed.errors import AdapterMismatch, ChangedMeanwhile, LoraEmbedError
from lora_embed.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROCESSOR_FILES, not_readable, own_file, read_json
from lora_embed.store.fetch import fetch_directory
from lora_embed.store.hub import SCHEME

if TYPE_CHECKING:
    import torch

CONFIG_NAME, WEIGHTS_NAME, PROCESSOR_NAME = ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROCESSOR_FILES[0]
PREFIX = "base_model.model."

# Fields that change what an adapter computes. All are handled, in `match.py` and `change.py`.
_HANDLED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "init_lora_weights",
}  # fmt: skip
# Fields that say which modules were trained. The tensors show that too; `match.py` compares both.
_SHOWN_BY_TENSORS = {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
# Fields without effect on inference. fan_in_fan_out is for layers that store their weight transposed (GPT-2's Conv1D). PEFT
# ignores it for all other layers, and no model of images has such layers.
_IRRELEVANT = {
    "lora_dropout", "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "qalora_group_size", "eva_config",
    "corda_config", "lora_ga_config", "loftq_config", "fan_in_fan_out", "merge_weights",
}  # fmt: skip
# Initialisations that do not change the base, and two whose change of the base can be computed from the base alone.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_RESIDUAL_INITIALISATIONS = ("pissa", "olora")
_PART = re.compile(r"adapter_model.*-of-\d+\.safetensors|.*\.index\.json")  # of weights in several files
_BLOCK = 2**20  # bytes that are read at a time
MOST_NAMED = 1000  # characters in the name of a tensor, a module or a base
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
    _check_fields(uri, config)
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


def residual_kind(config: dict[str, Any]) -> Any:
    """`pissa` or `olora` if the adapter was trained on the rest of the base that these initialisations leave, else None."""
    initialisation = config.get("init_lora_weights")
    lowered = initialisation.lower() if isinstance(initialisation, str) else initialisation
    return lowered if lowered in _RESIDUAL_INITIALISATIONS else None


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


def _check_fields(uri: str, config: dict[str, Any]) -> None:
    """Check the types of the fields that are handled, and refuse every other field that differs from PEFT's default."""
    _check_types(uri, config)
    for field in sorted(config.keys() - _HANDLED - _SHOWN_BY_TENSORS - _IRRELEVANT):
        value = config[field]
        if not value:  # the default of all other fields; they switch something on
            continue
        from lora_embed.model.peft_private import defaults  # imports peft, which takes seconds

        if value == defaults.get(field):
            continue
        reason = "cannot be folded exactly" if field in defaults else "is not known to this version of PEFT"
        raise AdapterMismatch(
            f"{uri}: {CONFIG_NAME} sets {field}={_shown(value)}, which {reason}. "
            "Merge this adapter into its base with PEFT first, or train it without that setting."
        )
    initialisation = config.get("init_lora_weights", True)
    lowered = initialisation.lower() if isinstance(initialisation, str) else initialisation
    if lowered not in _HARMLESS_INITIALISATIONS and residual_kind(config) is None:
        advice = "Merge this adapter into its own base by PEFT's merge_and_unload, and name the result as the base."
        reason = "is not known"
        if isinstance(lowered, str) and re.match("pissa|corda|lora_ga|loftq", lowered):
            reason = "changes the base's own weights in a way that the files do not show"
        if lowered != "loftq" and reason != "is not known":  # PEFT converts the others
            advice = "Convert it to a plain LoRA adapter: save it with PEFT's path_initial_model_for_weight_conversion."
        raise AdapterMismatch(
            f"{uri}: was trained with init_lora_weights={json.dumps(initialisation)}, which {reason}. {advice}"
        )


def _check_types(uri: str, config: dict[str, Any]) -> None:
    expectations: dict[str, tuple[str, Any]] = {
        "r": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
        "lora_alpha": ("a finite number", _is_number),
        "rank_pattern": ("names with numbers", _is_pattern),
        "alpha_pattern": ("names with numbers", _is_pattern),
        "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
        "use_dora": ("true or false", lambda value: isinstance(value, bool)),
        "lora_bias": ("true or false", lambda value: isinstance(value, bool)),
        "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
        "target_modules": ("a list of names, or a pattern", _is_names),
        "exclude_modules": ("a list of names, or a pattern", _is_names),
        "modules_to_save": ("a list of names", lambda value: isinstance(value, list) and _is_names(value)),
        "layers_pattern": ("a list of names, or a pattern", _is_names),
        "layers_to_transform": ("numbers of layers", lambda value: all(type(n) is int for n in _listed(value))),
        "init_lora_weights": ("true, false or a name", lambda value: isinstance(value, bool | str)),
        "base_model_name_or_path": ("a name", lambda value: isinstance(value, str) and len(value) <= MOST_NAMED),
    }
    for field, (expected, is_right) in expectations.items():
        value = config.get(field)
        if value is None and field not in ("r", "lora_alpha"):
            continue
        if not is_right(value):
            state = f"is {_shown(value)}" if field in config else "is missing"
            raise AdapterMismatch(f"{uri}: {field} of {CONFIG_NAME} {state}, expected {expected}. Save the adapter again.")


def _shown(value: Any) -> str:
    """A value of the file, as JSON, for a message."""
    return (
        textwrap.shorten(json.dumps(value), 100, placeholder=" …")
        if isinstance(value, dict | list)
        else json.dumps(value)[:100]
    )


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())


def _is_names(value: Any) -> bool:
    return all(isinstance(name, str) for name in _listed(value))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    """True for a finite number that fits into a float."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _content_hash(uri: str, config: dict[str, Any], path: Path) -> str:
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    relevant = {field: config.get(field) or None for field in fields} | {"residual": residual_kind(config)}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    try:
        with path.open("rb") as file:
            for name, described, data in _tensors_of(path, file):
                if len(name) > MOST_NAMED:
                    raise AdapterMismatch(f"{uri}: the name of a tensor has {len(name):,} characters. Save the adapter again.")
                if not name.isprintable():
                    raise AdapterMismatch(
                        f"{uri}: the name {name[:100]!r} of a tensor cannot be printed. Save the adapter again."
                    )
                if described["dtype"] not in _DTYPES:
                    raise AdapterMismatch(
                        f"{uri}: {name} holds numbers of type {described['dtype']}, which cannot be read. Save the adapter "
                        "without quantisation."
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
