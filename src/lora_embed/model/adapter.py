"""One PEFT LoRA directory → checked low-rank factors, named by the weights of the base that they change.

PEFT's module injection is not used: it is where merges go silently wrong. PEFT gives the configuration's defaults and
its pattern rules; transformers' own checkpoint loader says which weight of the base each tensor belongs to.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from lora_embed.errors import AdapterMismatch
from lora_embed.fetch import fetch_directory

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Fields that say how an adapter was trained, or that the tensors themselves already show.
_READ_OR_IRRELEVANT = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout", "init_lora_weights", "task_type",
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core", "ensure_weight_tying", "qalora_group_size", "eva_config",
}  # fmt: skip
# Initialisations that leave the base as it was; the others (PiSSA, OLoRA, CorDA, LoftQ …) change its weights.
_HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")

# Names of tensors → for each, the base weight that takes it, or None; as `encoder.locate` finds it.
Locate = Callable[[dict[str, torch.Size]], dict[str, str | None]]


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A low-rank change of one weight of shape (out, in): `scale · up @ down`."""

    down: torch.Tensor  # LoRA's A, (rank, in), as saved
    up: torch.Tensor  # LoRA's B, (out, rank), as saved
    scale: float

    def delta(self) -> torch.Tensor:
        """The change of the weight, (out, in), computed in float64."""
        return self.scale * (self.up.double() @ self.down.double())

    def norm(self) -> float:
        """Frobenius norm of the change, from rank-sized products: ‖B·A‖² is the sum of (BᵀB) ∘ (A·Aᵀ)."""
        up, down = self.up.double(), self.down.double()
        return abs(self.scale) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What one adapter does to a base: factors by weight name, and what was left out of the fold."""

    uri: str
    content_hash: str  # of the configuration that matters and all tensors
    factors: dict[str, Factors]
    head_keys: tuple[str, ...]  # tensors of the task's own head, dropped
    trained_on: str | None


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter as it lies on disk: nothing matched to a base yet."""

    uri: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    content_hash: str


