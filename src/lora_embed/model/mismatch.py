"""Why an adapter does not fit a base: which names or shapes differ, the nearest weight of the base, and what to do."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from lora_embed.errors import AdapterMismatch
from lora_embed.model.adapter import CONFIG_NAME, WEIGHTS_NAME, SavedAdapter, first_names
from lora_embed.model.weights import shape_of
from lora_embed.model.whole import Target
from lora_embed.store.hub import plain_name
from lora_embed.text import agree

_OTHER_PARTS = re.compile("text|language|llm|decoder")  # their weights may have the same names and shapes
_ONE_MODEL = "Leave it out of the recipe, or save only the tensors of the model that is the base."
_MOST_FRONTS = 10  # beginnings of names that are compared with all names
_NAMED = 3  # strays that a message names
_LONGEST = 120  # characters of a name that are compared
_OF_TEXT = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's task types of language models


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """Tensors of an adapter that belong to no weight of a base."""

    shapes: Mapping[str, torch.Size]  # of all tensors
    strays: tuple[str, ...]
    whole: frozenset[str]  # those that were saved whole, without LoRA
    weights: int  # number of tensors that are no head's
    inner: Mapping[str, str]  # names without what stands before the base's names
    wrapper: str


def base_name_of(saved: SavedAdapter) -> str:
    """The base that the adapter's configuration names; empty if it names none."""
    return str(saved.config.get("base_model_name_or_path") or "")


def names_base(saved: SavedAdapter, base_uri: str) -> bool:
    """True if the adapter's configuration names this base. Folders and owners are not compared, since copies have others."""
    name = base_name_of(saved)
    return bool(name) and Path(name).name == Path(plain_name(base_uri)).name


def is_of_another_model(part: str, saved: SavedAdapter, target: Target) -> bool:
    """True if a part of a name says that it is no attribute of somebody's own class around the base.

    It may be a head, the text part of a larger model, or another family: `beit.` does not stand before a ViT's names, unless
    the adapter names the base.
    """
    is_family = part not in target.families and (part in CONFIG_MAPPING or part.replace("_", "-") in CONFIG_MAPPING)
    return _is_other_part(part, target) or (is_family and not names_base(saved, target.uri))


def _is_other_part(part: str, target: Target) -> bool:
    return part in target.head_names or bool(_OTHER_PARTS.search(part))


def explain(saved: SavedAdapter, target: Target, misfit: Misfit) -> AdapterMismatch:
    """The error for tensors that match no weight of the base."""
    lead = (
        f"{saved.uri}: {len(misfit.strays)} of the {misfit.weights} weights that it changes "
        f"{agree(len(misfit.strays), 'matches', 'match')} no weight of {target.uri}: "
        f"{first_names([f'{name} {shape_of(misfit.shapes[name])}' for name in misfit.strays], _NAMED)}."
    )
    return AdapterMismatch(" ".join([lead, *_reasons(saved, target, misfit)]))


def explain_ranks(
    saved: SavedAdapter, target: Target, name: str, shapes: tuple[torch.Size, torch.Size], ranks: Mapping[str, int]
) -> AdapterMismatch:
    """The error for two factors of one module whose ranks differ: a damaged file, or LoRA of a convolution in groups."""
    (first, first_rank), (second, second_rank) = ranks.items()
    down, up = shapes
    lead = f"{saved.uri}: {name} has rank {first_rank} in {first} but {second_rank} in {second}."
    nearest = _nearest(f"{name}.weight", target)
    if nearest in target.grouped and (up[0], *down[2:]) == (target.shapes[nearest][0], *target.shapes[nearest][2:]):
        return AdapterMismatch(f"{lead} {_grouped(nearest)} Train the adapter without this layer.")
    return AdapterMismatch(f"{lead} The file is damaged. Save the adapter again.")


def _fronts(target: Target, misfit: Misfit) -> list[str]:
    """What stands before ends of names that are whole names in the base, unless it also stands before names that match."""
    fronts = {front for name in misfit.strays if (front := _front(name, target))}
    matching = [name for name in misfit.shapes if name not in misfit.strays]
    return sorted(
        front for front in sorted(fronts)[:_MOST_FRONTS] if not any(name.startswith(f"{front}.") for name in matching)
    )


