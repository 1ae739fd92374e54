"""Check a merge after saving: every weight is recomputed from the adapter files and compared with the saved one.

This shares no code with `adapter`, `change`, `fold` or `merge`: tensors are read one by one, NumPy does the arithmetic, and
`anew` has the methods. Only the answer which weight of the base a tensor belongs to comes from the match.
"""

import re

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from lora_embed.errors import EncoderError
from lora_embed.model.adapter import WEIGHTS_NAME
from lora_embed.model.anew import Array, merge_anew
from lora_embed.model.fold import Merge
from lora_embed.model.match import Adapter
from lora_embed.model.weights import weights_of

Proof = dict[str, dict[str, float]]  # by weight: `error` and `rounding`
# The largest error of a weight's change, relative to the change, in addition to the rounding of the weight to float32.
# If a method chooses entries by size or sign, a difference in the last digit can change a choice.
BOUND = 1e-6
CHOOSING = {"ties": 1e-2, "dare_ties": 1e-2, "magnitude_prune": 1e-2}


def prove(merged: Merge, base: PreTrainedModel, saved: PreTrainedModel) -> Proof:
    """Compare each weight of the saved model with the base and the adapter files.

    Returns for each changed weight `error`, ‖saved − base − expected‖ / ‖expected‖, and `rounding`, the part of it that
    float32 rounding may cause. Raises EncoderError if a weight differs by more, or changed although no adapter changes it.
    """
    before, after = weights_of(base), weights_of(saved)
    changed = {name for adapter in merged.adapters for name in adapter.changes}
    strays = [name for name in before if name not in changed and not torch.equal(before[name], after[name])]
    if strays or set(before) != set(after):
        names = strays or sorted(set(before) ^ set(after))
        raise EncoderError(
            f"the saved encoder differs from its base in weights that no adapter changes: {names[:3]}. This is a bug of "
            "lora-embed. Please report it."
        )
    return {name: _prove_one(merged, name, before[name].detach(), after[name].detach()) for name in sorted(changed)}


def _prove_one(merged: Merge, name: str, before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    expected = _expected(merged, name, before)
    old, new = before.numpy(), after.numpy()
    norm = float(np.linalg.norm(expected)) or 1.0
    error = float(np.linalg.norm(new.astype(np.float64) - old - expected)) / norm
    rounding = float(np.linalg.norm(np.spacing(np.abs(new)).astype(np.float64))) / 2 / norm
    bound = CHOOSING.get(merged.method, BOUND)
    if not error <= rounding + bound:
        raise EncoderError(
            f"{name}: the saved change differs from the one recomputed from the adapter files by {error:.1e} of its norm; "
            f"float32 rounding explains {rounding:.1e}, and {bound:.0e} more is allowed. The encoder was not written. Build "
            "it again; if the same happens, please report it with the recipe."
        )
    return {"error": error, "rounding": rounding}


def _expected(merged: Merge, name: str, before: torch.Tensor) -> Array:
    pairs = sorted(zip(merged.adapters, merged.weights, strict=True), key=lambda pair: (pair[0].content_hash, pair[1]))
    parts = [(adapter, weight) for adapter, weight in pairs if name in adapter.changes]
    old = before.numpy().astype(np.float64)
    if merged.method == "linear":
        return _linear(parts, name, old.shape)
    return merge_anew(
        merged.method, merged.options, [(weight, change_of(adapter, name, old)) for adapter, weight in parts], name
    )


def _linear(parts: list[tuple[Adapter, float]], name: str, shape: tuple[int, ...]) -> Array:
    ups, downs = [], []
    for adapter, weight in parts:
        down, up, scale = factors_of(adapter, *read_tensors(adapter, name))
        ups.append(np.sqrt(np.abs(weight * scale)) * up)
        downs.append(np.sign(weight) * np.sqrt(np.abs(weight * scale)) * down)
    product: Array = (np.sum(ups, axis=0) @ np.sum(downs, axis=0)).reshape(shape)
    return product


def change_of(adapter: Adapter, name: str, base_weight: Array) -> Array:
    """One adapter's change of one weight, from its file."""
    adapter_name, tensors = read_tensors(adapter, name)
    initial = initial_of(adapter, name, base_weight)
    change: Array = np.zeros(1) if initial is None else initial
    if adapter_name.endswith(".bias") and "lora_B.bias" in tensors:
        return change + factors_of(adapter, adapter_name, tensors)[2] * tensors["lora_B.bias"]
    if "whole" in tensors:
        return change
    down, up, scale = factors_of(adapter, adapter_name, tensors)
    product: Array = (scale * (up @ down)).reshape(base_weight.shape)
    change = product if initial is None else initial + product
    if "lora_magnitude_vector" in tensors:
        moved = base_weight + change
        lengths = np.sqrt((moved.reshape(len(moved), -1) ** 2).sum(axis=1))
        factor = tensors["lora_magnitude_vector"].reshape(-1) / lengths
        change = moved * factor.reshape(-1, *[1] * (moved.ndim - 1)) - base_weight
    return change


def initial_of(adapter: Adapter, name: str, base_weight: Array) -> Array | None:
    """The part of a change that is no LoRA product: a weight trained whole, or what an initialisation took from the base."""
    adapter_name, tensors = read_tensors(adapter, name)
    if "whole" in tensors:
        return tensors["whole"] - base_weight
    initialisation = str(adapter.saved.config.get("init_lora_weights")).lower()
    if adapter_name.endswith(".bias") or initialisation not in ("pissa", "olora"):
        return None
    down, _, scale = factors_of(adapter, adapter_name, tensors)
    taken: Array
    if initialisation == "pissa":
        u, s, vh = np.linalg.svd(base_weight, full_matrices=False)
        taken = u[:, : len(down)] @ np.diag(s[: len(down)]) @ vh[: len(down)]
    else:
        q, r = np.linalg.qr(base_weight)
        taken = scale * q[:, : len(down)] @ r[: len(down)]
    return -taken


def read_tensors(adapter: Adapter, name: str) -> tuple[str, dict[str, Array]]:
    """The adapter's name of a weight of the base, and its tensors for that weight: the whole weight, or LoRA's by kind."""
    adapter_name = next(adapter_name for adapter_name, place in adapter.places.items() if place == name)
    module = adapter_name.rpartition(".")[0]
    tensors = {}
    with safe_open(adapter.saved.folder / WEIGHTS_NAME, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            tensor_name = key.removeprefix(adapter.front).replace(".base_layer.", ".")
            tensor_name = tensor_name.replace(f".modules_to_save.{adapter.adapter_name}.", ".")
            if tensor_name == adapter_name:
                tensors["whole"] = file.get_tensor(key).double().numpy()
            elif tensor_name.startswith(f"{module}.lora_"):
                kind = tensor_name.removeprefix(f"{module}.").partition(".")[0]
                is_bias = tensor_name.endswith(".bias")
                tensors[f"{kind}.bias" if is_bias else kind] = file.get_tensor(key).double().numpy()
    return adapter_name, tensors


def factors_of(adapter: Adapter, adapter_name: str, tensors: dict[str, Array]) -> tuple[Array, Array, float]:
    """(rank, columns), (rows, rank) and scale of one LoRA module."""
    if "lora_embedding_A" in tensors:
        down, up = tensors["lora_embedding_B"].T, tensors["lora_embedding_A"].T
    else:
        down, up = tensors["lora_A"], tensors["lora_B"]
    rank, module, config = len(down), adapter_name.rpartition(".")[0], adapter.saved.config
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return down.reshape(rank, -1), up.reshape(len(up), -1), float(scale)
