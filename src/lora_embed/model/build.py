"""Recipe → encoder directory: the adapters are folded into the headless base in float32, checked and described."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lora_embed.config.models import Recipe
from lora_embed.errors import ConfigError, EncoderError, ProcessorRefused, StorageError
from lora_embed.images.arithmetic import with_golden
from lora_embed.images.preprocess import Preprocessing
from lora_embed.images.processors import from_processor
from lora_embed.model import golden
from lora_embed.model.adapter import PROCESSOR_NAME, SavedAdapter, check_adapter, first_names
from lora_embed.model.base import check_base_size, load_headless
from lora_embed.model.base_files import Base, check_base
from lora_embed.model.description import BaseReference, Description, check_out, read_description, write_description
from lora_embed.model.encoder import Encoder, golden_pixels
from lora_embed.model.find_state import find_state
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import Ingredients, with_recipe
from lora_embed.model.match import Adapter, match_adapter, target_of
from lora_embed.model.member import Member, fold_members, prove_members, write_member
from lora_embed.model.mismatch import base_name_of, names_base
from lora_embed.model.pooling import pooler
from lora_embed.model.prepare import checked_preprocessing, golden_images
from lora_embed.model.processor import read_processor
from lora_embed.model.remarks import remarks
from lora_embed.model.report import write_report
from lora_embed.model.safetensors_private import number_of_system_error
from lora_embed.model.space import VERSION, space_id_of
from lora_embed.store.aside import folder_aside
from lora_embed.text import in_one_line, number_of

Say = Callable[[str], None]


def match_adapters(ingredients: Ingredients) -> list[Adapter]:
    """Match all adapters to the base. Raises AdapterMismatch for the first one that does not fit."""
    check_base_size(ingredients.base.folder, ingredients.base.uri)  # a far too large one would take hours to match
    target = target_of(ingredients.base)
    return [match_adapter(saved, target) for saved in ingredients.adapters]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A context with one thread, for folding: with a thread per core, its many small products took five times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _unchanged(ingredients: Ingredients) -> Iterator[None]:
    """Raises ChangedMeanwhile at the end if files of base or adapters have changed, even if the block failed for that."""
    try:
        yield
    finally:
        check_base(ingredients.base)
        for adapter in ingredients.adapters:
            check_adapter(adapter)


@contextlib.contextmanager
def _errors_of_disk(out: Path) -> Iterator[None]:
    """safetensors raises an error of its own where a disk is full. As OSError it is known for what it is."""
    try:
        yield
    except SafetensorError as error:
        if (number := number_of_system_error(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(out)) from None


@one_thread()
def build_encoder(ingredients: Ingredients, out: Path, say: Say, limit: Limit | None = None) -> Description:
    """Fold, write, check and prove an encoder at `out`, which must not exist. Nothing is left there if a check fails.

    With a `limit`, the encoder is written as one LoRA adapter, the merged change cut to the limit, and a reference to the
    base. Raises AdapterMismatch, EncoderError, ConfigError, or ChangedMeanwhile.
    """
    check_out(out)
    with folder_aside(out) as folder, _unchanged(ingredients), _errors_of_disk(out):
        _build(ingredients, folder, say, limit)
    description = read_description(out)
    say(f"encoder {description.space_id}: {description.dimension}-d vectors, pooling {description.pooling}")
    return description


def _build(ingredients: Ingredients, folder: Path, say: Say, limit: Limit | None) -> None:
    recipe, base = ingredients.recipe, ingredients.base
    if limit is not None and not recipe.adapters:
        raise ConfigError(
            "merge_method is none, so there is no adapter to store. Name adapters in the recipe, or leave out --store adapter."
        )
    adapters = match_adapters(ingredients)
    preprocessing, processor = checked_preprocessing(base, recipe)
    notes = [*_notes(ingredients, preprocessing), *remarks(base, adapters)]
    for note in notes:
        say(f"note: {note}")
    images = golden_images(preprocessing, base)
    pixels = golden_pixels(images, preprocessing)
    preprocessing = with_golden(preprocessing, dict(zip(images, pixels, strict=True)))
    unlimited_vectors = None
    if limit is not None:  # the whole merge, to report how much the limit changes vectors
        models = [member.model for member in fold_members(base, recipe, adapters, None)]
        unlimited_vectors = _vectors(models, _describe(models, preprocessing, ingredients, None, pixels), pixels, base)
        del models
    members = fold_members(base, recipe, adapters, limit)
    _say_folds(ingredients, adapters, members, say)
    models = [member.model for member in members]
    description = _describe(models, preprocessing, ingredients, limit, pixels)
    vectors = _vectors(models, description, pixels, base)
    moved = None if unlimited_vectors is None else golden.relative_difference(vectors, unlimited_vectors)
    for member, place in zip(members, description.members, strict=True):
        write_member(member, folder / place, base)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    golden.save(folder, images, vectors)
    write_description(folder, description)
    for model in models:
        torch.nn.Module.to(model, "meta")  # frees memory for the saved encoder, which is opened again below
    proofs = prove_members(base, members, description, folder, pixels)
    write_report(folder, description, base, members, proofs, notes, moved)


def open_base(ingredients: Ingredients) -> tuple[PreTrainedModel, Description]:
    """The base in memory, with nothing folded into it, and its description: preprocessing, pooling and tap as in any merge.

    Raises EncoderError like a build.
    """
    base, recipe = ingredients.base, ingredients.recipe
    base_alone = recipe.model_copy(update={"adapters": (), "merge_method": "none", "merge_options": {}})
    preprocessing, _ = checked_preprocessing(base, recipe)
    pixels = golden_pixels(golden_images(preprocessing, base), preprocessing)
    model = load_headless(base.folder, base.uri)
    return model, _describe([model], preprocessing, with_recipe(ingredients, base_alone), None, pixels)


def _vectors(
    models: list[PreTrainedModel], description: Description, pixels: np.ndarray[Any, Any], base: Base
) -> np.ndarray[Any, Any]:
    """The golden images' vectors. They must be finite and not zero."""
    encoder = Encoder(models, description, device="cpu", precision="float32", batch_size=len(pixels))
    vectors = encoder.embed_pixels(pixels)
    if vectors.shape != (len(pixels), description.dimension):
        raise EncoderError(
            f"{base.uri}: {type(models[0]).__name__} gives vectors of shape {vectors.shape} for {len(pixels)} images, expected "
            f"one of {description.dimension} numbers for each. This is a bug of lora-embed. Please report it."
        )
    if not np.isfinite(vectors).all() or not np.linalg.norm(vectors, axis=1).all():
        raise EncoderError(
            f"{base.uri}: the merged encoder gives vectors that are zero or not finite. Make the weights of the adapters "
            "smaller; without adapters, name another base or another pooling."
        )
    return vectors


