"""One model of an encoder: it is folded, measured, written, and checked after it was opened again.

An encoder has one model, or, with `concat`, one for each adapter, whose vectors are concatenated.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lora_embed.config.models import Recipe
from lora_embed.errors import AdapterMismatch, EncoderError
from lora_embed.images.preprocess import Pixels
from lora_embed.model import golden, merge
from lora_embed.model.adapter import PREFIX, WEIGHTS_NAME, read_adapter
from lora_embed.model.base import load_headless, open_headless
from lora_embed.model.base_files import Base
from lora_embed.model.change import LowRank
from lora_embed.model.description import Description
from lora_embed.model.encoder import Encoder, load_members
from lora_embed.model.fold import Folded, Limit, Merge, fold
from lora_embed.model.match import Adapter, match_adapter, target_of
from lora_embed.model.proof import Proof, prove
from lora_embed.model.relate import Relations
from lora_embed.model.space import space_id_of
from lora_embed.model.unmerged import Vectors, check_function
from lora_embed.store import hub

NOTHING = 1e-6  # a change below this share of the weights' norm is no larger than rounding


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """One changed weight: Frobenius norms of the weight, of the merged change, of each adapter's share, and of the cut part."""

    before: float
    change: float
    shares: list[float]
    rank: int | None  # kept by a limit
    cut: float | None  # norm of what it cut off


@dataclass(frozen=True, kw_only=True)
class Member:
    """One folded model of an encoder, and the figures of its fold."""

    merged: Merge
    model: PreTrainedModel
    prefix: str  # before the weights in the base's files: see `open_headless`
    kept: dict[str, LowRank]  # weight → low-rank change, if a limit cut the changes
    rows: dict[str, WeightRow]
    relations: Relations


@dataclass(frozen=True, kw_only=True)
class Proven:
    """What the checks of one saved model found."""

    weights: Proof
    vectors: float  # largest relative L2 difference of a golden vector from that of adapters that are not merged


def fold_members(base: Base, recipe: Recipe, adapters: list[Adapter], limit: Limit | None) -> list[Member]:
    """Fold a recipe's models. Raises AdapterMismatch, ConfigError or EncoderError if one cannot be folded or stored."""
    return [_fold(base, merged, limit) for merged in _merges(recipe, adapters)]


def _merges(recipe: Recipe, adapters: list[Adapter]) -> list[Merge]:
    """The merge for each model of the encoder, in an order that does not depend on the recipe's order."""
    options = merge.options_of(recipe.merge_method, recipe.merge_options)
    if recipe.merge_method == merge.CONCAT:
        ordered = sorted(adapters, key=lambda adapter: adapter.content_hash)
        return [Merge(adapters=(adapter,), weights=(1.0,), options={}) for adapter in ordered]
    weights = tuple(spec.weight for spec in recipe.adapters)
    return [Merge(adapters=tuple(adapters), weights=weights, method=recipe.merge_method, options=options)]


def _fold(base: Base, merged: Merge, limit: Limit | None) -> Member:
    model, prefix = open_headless(base.folder, base.uri)
    relations, rows, low_ranks = Relations.of(len(merged.adapters)), {}, {}
    for folded in fold(model, merged, limit):
        shares = relations.add(merged, folded.name, folded.before)
        if folded.kept is not None:
            low_ranks[folded.name] = folded.kept
        rows[folded.name] = _weight_row(folded, shares)
    for number, (adapter, weight) in enumerate(zip(merged.adapters, merged.weights, strict=True)):
        changed = math.hypot(*(rows[name].before for name in adapter.changes))
        if weight and relations.norms()[number] < abs(weight) * NOTHING * changed:
            raise AdapterMismatch(
                f"{adapter.uri}: changes the base by less than float32 rounding, so it would change nothing. "
                "Was it saved before training? Train it, or leave it out of the recipe."
            )
    return Member(merged=merged, model=model, prefix=prefix, kept=low_ranks, rows=rows, relations=relations)


def write_member(member: Member, folder: Path, base: Base) -> None:
    if member.kept:
        _write_adapter(
            folder, {name.removesuffix(".weight"): change for name, change in member.kept.items()}, hub.plain_name(base.uri)
        )
    else:
        member.model.save_pretrained(folder)


def _write_adapter(folder: Path, changes: dict[str, LowRank], base: str) -> None:
    """Write low-rank changes (module of the headless model → change) as one LoRA adapter that PEFT can load.

    The scale of every change must be 1: for each module, alpha is written equal to the rank.
    """
    tensors, ranks = {}, {}
    for module, change in changes.items():
        assert change.scale == 1.0, module
        ranks[re.escape(module)] = rank = change.down.shape[0]
        kernel = change.shape[2:]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = change.down.reshape(rank, *change.shape[1:]).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = change.up.reshape(-1, rank, *[1] * len(kernel)).contiguous()
    most = max(ranks.values())
    other_ranks = {module: rank for module, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=other_ranks,
        alpha_pattern=dict(other_ranks),
        target_modules=sorted(changes),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def prove_members(base: Base, members: list[Member], description: Description, folder: Path, pixels: Pixels) -> list[Proven]:
    """Open the written encoder like a user, and compare it with the adapter files, which are read again too."""
    saved = load_members(folder, description, str(folder), base.uri)
    merges = [member.merged for member in members]
    if description.base is not None:
        rebuilt = space_id_of(saved, description.preprocessing, description.pooling, description.normalize, description.form)
        if rebuilt != description.space_id:
            raise EncoderError(
                f"{folder}: base and adapter give an encoder of space {rebuilt}, but the merged encoder has "
                f"{description.space_id}, so it cannot be stored as an adapter. Store the whole model: leave out --store "
                "adapter."
            )
        target = target_of(base)
        stored = [match_adapter(read_adapter(str(folder / place)), target) for place in description.members]
        merges = [Merge(adapters=(adapter,), weights=(1.0,), options={}) for adapter in stored]
    original = load_headless(base.folder, base.uri)
    proofs = [prove(merged, original, model) for merged, model in zip(merges, saved, strict=True)]
    del saved  # memory for PEFT's layers
    vectors = np.split(golden.load(folder)[1], len(merges), axis=1)
    moved = [_check_function(merges[0], vectors[0], original, description, pixels)]
    for merged, own in zip(merges[1:], vectors[1:], strict=True):
        del original
        original = load_headless(base.folder, base.uri)
        moved.append(_check_function(merged, own, original, description, pixels))
    return [Proven(weights=proof, vectors=difference) for proof, difference in zip(proofs, moved, strict=True)]


def _check_function(merged: Merge, vectors: Vectors, base: PreTrainedModel, description: Description, pixels: Pixels) -> float:
    """`check_function` on the golden images. `vectors` are one model's part of theirs, which may be of any length."""
    alone = replace(description, members=description.members[:1])
    encoder = Encoder([base], alone, device="cpu", precision="float32", batch_size=1)
    if description.normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return check_function(merged, vectors, base, lambda images: encoder.embed_pixels(pixels[:images]))


def _weight_row(folded: Folded, shares: list[float]) -> WeightRow:
    """Measure one folded weight."""
    kept = folded.kept
    return WeightRow(
        before=float(folded.before.double().norm()),
        change=float(folded.delta.norm()),
        shares=shares,
        rank=None if kept is None else kept.down.shape[0],
        cut=None if kept is None else float((folded.delta - kept.delta()).norm()),
    )
