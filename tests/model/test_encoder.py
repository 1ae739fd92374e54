"""The built encoder: parity with the guide, identity, golden vectors, and loading by others."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from guide import embed_by_hand, merge_by_hand
from lora_embed import load_encoder
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.config.values import Pooling, Precision
from lora_embed.demo.parts import LabelledImage
from lora_embed.errors import ConfigError, EncoderError
from lora_embed.images.decode import BadImage
from lora_embed.model.build import build_encoder
from lora_embed.model.description import StateForm, read_description
from lora_embed.model.encoder import DTYPES
from lora_embed.model.golden import BOUNDS, check, relative_difference
from lora_embed.model.ingredients import gather
from lora_embed.model.pooling import HiddenState, pooler
from models import save_adapter, save_base
from samples import png, poisoned


def quiet(message: str) -> None:
    pass


def recipe_of(base: Path, adapters: dict[Path, float], **options: object) -> Recipe:
    specs = tuple(AdapterSpec(path=str(path), weight=weight) for path, weight in adapters.items())
    return Recipe.model_validate({"base_model": str(base), "adapters": specs} | options)


def build(recipe: Recipe, out: Path) -> Path:
    build_encoder(gather(recipe), out, quiet)
    return out


@pytest.fixture(scope="module")
def some_images(real_images: list[LabelledImage]) -> list[Image.Image]:
    return [Image.open(image.path) for image in real_images[:: len(real_images) // 24][:24]]


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@pytest.mark.parametrize(("combination_type", "method"), [("linear", "linear"), ("cat", "weighted_sum")])
def test_random_adapters_merge_as_the_guide_merges_them(
    tmp_path: Path, family: str, combination_type: str, method: str, some_images: list[Image.Image]
) -> None:
    base = save_base(tmp_path / "base", family)
    images = [image.convert("RGB") for image in some_images]
    folders = {save_adapter(tmp_path / "ten", base, 10, seed=1): 10, save_adapter(tmp_path / "more", base, 27, seed=2): 27}
    expected = embed_by_hand(merge_by_hand(base, folders, [0.7, 0.3], combination_type), base, images)
    recipe = recipe_of(base, dict(zip(folders, [0.7, 0.3], strict=True)), merge_method=method)
    assert relative_difference(load_encoder(build(recipe, tmp_path / "encoder")).embed(images), expected) < 1e-5
    other = recipe.model_copy(update={"merge_method": "weighted_sum" if method == "linear" else "linear"})
    assert relative_difference(load_encoder(build(other, tmp_path / "other")).embed(images), expected) > 1e-3


@pytest.mark.parametrize("pooling", ["median", "last_", "last_last_mean"])
def test_a_pooling_without_arithmetic_is_not_another_one(pooling: str) -> None:
    with pytest.raises(NotImplementedError, match=f"pooling '{pooling}' has no arithmetic"):
        pooler(pooling, StateForm(prefix_tokens=1))


def test_every_precision_has_its_type_and_its_bound() -> None:
    assert set(DTYPES) == set(BOUNDS) == set(get_args(Precision))


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_pooling_equals_the_literal_expression(
    tmp_path: Path, family: str, pooling: str, some_images: list[Image.Image]
) -> None:
    images = [image.convert("RGB") for image in some_images]
    base = save_base(tmp_path / "base", family)
    encoder = build(recipe_of(base, {}, merge_method="none", pooling=pooling), tmp_path / "encoder")
    pixels = AutoImageProcessor.from_pretrained(base, backend="pil")(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = AutoModel.from_pretrained(base)(pixels, output_hidden_states=True)
    states = output.last_hidden_state if pooling.startswith("last_") else output.hidden_states[-1]
    literal = {"mean": states.mean(dim=1), "patch_mean": states[:, 1:].mean(dim=1), "cls": states[:, 0]}
    expected = literal[pooling.removeprefix("last_")].numpy()
    assert relative_difference(load_encoder(encoder).embed(images), expected) < 1e-5


def test_automodel_loads_what_was_built(tmp_path: Path, base_model: Path, real_adapters: dict[str, Path]) -> None:
    folder = build(recipe_of(base_model, dict.fromkeys(real_adapters.values(), 0.5), image_size=56), tmp_path / "encoder")
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[-1].mean(dim=1).numpy()
    assert relative_difference(load_encoder(folder).embed([image]), expected) < 1e-5


def test_space_id_follows_what_makes_a_vector_and_nothing_else(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "dinov2")
    one, two = save_adapter(tmp_path / "one", base, seed=1), save_adapter(tmp_path / "two", base, 27, seed=2)
    other = shutil.copytree(base, tmp_path / "other-processor")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 2}))

    def space(name: str, recipe: Recipe) -> str:
        return read_description(build(recipe, tmp_path / name)).space_id

    reference = space("a", recipe_of(base, {one: 0.5, two: 0.5}))
    assert space("b", recipe_of(base, {two: 0.5, one: 0.5})) == reference
    moved = shutil.copytree(tmp_path / "base", tmp_path / "elsewhere" / "base")
    assert space("c", recipe_of(moved, {shutil.copytree(one, tmp_path / "one-moved"): 0.5, two: 0.5})) == reference
    changes: list[tuple[dict[Path, float], dict[str, object]]] = [
        ({one: 0.5, two: 0.6}, {}),
        ({one: 0.5, two: 0.5}, {"merge_method": "linear"}),
        ({one: 0.5, two: 0.5}, {"merge_method": "ties"}),
        ({one: 0.5, two: 0.5}, {"merge_method": "ties", "merge_options": {"density": 0.3}}),
        ({one: 0.5, two: 0.5}, {"merge_method": "dare_linear"}),
        ({one: 0.5, two: 0.5}, {"merge_method": "dare_linear", "merge_options": {"seed": 1}}),
        ({one: 1.0, two: 1.0}, {"merge_method": "concat"}),
        ({one: 0.5, two: 0.5}, {"image_size": 24}),
        ({one: 0.5, two: 0.5}, {"base_model": str(other)}),
        ({one: 0.5, two: 0.5}, {"pooling": "cls"}),
        ({one: 0.5, two: 0.5}, {"normalize": True}),
        ({one: 0.5}, {}),
    ]
    others = [space(f"d{number}", recipe_of(base, *changed[:1], **changed[1])) for number, changed in enumerate(changes)]
    assert len({reference, *others}) == 1 + len(changes)


def test_recipe_id_is_the_same_for_the_same_content(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    one, two = save_adapter(tmp_path / "one", base, seed=1), save_adapter(tmp_path / "two", base, 27, seed=2)
    reference = gather(recipe_of(base, {one: 0.4, two: 0.6})).recipe_id
    assert gather(recipe_of(base, {two: 0.6, one: 0.4})).recipe_id == reference
    assert gather(recipe_of(base, {one: 0.6, two: 0.4})).recipe_id != reference


def test_vectors_do_not_depend_on_neighbours_or_padding(tmp_path: Path, some_images: list[Image.Image]) -> None:
    encoder = load_encoder(build(recipe_of(save_base(tmp_path / "base"), {}, merge_method="none"), tmp_path / "encoder"))
    together = encoder.embed(some_images[:19])
    assert np.array_equal(together, np.concatenate([encoder.embed([image]) for image in some_images[:19]]))
    assert encoder.embed([]).shape == (0, 32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_golden_vectors_hold_in_every_precision(tmp_path: Path, base_model: Path, precision: str) -> None:
    folder = build(recipe_of(base_model, {}, merge_method="none", image_size=56), tmp_path / "encoder")
    encoder = load_encoder(folder, precision=precision, check=False)
    difference = encoder.check_golden(folder)
    assert (difference == 0) == (precision == "float32")


def test_an_encoder_whose_weights_were_touched_refuses_to_work(tmp_path: Path) -> None:
    folder = build(recipe_of(save_base(tmp_path / "base"), {}, merge_method="none"), tmp_path / "encoder")
    save_base(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    says = rf"its files make vectors of space .{{12}}, but encoder.json says {read_description(folder).space_id}"
    with pytest.raises(EncoderError, match=says):
        load_encoder(folder)
    with pytest.raises(EncoderError, match="golden vectors: cpu in float32 differs by"):
        load_encoder(folder, check=False).check_golden(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_golden_vectors_that_are_not_finite_do_not_hold(precision: str, value: float) -> None:
    expected = np.ones((3, 4), np.float32)
    vectors = expected.copy()
    assert check(vectors, expected, precision, "a device") == 0
    vectors[1, 2] = value
    with pytest.raises(EncoderError, match=rf"golden vectors: a device in {precision} differs by (nan|inf)"):
        check(vectors, expected, precision, "a device")


IN_LITTLE_MEMORY = """
import sys
import numpy as np
from lora_embed import load_encoder
from lora_embed.errors import IncompleteRun
from lora_embed.images.isolate import limit_memory
encoder = load_encoder(sys.argv[1], batch_size=4096, check=False)
height, width = encoder.description.preprocessing.size
limit_memory(2**28)
try:
    encoder.embed_pixels(np.zeros((1, height, width, 3), np.uint8))
