"""Recipe → encoder directory: adapters folded into the headless base in float32, checked, described."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import PretrainedConfig, PreTrainedModel

from lora_embed.config import Recipe
from lora_embed.errors import ConfigError, EncoderError
from lora_embed.model import golden, merge
from lora_embed.model.adapter import Adapter, Locate, SavedAdapter, match_adapter, read_adapter
from lora_embed.model.base import Base, find_base, load_headless, locate, read_model_config, read_processor
from lora_embed.model.encoder import (
    Description,
    Encoder,
    golden_pixels,
    read_description,
    space_id_of,
    write_description,
)
from lora_embed.model.pooling import find_tap
from lora_embed.model.preprocess import Preprocessing, from_processor

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """A recipe with everything it names read and hashed, before anything is built."""

    recipe: Recipe
    base: Base
    adapters: tuple[SavedAdapter, ...]
    recipe_id: str


def gather(recipe: Recipe) -> Ingredients:
    """Read what a recipe names. Raises AdapterMismatch, EncoderError or StorageError for what cannot be used."""
    base = find_base(recipe.base_model, recipe.revision)
    adapters = tuple(read_adapter(spec.path, spec.revision) for spec in recipe.adapters)
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.content_hash in seen:
            raise ConfigError(
                f"{adapter.uri}: is the same adapter as {seen[adapter.content_hash]}; name it once, with the sum of the weights"
            )
        seen[adapter.content_hash] = adapter.uri
    return Ingredients(recipe=recipe, base=base, adapters=adapters, recipe_id=_recipe_id(recipe, base, adapters))


def match_adapters(ingredients: Ingredients) -> list[Adapter]:
    """Match all adapters to the base. Raises AdapterMismatch for the first that does not fit it."""
    base = ingredients.base
    where = _locator(read_model_config(base.folder, base.uri))
    return [match_adapter(saved, base.uri, where) for saved in ingredients.adapters]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Many small products: with a thread per core, beside other work on these cores, a build took five times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def build_encoder(ingredients: Ingredients, out: Path, say: Say) -> Description:
    """Fold, check and write an encoder to `out`, which must not exist; nothing is left there when a check fails.

    Raises AdapterMismatch, EncoderError or ConfigError.
    """
    recipe, base = ingredients.recipe, ingredients.base
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; an encoder is never written over. Name another directory.")
    _check_writable(out)
    adapters = match_adapters(ingredients)
    model = load_headless(base.folder, base.uri)
    say(f"base {base.uri}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M weights, {type(model).__name__}")
    report = _fold(model, adapters, recipe, say)
    preprocessing, processor = _checked_preprocessing(base, recipe)
    images = golden.make_images()
    pixels = golden_pixels(images, preprocessing)
    description = _describe(model, preprocessing, ingredients, pixels)
    vectors = Encoder(model, description, device="cpu", precision="float32", batch_size=len(images)).embed_pixels(pixels)
    if not np.isfinite(vectors).all() or not np.linalg.norm(vectors, axis=1).all():
        raise EncoderError(f"{base.uri}: the merged encoder gives vectors that are not finite or zero; check the weights")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
        folder = Path(aside) / "encoder"
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        (folder / "merge_report.json").write_text(json.dumps(report, indent=2) + "\n")
        golden.save(folder, images, vectors)
        write_description(folder, description)
        if out.is_dir():
            out.rmdir()
        shutil.move(folder, out)
    say(f"encoder {description.space_id}: {description.dimension}-d vectors, pooling {description.pooling}")
    return read_description(out)


def _check_writable(out: Path) -> None:
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"{out}: cannot be written: {nearest} is not a directory that this user may write to")


def _locator(config: PretrainedConfig) -> Locate:
    """`locate` for one base; adapters that name the same modules share one answer."""
    known: dict[frozenset[tuple[str, torch.Size]], dict[str, str | None]] = {}

    def locate_once(shapes: dict[str, torch.Size]) -> dict[str, str | None]:
        key = frozenset(shapes.items())
        if key not in known:
            known[key] = locate(config, shapes)
        return known[key]

    return locate_once


def _fold(model: PreTrainedModel, adapters: list[Adapter], recipe: Recipe, say: Say) -> dict[str, Any]:
    """Add the merged change to each weight, in float64, rounded once; return the merge report."""
    weights = [spec.weight for spec in recipe.adapters]
    for adapter, weight in zip(adapters, weights, strict=True):
        say(f"adapter {adapter.uri}: {len(adapter.factors)} weights, {len(adapter.head_keys)} head tensors dropped, × {weight}")
    parameters = dict(model.named_parameters())
    changed = {}
    for name, delta in merge.merge(adapters, weights, recipe.merge_method):
        parameter = parameters[name]
        before = parameter.data.double()
        parameter.data = (before + delta).float()
        if not bool(torch.isfinite(parameter).all()):
            raise EncoderError(f"{name} is not finite after the merge: the weights of the recipe are too large for float32")
        changed[name] = {
            "relative_change": float(delta.norm() / before.norm()),
            "shares": {
                adapter.content_hash[:12]: abs(weight) * adapter.factors[name].norm()
                for adapter, weight in zip(adapters, weights, strict=True)
                if name in adapter.factors
            },
        }
    if adapters:
        say(f"merge {recipe.merge_method}: {len(changed)} weights changed")
    return {
        "merge_method": recipe.merge_method,
        "adapters": [
            {
                "uri": adapter.uri,
                "content_hash": adapter.content_hash,
                "weight": weight,
                "trained_on": adapter.trained_on,
                "weights_changed": len(adapter.factors),
                "head_keys_dropped": list(adapter.head_keys),
            }
            for adapter, weight in zip(adapters, weights, strict=True)
        ],
        "weights": changed,
    }


def _checked_preprocessing(base: Base, recipe: Recipe) -> tuple[Preprocessing, dict[str, Any]]:
    """The geometry read from the base's processor, proven equal to it on images of awkward sizes."""
    original = read_processor(base.folder)
    preprocessing, settings = from_processor(original.to_dict(), recipe.image_size)
    processor = type(original)(**settings)
    multiply, add = (np.array(values, np.float32).reshape(3, 1, 1) for values in (preprocessing.multiply, preprocessing.add))
    rng = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 333), (64, 64), (31, 200), (223, 225), (1, 7)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.asarray(processor(image)["pixel_values"][0])
        ours = preprocessing.apply(image).transpose(2, 0, 1).astype(np.float32) * multiply + add
        if expected.shape != ours.shape or np.abs(expected - ours).max() > 1e-5:
            raise EncoderError(
                f"{base.uri}: its {type(original).__name__} prepares a {width}×{height} image in another way than resize, "
                "crop, rescale and normalise; that processor is not supported"
            )
    return preprocessing, settings


