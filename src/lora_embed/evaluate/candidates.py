"""The candidates of an evaluation: recipes and encoders, each built once, and the heads of their adapters."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_embed.chain.items import EncoderSource
from lora_embed.config.foreign import read_record
from lora_embed.config.models import Recipe, distinct_names, load_recipe, recorded_recipe
from lora_embed.errors import AdapterMismatch, ConfigError, EncoderError, StorageError
from lora_embed.evaluate.collect import Wanted
from lora_embed.evaluate.records import Candidate
from lora_embed.model.description import Description, read_description
from lora_embed.model.follow import refuse_elsewhere
from lora_embed.model.ingredients import Ingredients, gather
from lora_embed.monitor.progress import say
from lora_embed.run.encoders import find_encoder, named_base, prepare_encoder, store_encoder
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store

if TYPE_CHECKING:
    from lora_embed.model.head import SavedHead
    from lora_embed.model.match import Adapter


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A candidate before it is built: a recipe with the files that it names, or an encoder's directory."""

    name: str
    recipe: Recipe
    ingredients: Ingredients | None  # None if an encoder's recipe names files that no longer exist
    adapters: "tuple[Adapter, ...]" = ()  # the recipe's adapters, matched to the base
    folder: Path | None = None  # directory of an encoder built before


@dataclass(frozen=True, kw_only=True)
class Built:
    """A candidate as an encoder on storage."""

    entrant: Entrant
    encoder: Description
    build_s: float
    encoder_bytes: int


@dataclass(frozen=True, kw_only=True)
class AdapterHead:
    """The classification head that an adapter was trained with."""

    adapter: str  # its name
    head_id: str
    head: "SavedHead"
    names: dict[int, str]  # class names of its outputs, if the adapter has them
    entrant: Entrant  # the adapter alone, at weight 1


def find_entrants(recipes: Sequence[str], *, alone: bool) -> list[Entrant]:
    """Read recipe files and encoder directories; with `alone`, add their bases and each of their adapters.

    Raises ConfigError for files that cannot be read.
    """
    names = distinct_names([path.rstrip("/").removesuffix(".yaml").removesuffix(".yml") for path in recipes])
    entrants = [_read(name, path) for name, path in zip(names, recipes, strict=True)]
    if alone:
        recipe_ids = {entrant.ingredients.recipe_id for entrant in entrants if entrant.ingredients}
        for entrant in _alone(entrants):
            assert entrant.ingredients is not None
            if entrant.ingredients.recipe_id not in recipe_ids:
                recipe_ids.add(entrant.ingredients.recipe_id)
                entrants.append(entrant)
    twice = {entrant.name for entrant in entrants if [other.name for other in entrants].count(entrant.name) > 1}
    if twice:
        raise ConfigError(f"two candidates have the name {min(twice)!r}. Rename one of the recipe files.")
    return entrants


def _read(name: str, path: str) -> Entrant:
    if not Path(path).is_dir():
        recipe = load_recipe(path)
        return _entrant(name, recipe)
    read_description(Path(path))
    recipe = recorded_recipe(Path(path))
    try:
        for place in (recipe.base_model, *(spec.path for spec in recipe.adapters)):
            refuse_elsewhere(place, path)
        return replace(_entrant(name, recipe), folder=Path(path))
    except (StorageError, EncoderError, AdapterMismatch) as error:
        say(f"note: {path}: judged without its adapters' heads, because the files it was built from cannot be read: {error}")
        return Entrant(name=name, recipe=recipe, ingredients=None, folder=Path(path))


def _entrant(name: str, recipe: Recipe) -> Entrant:
    from lora_embed.model.build import match_adapters  # imports torch and peft, which takes seconds

    ingredients = gather(recipe)
    return Entrant(name=name, recipe=recipe, ingredients=ingredients, adapters=tuple(match_adapters(ingredients)))


def _alone(entrants: Sequence[Entrant]) -> Iterator[Entrant]:
    """The base of each entrant, and each of its adapters alone."""
    for entrant in entrants:
        if entrant.ingredients is None:
            continue
        changes = {"adapters": (), "merge_method": "none", "merge_options": {}}
        base = entrant.recipe.model_copy(update=changes)
        yield Entrant(name="base", recipe=base, ingredients=gather(base))
        yield from (single(entrant, number) for number in range(len(entrant.adapters)))


def single(entrant: Entrant, number: int) -> Entrant:
    """One adapter of a recipe alone, at weight 1."""
    spec = entrant.recipe.adapters[number].model_copy(update={"weight": 1.0})
    changes = {"adapters": (spec,), "merge_method": "weighted_sum", "merge_options": {}}
    recipe, name = entrant.recipe.model_copy(update=changes), entrant.recipe.adapter_names[number]
    return Entrant(name=name, recipe=recipe, ingredients=gather(recipe), adapters=(entrant.adapters[number],))


@dataclass(frozen=True, kw_only=True)
class BuildTime:
    """How long an encoder took to build: `builds/<space_id>.json` of the working folder."""

    build_s: float