except IncompleteRun as error:
    print(error)
"""


@pytest.mark.slow
def test_a_batch_that_memory_does_not_hold_is_said(tmp_path: Path) -> None:
    """4,096 images of 112 pixels are 0.6 GB as float32; a quarter of a GB is left."""
    base = save_base(tmp_path / "base", "dinov2")
    folder = build(recipe_of(base, {}, merge_method="none", image_size=112), tmp_path / "encoder")
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.match(
        r"cpu: there is not enough memory for batches of 4096 images in float32 \(.*\)\. Set a smaller batch_size", said
    )


def test_build_never_writes_over_and_leaves_nothing_behind(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        build(recipe_of(base, {}, merge_method="none"), tmp_path / "taken")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(EncoderError, match=r"model\.safetensors: is not a whole safetensors file"):
        build(recipe_of(base, {}, merge_method="none"), tmp_path / "out" / "encoder")
    assert not (tmp_path / "out").exists()


def test_processor_that_gives_no_fixed_size_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "dinov2")
    path = base / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": False}))
    with pytest.raises(EncoderError, match="images of different sizes"):
        build(recipe_of(base, {}, merge_method="none"), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_same_adapter_twice_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    one = save_adapter(tmp_path / "one", base)
    with pytest.raises(ConfigError, match="is the same adapter as"):
        gather(recipe_of(base, {one: 0.5, shutil.copytree(one, tmp_path / "copy"): 0.5}))


def test_merge_report_names_shares_and_dropped_heads(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    one, two = save_adapter(tmp_path / "one", base, seed=1), save_adapter(tmp_path / "two", base, 27, seed=2)
    report = json.loads((build(recipe_of(base, {one: 0.5, two: 0.5}), tmp_path / "encoder") / "merge_report.json").read_text())
    (member,) = report["members"]
    assert [adapter["head_keys_dropped"] for adapter in member["adapters"]] == [["classifier.bias", "classifier.weight"]] * 2
    assert len(member["weights"]) == 6
    assert all(len(weight["shares"]) == 2 and weight["change"] > 0 for weight in member["weights"].values())


def test_bytes_are_embedded_as_a_run_decodes_them_and_may_kill_their_decoder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    encoder = load_encoder(build(recipe_of(base, {save_adapter(tmp_path / "one", base): 1.0}), tmp_path / "encoder"))
    opened = Image.open(io.BytesIO(png(2)))
    expected = encoder.embed([opened, opened])
    np.testing.assert_array_equal(encoder.embed([png(2), opened]), expected)
    np.testing.assert_array_equal(encoder.embed([png(2), png(2)]), expected)
    poisoned(monkeypatch, segfault=png(1))
    with pytest.raises(BadImage, match="killed by signal 11") as caught:
        encoder.embed([png(2), png(1)])
    assert caught.value.reason == "decoder_crashed"
    np.testing.assert_array_equal(encoder.embed([png(2), png(2)]), expected)


@pytest.mark.parametrize("tap", ["0~", "ABCDEF", "weight", "a.b"])
def test_a_tap_that_the_model_does_not_have_is_refused(tap: str) -> None:
    with pytest.raises(EncoderError, match=f"encoder.json: tap is '{tap}', expected the name of a module of Linear"):
        HiddenState(torch.nn.Linear(1, 1), tap)


def test_an_image_is_embedded_in_any_form(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = Recipe(base_model=str(base), adapters=(), merge_method="none")
    build_encoder(gather(recipe), tmp_path / "encoder", lambda _line: None)
    encoder = load_encoder(tmp_path / "encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    forms = encoder.embed([Image.fromarray(pixels), path.read_bytes(), path, str(path), pixels])
    assert len(np.unique(forms, axis=0)) == 1
    for one in (path, str(path), Image.fromarray(pixels), pixels, path.read_bytes()):
        with pytest.raises(ConfigError, match=r"embed takes a list of images, found one \w+. Write embed\(\[image\]\)"):
            encoder.embed(one)
    with pytest.raises(ConfigError, match=r"found an array of float64, \(40, 50, 3\)"):
        encoder.embed([pixels / 255.0])
    with pytest.raises(ConfigError, match="found dict"):
        encoder.embed([{}])
    with pytest.raises(ConfigError, match=r"gone.png: cannot be read as an image file \(No such file"):
        encoder.embed([tmp_path / "gone.png"])