def _reasons(saved: SavedAdapter, target: Target, misfit: Misfit) -> Iterator[str]:
    """What is known of the tensors that a message names, and what to do."""
    nearest = {name: _nearest(misfit.inner.get(name, name), target) for name in misfit.strays[:_NAMED]}
    fronts = _fronts(target, misfit)
    for name, place in _of_other_size(target, misfit, nearest).items():
        if place in target.grouped:
            yield f"{_grouped(place)} Train the adapter without this layer."
            return
        yield f"The base's weight of the name {misfit.inner.get(name, name)} has the shape {shape_of(target.shapes[place])}."
        break
    else:
        parts = (part for front in fronts for part in front.split("."))
        part = next((part for part in parts if is_of_another_model(part, saved, target)), None)
        if len(fronts) > 1:
            yield (
                f"Their names end like the base's, but begin differently ({first_names([repr(front) for front in fronts])}), "
                f"so they belong to several models. {_ONE_MODEL}"
            )
            return
        if part is not None:
            yield f"Their names end like the base's, but {part!r} before them is another part of a model, or another family."
            if _is_other_part(part, target):
                yield _ONE_MODEL
                return
        elif fronts and len(misfit.strays) < misfit.weights:
            yield f"Their names end like the base's after {fronts[0]!r}, but the other names begin in another way."
        elif misfit.wrapper:
            yield f"The others match without {misfit.wrapper!r}."
        if not fronts and not misfit.whole.issuperset(misfit.strays) and saved.config.get("task_type") not in _OF_TEXT:
            place = next(iter(nearest.values()))
            yield f"The nearest name in the base is {place} {shape_of(target.shapes[place])}."
    yield _advice(saved, target, misfit)


def _advice(saved: SavedAdapter, target: Target, misfit: Misfit) -> str:
    named = base_name_of(saved)
    if misfit.whole.issuperset(misfit.strays) and len(misfit.strays) < misfit.weights:
        count = len(misfit.strays)
        return (
            f"If {first_names(list(misfit.strays), _NAMED)} {agree(count, 'is', 'are')} part of a task's head, remove "
            f"{agree(count, 'it', 'them')} from {WEIGHTS_NAME}, since an encoder has no head. Otherwise the adapter was "
            "trained on another model than this base."
        )
    if saved.config.get("task_type") in _OF_TEXT and len(misfit.strays) == misfit.weights:
        return (
            f"{CONFIG_NAME} says task_type {saved.config['task_type']}: it was trained on a language model"
            f"{f', {named!r}' if named else ''}. Leave it out; an encoder of images takes adapters of vision models."
        )
    if names_base(saved, target.uri):
        return (
            f"{CONFIG_NAME} names this base, {named!r}, so the adapter was trained on a changed model, or its file was edited. "
            "Save it again from a model whose names and shapes are the base's."
        )
    if not named:
        return f"{CONFIG_NAME} does not name the base that it was trained on; name that base in the recipe."
    return f"It was trained on {named!r}; name that base in the recipe."


def _nearest(name: str, target: Target) -> str:
    """The weight of the base whose name ends most alike, and is most alike among those."""
    parts = name.split(".")[::-1]

    def same_parts(place: str) -> int:
        others = place.split(".")[::-1]
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))

    alike = max(map(same_parts, target.shapes))
    candidates = [place for place in sorted(target.shapes) if same_parts(place) == alike]
    return max(candidates, key=lambda place: SequenceMatcher(None, name[-_LONGEST:], place, autojunk=False).ratio())


def _of_other_size(target: Target, misfit: Misfit, nearest: Mapping[str, str]) -> dict[str, str]:
    """The tensors whose names are those of weights that have other shapes → these weights."""
    tried = {misfit.inner.get(name, name): target.shapes[place] for name, place in nearest.items()}
    located = target.locate(tried)
    return {
        name: place
        for name, place in nearest.items()
        if located[misfit.inner.get(name, name)] == place and misfit.shapes[name] != target.shapes[place]
    }


def _front(name: str, target: Target) -> str | None:
    """What stands before the end of a name that is a whole name in the base; None if no end is."""
    parts = name.split(".")
    ends = (n for n in range(len(parts)) if ".".join(parts[n:]) in target.shapes)
    return next((".".join(parts[:n]) for n in ends), None)


def _grouped(place: str) -> str:
    return (
        f"{place} is the weight of a convolution in groups, for which LoRA cannot be folded: it mixes channels that the weight "
        "keeps apart."
    )