def read_adapter(uri: str, revision: str | None = None) -> SavedAdapter:
    """Read an adapter's configuration and tensors from a directory, an fsspec URI or the hub.

    Raises AdapterMismatch for anything that could not be folded exactly, StorageError when it cannot be read.
    """
    folder = fetch_directory(uri, revision, (CONFIG_NAME, WEIGHTS_NAME))
    config = _read_config(uri, folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        found = f"found {pickled[0]}, a pickle, which is never opened" if pickled else "found no weights"
        raise AdapterMismatch(f"{uri}: expected {WEIGHTS_NAME}, {found}. Save it again with safe_serialization=True.")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise AdapterMismatch(f"{path}: is not a whole safetensors file ({error}). Copy or save it again.") from None
    _check_config(uri, config)
    _check_numbers(uri, tensors)
    return SavedAdapter(uri=uri, config=config, tensors=tensors, content_hash=_content_hash(config, tensors))


def match_adapter(saved: SavedAdapter, base: str, locate: Locate) -> Adapter:
    """Match every tensor of an adapter to a weight of the base; `base` names it in messages.

    Raises AdapterMismatch when a tensor matches nothing, a half is missing, ranks disagree, a module of the
    base itself was retrained, or the adapter would change nothing.
    """
    modules, others = _split(saved)
    shapes = {f"{name}.weight": torch.Size((b.shape[0], a.shape[1])) for name, (a, b) in modules.items()}
    places = locate(shapes | {name: tensor.shape for name, tensor in others.items()})
    _check_places(saved, base, shapes, places)
    retrained = [name for name in others if places[name] is not None]
    if retrained:
        raise AdapterMismatch(
            f"{saved.uri}: modules_to_save holds weights of the base itself ({_some(retrained)}); only a task's head may "
            "be saved beside LoRA, since whole weights of several adapters cannot be merged as low-rank changes."
        )
    factors = {}
    for name, (down, up) in modules.items():
        factor = Factors(down=down, up=up, scale=_scale(saved, name, down.shape[0]))
        factors[str(places[f"{name}.weight"])] = factor
    if not any(factor.norm() for factor in factors.values()):
        raise AdapterMismatch(
            f"{saved.uri}: all of its LoRA products are zero, so it would change nothing. "
            "Was it saved before training? Train it, or leave it out of the recipe."
        )
    return Adapter(
        uri=saved.uri,
        content_hash=saved.content_hash,
        factors=factors,
        head_keys=tuple(sorted(others)),
        trained_on=saved.config.get("base_model_name_or_path"),
    )


def _read_config(uri: str, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise AdapterMismatch(f"{uri}: is not a PEFT adapter: it has no {CONFIG_NAME}") from None
    except ValueError as error:
        raise AdapterMismatch(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterMismatch(f"{uri}: expected a LoRA adapter (peft_type LORA), found {kind}")
    for field, kinds in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(config.get(field), kinds):
            raise AdapterMismatch(f"{path}: {field} is {json.dumps(config.get(field))}, expected a number")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise AdapterMismatch(f"{path}: {field} is {json.dumps(config[field])}, expected names with numbers")
    return config


def _check_config(uri: str, config: dict[str, Any]) -> None:
    """Refuse by name whatever differs from PEFT's defaults and would change what the adapter computes."""
    defaults = dataclasses.asdict(LoraConfig())
    for field, value in config.items():
        default = defaults.get(field)
        if field in _READ_OR_IRRELEVANT or value == default or (field not in defaults and not value):
            continue
        if isinstance(value, dict | list) and not value and not default:
            continue
        known = "cannot be folded exactly yet" if field in defaults else "is not known to this version"
        raise AdapterMismatch(
            f"{uri}: {CONFIG_NAME} sets {field}={json.dumps(value)}, which {known}. "
            "Merge that adapter into its base with PEFT first, or train it without."
        )
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _HARMLESS_INITIALISATIONS:
        raise AdapterMismatch(
            f"{uri}: was trained with init_lora_weights={json.dumps(initialisation)}, which changes the base's own "
            "weights. Convert it to a plain LoRA adapter with PEFT's path_initial_model_for_weight_conversion."
        )


def _check_numbers(uri: str, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterMismatch(f"{uri}: {name} holds {tensor.dtype}, expected floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterMismatch(f"{uri}: {name} holds NaN or infinity. The training diverged; use another checkpoint.")


def _split(saved: SavedAdapter) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """LoRA pairs (A, B) by module name, and all other tensors by their own name."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in saved.tensors.items():
        name = key.removeprefix(PREFIX)
        for half in ("lora_A", "lora_B"):
            if name.endswith(f".{half}.weight"):
                halves.setdefault(name.removesuffix(f".{half}.weight"), {})[half] = tensor
                break
        else:
            if ".lora_" in name or name.startswith("lora_"):
                raise AdapterMismatch(f"{saved.uri}: {key} is a kind of LoRA tensor that cannot be folded exactly yet")
            others[name] = tensor
    pairs = {}
    for module, pair in halves.items():
        missing = [half for half in ("lora_A", "lora_B") if half not in pair]
        if missing:
            raise AdapterMismatch(f"{saved.uri}: {module} has no {missing[0]}; the file is not whole. Save it again.")
        down, up = pair["lora_A"], pair["lora_B"]
        if down.ndim != 2 or up.ndim != 2:
            raise AdapterMismatch(f"{saved.uri}: {module} is LoRA on a {down.ndim}-d weight; only linear layers are folded")
        if down.shape[0] != up.shape[1]:
            raise AdapterMismatch(
                f"{saved.uri}: {module} has rank {down.shape[0]} in lora_A but {up.shape[1]} in lora_B; the file is damaged"
            )
        pairs[module] = (down, up)
    if not pairs:
        raise AdapterMismatch(f"{saved.uri}: {WEIGHTS_NAME} holds no LoRA tensors, so it would change nothing")
    return pairs, others


def _check_places(saved: SavedAdapter, base: str, shapes: dict[str, torch.Size], places: dict[str, str | None]) -> None:
    unused = [name for name in shapes if places[name] is None]
    if unused:
        raise AdapterMismatch(
            f"{saved.uri}: {len(unused)} of {len(shapes)} LoRA modules match no weight of {base}: {_some(unused)}. "
            f"It was trained on {saved.config.get('base_model_name_or_path')!r}; name that base in the recipe."
        )


def _scale(saved: SavedAdapter, module: str, rank: int) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA (arXiv 2312.03732), patterns respected."""
    config = saved.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        expected = ranks.get(get_pattern_key(list(ranks), module), config["r"])
        alpha = float(alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"]))
    except (re.error, TypeError, ValueError) as error:
        raise AdapterMismatch(f"{saved.uri}: rank_pattern or alpha_pattern of {CONFIG_NAME} cannot be read: {error}") from None
    if expected != rank:
        raise AdapterMismatch(
            f"{saved.uri}: {module} has rank {rank}, but {CONFIG_NAME} says {expected}; "
            "configuration and weights are of different adapters"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _content_hash(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    relevant = {key: config.get(key) for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
