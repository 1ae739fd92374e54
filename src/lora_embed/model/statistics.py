"""The running statistics of batch normalisation: what an adapter saves of them, and what it does not.

Training moves them in every forward pass, but they are no parameters, so PEFT saves them only for modules that are named
in `modules_to_save`.
"""

from collections.abc import Mapping

import torch

from lora_embed.errors import AdapterMismatch, EncoderError
from lora_embed.model.adapter import SavedAdapter
from lora_embed.model.change import Change, Replaced
from lora_embed.model.whole import Target

MEAN, VARIANCE = "running_mean", "running_var"


def check_statistics(saved: SavedAdapter, changes: Mapping[str, Change]) -> None:
    """Raises AdapterMismatch if one of the two statistics of a layer is missing, or a variance is negative."""
    for name, change in changes.items():
        module, _, kind = name.rpartition(".")
        other = f"{module}.{VARIANCE if kind == MEAN else MEAN}"
        if kind in (MEAN, VARIANCE) and other not in changes:
            raise AdapterMismatch(
                f"{saved.uri}: has {name}, but no {other}, so the file is incomplete. Save the adapter again."
            )
        if kind == VARIANCE and isinstance(change, Replaced) and bool((change.trained < 0).any()):
            raise AdapterMismatch(
                f"{saved.uri}: {name} holds negative numbers, but is a variance. The file is damaged: copy it again, or use "
                "another checkpoint."
            )


def lost_statistics(target: Target, changes: Mapping[str, Change]) -> tuple[str, ...]:
    """The base's batch normalisations whose statistics an adapter does not hold."""
    kept = (name.removesuffix(f".{MEAN}") for name in target.shapes if name.endswith(f".{MEAN}") and name not in changes)
    return tuple(kept)


def check_variance(name: str, merged: torch.Tensor) -> None:
    """Raises EncoderError for a merged variance below zero: the layer would divide by the root of a negative number."""
    if name.rpartition(".")[2] == VARIANCE and bool((merged < 0).any()):
        raise EncoderError(
            f"{name} is negative after the merge, but is a variance of batch normalisation: the adapters' changes add up to "
            "more than the base's variance. Make their weights smaller, so that they add up to at most 1, or use one adapter."
        )