def build(entrant: Entrant, store: Store) -> Built:
    """Build the entrant's encoder and copy it to storage, unless storage has it already."""
    source = entrant.folder or entrant.ingredients
    assert source is not None
    encoder = find_encoder(source, store)
    if encoder is None:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            folder = prepare_encoder(source, Path(scratch) / "encoder")
            took = 0.0 if entrant.folder else time.perf_counter() - started
            encoder = store_encoder(folder, store)
        store.replace(f"builds/{encoder.space_id}.json", json.dumps({"build_s": round(took, 2)}).encode())
    recorded = read_record(store, f"builds/{encoder.space_id}.json", BuildTime)
    weights = [entry.size for entry in store.list_files(encoder_path(encoder.space_id)) if entry.path.endswith(".safetensors")]
    build_s = recorded.build_s if recorded is not None else 0.0
    return Built(entrant=entrant, encoder=encoder, build_s=build_s, encoder_bytes=sum(weights))


def find_heads(entrants: Sequence[Entrant]) -> tuple[list[AdapterHead], list[str]]:
    """The heads of all adapters that entrants name, each once, and a note for each adapter without a usable head."""
    from lora_embed.model.head import class_names, find_head

    heads: dict[str, AdapterHead] = {}
    notes: dict[str, str] = {}
    for entrant in entrants:
        if entrant.ingredients is None:
            continue
        for number, (name, adapter) in enumerate(zip(entrant.recipe.adapter_names, entrant.adapters, strict=True)):
            key = f"{entrant.ingredients.base.content_hash} {adapter.content_hash} {entrant.recipe.image_size}"
            if key in heads or key in notes:
                continue
            head = find_head(entrant.ingredients.base, adapter)
            if isinstance(head, str):
                notes[key] = f"{name}: its head is not judged: {head}"
                continue
            heads[key] = AdapterHead(
                adapter=name,
                head_id=hashlib.sha256(head.to_bytes()).hexdigest()[:12],
                head=head,
                names=class_names(adapter.saved.folder),
                entrant=single(entrant, number),
            )
    return list(heads.values()), list(notes.values())


def want(built: Built, heads: Sequence[AdapterHead], store: Store) -> Wanted:
    """The request to embed with an encoder and its fitting heads; all heads are copied to storage."""
    entrant, encoder = built.entrant, built.encoder
    base = entrant.ingredients.base.content_hash if entrant.ingredients else None
    source = entrant.folder or entrant.ingredients
    for head in heads:
        store.create(f"heads/{head.head_id}", head.head.to_bytes())
    fitting = [(number, head) for head in heads if (number := _model_of(entrant, head, base)) is not None]
    return Wanted(
        space_id=encoder.space_id,
        encoder=EncoderSource.on(
            store,
            encoder,
            base=named_base(source) if source is not None and encoder.base is not None else None,
            heads=tuple((number, f"heads/{head.head_id}") for number, head in fitting),
        ),
        heads=tuple(head.head_id for _, head in fitting),
    )


def _model_of(entrant: Entrant, head: AdapterHead, base: str | None) -> int | None:
    """Number of the encoder's model that a head fits (for `concat`, the model of its adapter); None if none fits."""
    of_head = head.entrant.ingredients
    assert of_head is not None
    if (
        entrant.ingredients is None
        or base != of_head.base.content_hash
        or entrant.recipe.image_size != head.entrant.recipe.image_size
    ):
        return None
    if entrant.recipe.merge_method != "concat":
        return 0
    hashes = sorted(adapter.content_hash for adapter in entrant.ingredients.adapters)
    return hashes.index(of_head.adapters[0].content_hash) if of_head.adapters[0].content_hash in hashes else None


def candidate_of(built: Built, forward_s: float) -> Candidate:
    """The record of a candidate."""
    recipe = built.entrant.recipe
    return Candidate(
        name=built.entrant.name,
        method=recipe.merge_method,
        weights=dict(zip(recipe.adapter_names, (spec.weight for spec in recipe.adapters), strict=True)),
        options=dict(recipe.merge_options),
        recipe_id=built.encoder.recipe_id,
        space_id=built.encoder.space_id,
        dimension=built.encoder.dimension,
        build_s=built.build_s,
        encoder_bytes=built.encoder_bytes,
        forward_s=round(forward_s, 3),
    )


def related(entrants: Sequence[Entrant]) -> "dict[str, tuple[Ingredients, dict[str, Adapter]]]":
    """Bases with several adapters: content hash → one recipe's ingredients, and all adapters of the base by name."""
    by_base: dict[str, tuple[Ingredients, dict[str, Adapter]]] = {}
    for entrant in entrants:
        if entrant.ingredients is not None:
            base = entrant.ingredients.base.content_hash
            adapters = by_base.setdefault(base, (entrant.ingredients, {}))[1]
            known = {adapter.content_hash for adapter in adapters.values()}
            for name, adapter in zip(entrant.recipe.adapter_names, entrant.adapters, strict=True):
                if adapter.content_hash not in known:
                    adapters[name if name not in adapters else adapter.uri] = adapter
    return {base: pair for base, pair in by_base.items() if len(pair[1]) > 1}
