"""How an encoder is kept: whole models, one for each adapter side by side, or the base's name and one merged adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from lora_embed import load_encoder
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.demo.parts import LabelledImage
from lora_embed.errors import ConfigError, EncoderError
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.fold import Limit, on_grid
from lora_embed.model.golden import relative_difference
from lora_embed.model.ingredients import gather
from models import save_adapter, save_base


def recipe_of(base: Path, adapters: dict[Path, float], **options: object) -> Recipe:
    specs = tuple(AdapterSpec(path=str(path), weight=weight) for path, weight in adapters.items())
    return Recipe.model_validate({"base_model": str(base), "adapters": specs} | options)


def build(recipe: Recipe, out: Path, limit: Limit | None = None) -> Path:
    build_encoder(gather(recipe), out, lambda message: None, limit)
    return out


def report_of(encoder: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads((encoder / "merge_report.json").read_text())
    return report


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = save_base(tmp_path / "base")
    return base, save_adapter(tmp_path / "ten", base, 10, seed=1), save_adapter(tmp_path / "more", base, 27, seed=2, r=6)


@pytest.fixture(scope="module")
def images(real_images: list[LabelledImage]) -> list[Image.Image]:
    return [Image.open(image.path).convert("RGB") for image in real_images[:: len(real_images) // 16][:16]]


@torch.no_grad()
def by_peft(base: Path, adapter: Path, images: list[Image.Image], **processor: object) -> NDArray[np.float32]:
    """The stored adapter as anyone loads it, without this project."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    pixels = AutoImageProcessor.from_pretrained(base, backend="pil", **processor)(images, return_tensors="pt")["pixel_values"]
    vectors: NDArray[np.float32] = model(pixels, output_hidden_states=True).hidden_states[-1].mean(dim=1).numpy()
    return vectors


def test_a_stored_adapter_is_loaded_by_peft_with_the_same_vectors(
    tmp_path: Path, tiny: tuple[Path, Path, Path], images: list[Image.Image]
) -> None:
    base, ten, more = tiny
    recipe = recipe_of(base, {ten: 0.7, more: 0.3})
    whole, kept = build(recipe, tmp_path / "whole"), build(recipe, tmp_path / "kept", Limit())
    found = load_encoder(kept).embed(images)
    assert relative_difference(found, load_encoder(whole).embed(images)) < 1e-5
    assert relative_difference(by_peft(base, kept / "adapter", images), found) < 1e-5
    assert relative_difference(found, by_peft_base(base, images)) > 1e-2


@pytest.mark.slow
def test_real_adapters_are_kept_in_megabytes(
    tmp_path: Path, base_model: Path, real_adapters: dict[str, Path], images: list[Image.Image]
) -> None:
    recipe = recipe_of(base_model, dict.fromkeys(real_adapters.values(), 0.5), image_size=56)
    whole = load_encoder(build(recipe, tmp_path / "whole")).embed(images)
    kept, cut = build(recipe, tmp_path / "kept", Limit()), build(recipe, tmp_path / "cut", Limit(rank=4))
    found = load_encoder(kept).embed(images)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    assert relative_difference(found, whole) < 1e-5
    assert relative_difference(by_peft(base_model, kept / "adapter", images, **size), found) < 1e-5
    stored = [report_of(folder)["store"] for folder in (kept, cut)]
    assert all(store["is_adapter"] and store["base_bytes"] > 80e6 for store in stored)
    assert 3e6 < stored[0]["bytes"] < 5e6
    assert stored[1]["bytes"] < stored[0]["bytes"] / 3
    assert stored[0]["vectors_moved"] < 1e-5 < 1e-2 < stored[1]["vectors_moved"]
    moved = relative_difference(load_encoder(cut).embed(images), whole)
    assert 0.2 < moved / stored[1]["vectors_moved"] < 5


def test_space_id_is_that_of_the_rebuilt_weights(tmp_path: Path, tiny: tuple[Path, Path, Path]) -> None:
    base, ten, more = tiny
    recipe = recipe_of(base, {ten: 0.7, more: 0.3})
    kept = build(recipe, tmp_path / "kept", Limit())
    again = build(recipe_of(base, {kept / "adapter": 1.0}), tmp_path / "again")
    assert read_description(again).space_id == read_description(kept).space_id
    whole = read_description(build(recipe, tmp_path / "whole"))
    assert whole.recipe_id != read_description(kept).recipe_id  # else a table would take one for the other