def _say_folds(ingredients: Ingredients, adapters: list[Adapter], members: list[Member], say: Say) -> None:
    model, recipe = members[0].model, ingredients.recipe
    place = f", in its files below {members[0].prefix!r}" if members[0].prefix else ""
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"base {ingredients.base.uri}: {weights:.1f}M weights, {type(model).__name__}{place}")
    for adapter, spec in zip(adapters, recipe.adapters, strict=True):
        head = f", without its head ({number_of(len(adapter.head_keys), 'tensor')})" if adapter.head_keys else ""
        say(f"adapter {adapter.uri}: {number_of(len(adapter.changes), 'weight')} × {spec.weight}{head}")
    if adapters:
        changed = len({name for member in members for name in member.rows})
        say(f"merge {recipe.merge_method}: {number_of(changed, 'weight')} changed")


def _notes(ingredients: Ingredients, preprocessing: Preprocessing) -> list[str]:
    """Notes on settings that may be mistakes, but need not be."""
    notes, base = [], ingredients.base.uri
    strangers = sorted(
        {name for saved in ingredients.adapters if (name := base_name_of(saved)) and not names_base(saved, base)}
    )
    if strangers:
        notes.append(
            f"the adapters say that they were trained on {first_names(strangers)}, but are merged into {base}. "
            "That is right if both are the same model under two names; only the shapes could be compared"
        )
    notes += [note for saved in ingredients.adapters if (note := _processor_note(saved, preprocessing, ingredients.recipe))]
    return notes


def _processor_note(saved: SavedAdapter, preprocessing: Preprocessing, recipe: Recipe) -> str | None:
    """What differs between the image processor beside an adapter and the base's, which is used in any case."""
    if not (saved.folder / PROCESSOR_NAME).exists():
        return None
    file = f"{saved.uri} holds a {PROCESSOR_NAME}"
    try:
        own, _ = from_processor(read_processor(saved.folder).settings, recipe.image_size, recipe.decode)
    except (ProcessorRefused, StorageError) as error:
        reason = in_one_line(getattr(error, "reason", error), 300)
        return f"{file}, which could not be compared with the base's. The build uses the base's and goes on. Reason: {reason}"
    if replace(own, arithmetic=preprocessing.arithmetic) == preprocessing:
        return None
    return f"{file} that prepares images in another way than the base's, which is used: {own} instead of {preprocessing}"


@torch.inference_mode()
def _describe(
    models: list[PreTrainedModel],
    preprocessing: Preprocessing,
    ingredients: Ingredients,
    limit: Limit | None,
    pixels: np.ndarray[Any, Any],
) -> Description:
    recipe, base, model = ingredients.recipe, ingredients.base, models[0]
    values = torch.tensor(pixels[:2, ..., :3]).permute(0, 3, 1, 2).float() / 255  # two images show what differs between images
    if preprocessing.pad is not None:  # the padding is the same in every image, like a class token
        values = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    try:
        state = find_state(model, values, recipe.pooling)
        pooler(recipe.pooling, state.form)
    except EncoderError as error:
        raise EncoderError(f"{base.uri}: {error}") from None
    except ValueError as error:  # for example, the model takes images of another size
        height, width = preprocessing.size
        raise EncoderError(
            f"{base.uri}: {type(model).__name__} does not take images of {height}×{width} pixels "
            f"({in_one_line(error, 160)}). Correct image_size in the recipe or leave it out; if the size is right, name "
            "another base."
        ) from None
    reference = BaseReference(uri=base.uri, revision=recipe.revision, content_hash=base.content_hash)
    return Description(
        space_id=space_id_of(models, preprocessing, recipe.pooling, recipe.normalize, state.form),
        recipe_id=ingredients.recipe_id_with(limit),
        dimension=len(models) * state.dimension,
        pooling=recipe.pooling,
        normalize=recipe.normalize,
        tap=state.tap,
        preprocessing=preprocessing,
        members=_folders(len(models), "adapter" if limit else "."),
        base=reference if limit else None,
        space_version=VERSION,
        **asdict(state.form),
    )


def _folders(members: int, single: str) -> tuple[str, ...]:
    return (single,) if members == 1 else tuple(f"member-{number}" for number in range(members))
