"""The names of an adapter's tensors, as PEFT and other tools write them → LoRA tensors by module, and weights saved whole."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import CONFIG_NAME, PREFIX, SavedAdapter, first_names

# What stands before the names of the model that PEFT adapted: its prefix, after those of models around the PEFT model.
_FRONT = re.compile(rf"(?:[^.]+\.){{0,8}}?(?:{re.escape(PREFIX)})+")
_LORA = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?!lora_A\..*bias$)(?P<factor>lora_[AB])(?:\.(?P<of_factor>.+))?\.(?P<part>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.(?P<of_embedding>(?!weight$).+))?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.(?P<of_magnitude>(?!weight$).+?))?(?:\.weight)?)"
)
# Numbers that a module counts or computes from its configuration. Training does not change what they do in inference.
COMPUTED = ("num_batches_tracked", "position_ids", "relative_position_index")


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of an adapter's tensors, without PEFT's additions, each with its key in the file."""

    lora: dict[str, dict[str, str]]  # module → kind of tensor (`lora_A`, `lora_B.bias` …) → key
    whole: dict[str, str]  # weight that was saved whole → key
    front: str  # `base_model.model.`, perhaps after the names of other models; PEFT's prefix may also be missing
    adapter_name: str  # within PEFT; empty in files that PEFT saves


def read_names(saved: SavedAdapter) -> Names:
    """Raises AdapterMismatch for a tensor of an unknown kind, one that is saved twice, and tensors of several adapters."""
    front = _front_of(saved)
    names = {key: key.removeprefix(front).replace(".base_layer.", ".") for key in sorted(saved.tensors)}
    matches = {key: match for key, name in names.items() if (match := _LORA.fullmatch(name)) is not None}
    adapter_name = _adapter_name(saved, matches)
    lora: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}  # name → key
    for key, name in names.items():
        if (match := matches.get(key)) is not None:
            _add(saved, lora.setdefault(match["module"], {}), _kind_of(match)[0], key, name=name)
        else:
            _add(saved, others, name, key)
    whole = dict(_without_copies(saved, others, adapter_name))
    return Names(lora=lora, whole=whole, front=front, adapter_name=adapter_name)


def _adapter_name(saved: SavedAdapter, matches: dict[str, re.Match[str]]) -> str:
    """The adapter's name within PEFT, which all keys of LoRA tensors hold, or none."""
    key_of_adapter = {_kind_of(match)[1]: key for key, match in reversed(matches.items())}
    if len(key_of_adapter) > 1:
        names = [f"{name!r} in {key}" if name else f"none in {key}" for name, key in sorted(key_of_adapter.items())]
        raise AdapterMismatch(
            f"{saved.uri}: its tensors have several adapter names: {first_names(names)}. Save each adapter alone, in a folder "
            "of its own, with PEFT's save_pretrained."
        )
    return next(iter(key_of_adapter), "")


def _front_of(saved: SavedAdapter) -> str:
    """What stands before PEFT's names; PEFT's own prefix is left out of some files, or of some names."""
    matches = [_FRONT.match(key) for key in saved.tensors]
    fronts = sorted({match[0] if match else "" for match in matches})
    if set(fronts) <= {"", PREFIX}:
        return PREFIX
    if len(fronts) > 1:
        raise AdapterMismatch(
            f"{saved.uri}: some names of its tensors begin with {fronts[0]!r}, others with {fronts[1]!r}, so they may belong "
            "to two models. Save the adapter again, with PEFT's save_pretrained."
        )
    return fronts[0]


def _kind_of(match: re.Match[str]) -> tuple[str, str]:
    """The kind of a LoRA tensor, and the adapter's name within PEFT, which `state_dict` of a model writes into the key."""
    if match["factor"]:
        kind = match["factor"] if match["part"] == "weight" else f"{match['factor']}.bias"
        return kind, match["of_factor"] or ""
    if match["embedding"]:
        return match["embedding"], match["of_embedding"] or ""
    return match["magnitude"], match["of_magnitude"] or ""


def _add(saved: SavedAdapter, keys: dict[str, str], short: str, key: str, *, name: str = "") -> None:
    if short in keys:
        raise AdapterMismatch(
            f"{saved.uri}: {name or short} is saved twice, as {keys[short]} and as {key}. Save the adapter again."
        )
    keys[short] = key


def _without_copies(saved: SavedAdapter, others: dict[str, str], adapter_name: str) -> Iterator[tuple[str, str]]:
    """Weights that are saved whole, each once.

    PEFT wraps a module of `modules_to_save`. In a model's `state_dict` its weights have two names, one of them for the
    weights before training. With `bias="all"`, PEFT also saves the bias under three names.
    """
    wrappers = (f".modules_to_save.{adapter_name}.", ".modules_to_save.")
    plain: dict[str, str] = {}  # in the order of the file: name without wrapper → key
    for name, key in others.items():
        if ".lora_" in name:
            raise AdapterMismatch(
                f"{saved.uri}: {key} is no tensor of LoRA, though {CONFIG_NAME} says LORA. Configuration and weights belong to "
                "different adapters. Copy both files of one adapter."
            )
        short = next((name.replace(wrapper, ".") for wrapper in wrappers if adapter_name and wrapper in name), name)
        short = short.replace(".modules_to_save.", ".")
        if short in plain and not torch.equal(saved.tensors[plain[short]], saved.tensors[key]):
            raise AdapterMismatch(
                f"{saved.uri}: {short} is saved twice with different numbers, as {plain[short]} and as {key}. Save the adapter "
                "again."
            )
        plain.setdefault(short, key)
    for name, key in plain.items():
        if ".original_module." not in name or name.replace(".original_module.", ".") not in plain:
            yield name, key