@torch.inference_mode()
def _describe(
    model: PreTrainedModel, preprocessing: Preprocessing, ingredients: Ingredients, pixels: np.ndarray[Any, Any]
) -> Description:
    recipe = ingredients.recipe
    values = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    try:
        tap, output = find_tap(model, values)
    except ValueError as error:  # as a model says that it takes another size
        height, width = preprocessing.size
        raise EncoderError(
            f"{ingredients.base.uri}: {type(model).__name__} does not take images of {height}×{width} pixels "
            f"({' '.join(str(error).split())[:160]}). Correct image_size in the recipe, or leave it out."
        ) from None
    return Description(
        space_id=space_id_of(model, preprocessing, recipe.pooling, recipe.normalize),
        recipe_id=ingredients.recipe_id,
        dimension=output.shape[1] if output.ndim == 4 else output.shape[2],
        pooling=recipe.pooling,
        normalize=recipe.normalize,
        tap=tap,
        prefix_tokens=_prefix_tokens(model, output, preprocessing),
        preprocessing=preprocessing,
    )


def _prefix_tokens(model: PreTrainedModel, output: torch.Tensor, preprocessing: Preprocessing) -> int:
    """Class, distillation and register tokens that stand before the patches, by counting."""
    patch = getattr(model.config, "patch_size", None)
    if output.ndim == 4 or not isinstance(patch, int):
        return 0
    height, width = preprocessing.size
    return max(0, int(output.shape[1]) - (height // patch) * (width // patch))


def _recipe_id(recipe: Recipe, base: Base, adapters: tuple[SavedAdapter, ...]) -> str:
    """12 hex digits over contents and options, so that moved files and another order of adapters change nothing."""
    weights = [spec.weight for spec in recipe.adapters]
    parts = {
        "base": base.content_hash,
        "adapters": sorted([saved.content_hash, weight] for saved, weight in zip(adapters, weights, strict=True)),
        "merge": [recipe.merge_method, merge.VERSION],
        "pooling": [recipe.pooling, recipe.normalize, recipe.image_size],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