@pytest.mark.parametrize("rank", [1, 5, 16, 200])
def test_factors_on_a_grid_multiply_without_rounding_in_any_order(rank: int) -> None:
    rng = torch.Generator().manual_seed(rank)
    exact_up, exact_down = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((40, rank), (rank, 30)))
    up, down = on_grid(exact_up, rank), on_grid(exact_down * 1e-3, rank)
    assert up.dtype == down.dtype == torch.float32
    product, order = up.double() @ down.double(), torch.randperm(rank, generator=rng)
    one_by_one = torch.zeros(40, 30, dtype=torch.float64)
    for number in order:
        one_by_one += torch.outer(up[:, number].double(), down[number].double())
    assert torch.equal(product, one_by_one)
    exact = exact_up @ exact_down * 1e-3
    assert float((product - exact).norm() / exact.norm()) < 1e-6


def test_a_base_that_changed_since_is_refused(tmp_path: Path, tiny: tuple[Path, Path, Path]) -> None:
    base, ten, _ = tiny
    kept = build(recipe_of(base, {ten: 1.0}), tmp_path / "kept", Limit())
    shutil.copy(save_base(tmp_path / "other", seed=5) / "model.safetensors", base / "model.safetensors")
    with pytest.raises(EncoderError, match=r"is stored as an adapter of .*/base, whose files have changed since"):
        load_encoder(kept)


def test_a_stored_adapter_that_was_touched_is_refused(tmp_path: Path, tiny: tuple[Path, Path, Path]) -> None:
    base, ten, _ = tiny
    kept = build(recipe_of(base, {ten: 1.0}), tmp_path / "kept", Limit())
    other = build(recipe_of(base, {ten: 0.9}), tmp_path / "other", Limit())
    shutil.copy(other / "adapter" / "adapter_model.safetensors", kept / "adapter" / "adapter_model.safetensors")
    with pytest.raises(EncoderError, match=r"kept: adapter/adapter_model.safetensors has .* The file was changed"):
        load_encoder(kept)


def test_what_one_adapter_cannot_hold_is_refused(tmp_path: Path, tiny: tuple[Path, Path, Path]) -> None:
    base, _, _ = tiny
    norms = save_adapter(tmp_path / "norms", base, modules_to_save=["classifier", "layernorm"])
    for adapters, options, message in (
        ({norms: 1.0}, {}, "which is not one of a linear layer or a convolution"),
        ({}, {"merge_method": "none"}, "no adapter to store"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(recipe_of(base, adapters, **options), tmp_path / "kept", Limit())
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("limit", [None, Limit()])
def test_concat_puts_each_adapters_own_vector_side_by_side(
    tmp_path: Path, tiny: tuple[Path, Path, Path], images: list[Image.Image], limit: Limit | None
) -> None:
    base, ten, more = tiny
    both = build(recipe_of(base, {ten: 1.0, more: 1.0}, merge_method="concat"), tmp_path / "both", limit)
    other_order = build(recipe_of(base, {more: 1.0, ten: 1.0}, merge_method="concat"), tmp_path / "order", limit)
    order = [Path(adapter["uri"]) for member in report_of(both)["members"] for adapter in member["adapters"]]
    alone = [load_encoder(build(recipe_of(base, {path: 1.0}), tmp_path / f"{path.name}-alone")).embed(images) for path in order]
    encoder = load_encoder(both)
    assert encoder.dimension == 64
    assert relative_difference(encoder.embed(images), np.concatenate(alone, axis=1)) < (1e-6 if limit else 1e-9)
    assert encoder.space_id == read_description(other_order).space_id != read_description(tmp_path / "ten-alone").space_id


def by_peft_base(base: Path, images: list[Image.Image]) -> NDArray[np.float32]:
    pixels = AutoImageProcessor.from_pretrained(base, backend="pil")(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = AutoModel.from_pretrained(base)(pixels, output_hidden_states=True).hidden_states
    vectors: NDArray[np.float32] = states[-1].mean(dim=1).numpy()
    return vectors
