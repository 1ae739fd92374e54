"""Preprocessing: pixels of the Hugging Face PIL processors bit for bit, their arithmetic as one multiply-add."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from lora_embed.config.models import Recipe
from lora_embed.errors import EncoderError
from lora_embed.images.preprocess import Arithmetic, Preprocessing, check_geometry
from lora_embed.images.processors import from_processor
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from models import save_base
from samples import noise

DINOV2 = {
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
PROCESSORS = {
    "vit": ViTImageProcessorPil(),
    "dinov2": BitImageProcessorPil(**DINOV2),
    "clip": CLIPImageProcessorPil(),
    "siglip": SiglipImageProcessorPil(),
    "nearest": ViTImageProcessorPil(resample=0, size={"height": 40, "width": 60}),
    "crop that pads": BitImageProcessorPil(
        **DINOV2 | {"size": {"shortest_edge": 21}, "crop_size": {"height": 34, "width": 47}}
    ),
    "crop alone": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 50, "width": 31}),
    "lanczos, no mean": ViTImageProcessorPil(resample=1, do_normalize=False, size={"height": 33, "width": 32}),
}
SIZES = [(500, 375), (333, 500), (64, 64), (200, 31), (225, 223), (7, 1), (1, 7), (224, 224), (256, 256), (30, 400)]


def with_size(processor: Any, image_size: int | None) -> tuple[Any, Preprocessing]:
    preprocessing, changed = from_processor(processor.to_dict(), image_size)
    return type(processor)(**changed), preprocessing


@pytest.mark.parametrize("image_size", [None, 70, 518])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processor_s_bit_for_bit(name: str, image_size: int | None) -> None:
    processor, preprocessing = with_size(PROCESSORS[name], image_size)
    for size in SIZES if image_size is None else SIZES[:3]:
        image = noise(*size)
        expected = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        found = preprocessing.apply(image)
        assert found.dtype == np.uint8
        assert found.shape == (*preprocessing.size, 3)
        np.testing.assert_array_equal(found.transpose(2, 0, 1), np.asarray(expected), err_msg=f"{size}")
    if image_size is not None:
        assert preprocessing.size == (image_size, image_size)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.integers(8, 64), st.integers(0, 5))
def test_any_size_crop_and_filter(width: int, height: int, crop_height: int, crop_width: int, edge: int, resample: int) -> None:
    changes = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop_height, "width": crop_width}}
    processor, preprocessing = with_size(CLIPImageProcessorPil(**changes, resample=resample), None)
    expected = processor(noise(width, height), do_rescale=False, do_normalize=False)["pixel_values"][0]
    np.testing.assert_array_equal(preprocessing.apply(noise(width, height)).transpose(2, 0, 1), np.asarray(expected))


@pytest.mark.parametrize("name", PROCESSORS)
def test_multiply_and_add_are_rescale_and_normalise(name: str) -> None:
    processor, preprocessing = with_size(PROCESSORS[name], None)
    image = noise(300, 200)
    expected = np.asarray(processor(image)["pixel_values"][0])
    multiply, add = (np.array(values).reshape(3, 1, 1) for values in (preprocessing.multiply, preprocessing.add))
    np.testing.assert_allclose(preprocessing.apply(image).transpose(2, 0, 1) * multiply + add, expected, rtol=0, atol=1e-6)


def test_rescale_and_normalise_can_be_off() -> None:
    base = {
        "size": {"height": 8, "width": 8},
        "image_mean": [1.0, 2.0, 3.0],
        "image_std": [2.0, 4.0, 8.0],
        "rescale_factor": 0.5,
    }
    for rescale, normalise, multiply, add in (
        (True, True, (0.25, 0.125, 0.0625), (-0.5, -0.5, -0.375)),
        (False, True, (0.5, 0.25, 0.125), (-0.5, -0.5, -0.375)),
        (True, False, (0.5, 0.5, 0.5), (0.0, 0.0, 0.0)),
        (False, False, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    ):
        preprocessing, _ = from_processor(base | {"do_rescale": rescale, "do_normalize": normalise}, None)
        assert (preprocessing.multiply, preprocessing.add) == (multiply, add)


def test_an_image_size_keeps_the_proportion_of_resize_and_crop() -> None:
    preprocessing, changed = from_processor(DINOV2 | {"rescale_factor": 1 / 255}, 112)
    assert (preprocessing.resize, preprocessing.crop) == (128, (112, 112))
    assert changed["size"] == {"shortest_edge": 128}
    assert changed["crop_size"] == {"height": 112, "width": 112}
    assert DINOV2["size"] == {"shortest_edge": 256}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, r"X, size {'shortest_edge': 256}, gives images of different sizes\. Set image_size"),
        ({"do_resize": False, "do_center_crop": False}, "gives images of different sizes"),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}, "do_center_crop": False, "do_pad": True}, "different sizes"),
        (
            {"size": {"longest_edge": 512}},
            "expected height and width, or shortest_edge; image_size in the recipe would set them",
        ),
        ({"size": {"max_height": 9, "max_width": 9}}, "expected height and width, or shortest_edge"),
    ],
)
def test_processors_that_no_fixed_size_follows_from(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        from_processor(DINOV2 | {"rescale_factor": 1 / 255, "image_processor_type": "X"} | changes, None)


def test_what_was_usual_before_there_was_a_choice_is_not_said() -> None:
    """The gate `processor` compares what encoders say."""
    exact = Preprocessing(resize=256, resample=3, crop=(224, 224), multiply=(1.0, 2.0, 3.0), add=(0.0, 0.5, 1.0))
    assert exact.settings().keys() == {"resize", "resample", "crop", "multiply", "add"}
    assert replace(exact, pad=(256, 256)).settings()["pad"] == (256, 256)
    assert replace(exact, fit="rounded", multiple=8, channels="BGR").settings().keys() - exact.settings().keys() == {
        "fit", "multiple", "channels",
    }  # fmt: skip
    assert replace(exact, decode="fast").settings()["decode"] == "fast"
    assert replace(exact, arithmetic=Arithmetic(name="pixels-0")).settings()["arithmetic"] == "pixels-0"


def test_fast_is_an_encoder_and_a_space_of_its_own_with_a_large_golden_image(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    ids = set()
    for decode in ("exact", "fast"):
        recipe = Recipe.model_validate({"base_model": str(base), "merge_method": "none", "decode": decode})
        built = build_encoder(gather(recipe), tmp_path / decode, lambda line: None)
        assert read_description(tmp_path / decode) == built
        assert built.preprocessing.decode == decode
        ids |= {built.space_id, built.recipe_id}
        assert (tmp_path / decode / "golden" / "large.jpg").exists() == (decode == "fast")
    assert len(ids) == 4
    weights = [(tmp_path / decode / "model.safetensors").read_bytes() for decode in ("exact", "fast")]
    assert weights[0] == weights[1]
    load_encoder(tmp_path / "fast")
    about = json.loads((tmp_path / "fast" / "encoder.json").read_text())
    del about["preprocessing"]["decode"]  # decoded exactly, the large image has another vector
    (tmp_path / "fast" / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(EncoderError, match=r"pixels: .* 3 of 47 test images .*jpeg-large.jpg fast to 18"):
        load_encoder(tmp_path / "fast", check=False).check_golden(tmp_path / "fast")
    with pytest.raises(EncoderError, match="its files make vectors of space"):
        load_encoder(tmp_path / "fast")


def test_fast_is_refused_where_it_saves_nothing_or_is_far_off(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "dinov2")
    settings = json.loads((base / "preprocessor_config.json").read_text())
    recipe = Recipe.model_validate({"base_model": str(base), "merge_method": "none", "decode": "fast"})
    for changes, message in (
        ({"do_resize": False}, "decode: fast has no effect with this processor"),
        ({"resample": 0}, r"with decode: fast, the pixels of a JPEG of 320×320 differ from exact ones by \d+\.\d+ of 255"),
    ):
        (base / "preprocessor_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(EncoderError, match=message):
            build_encoder(gather(recipe), tmp_path / "out", lambda line: None)


LIKE = Preprocessing(resize=(40, 60), resample=3, crop=None, multiply=(1.0, 2.0, 3.0), add=(0.0, 0.5, 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": "within"}, "images of different sizes"),
        ({"fit": "longest"}, r"preprocessing.resize is \(40, 60\), which does not go with fit 'longest'"),
        (
            {"fit": "thumbnail", "resize": 40, "crop": (8, 8)},
            "resize is 40, which does not go with fit 'thumbnail'",
        ),
        (
            {"fit": "rounded", "resize": None, "crop": (8, 8)},
            "resize is None, which does not go with fit 'rounded'",
        ),
        ({"pad": (40, 59)}, "pads images to 40×59 pixels, but some may be larger than that"),
        ({"pad": (99, 99), "resize": 40}, "pads images to 99×99 pixels, but some may be larger than that"),
        ({"pad": (99, 99), "fit": "longest", "resize": 40, "multiple": 7}, "multiples of 7, which needs a crop"),
        ({"pad": (99, 99), "fit": "within", "resize": (40, 100)}, "but some may be larger than that"),
        ({"pad": (40, 20_000)}, "an edge of 20000 pixels"),
        ({"multiple": 0}, "an edge of 0 pixels"),
        ({"multiple": 32}, "the edges after the resize"),
        ({"resize": 0, "crop": (8, 8)}, "an edge of 0 pixels"),
    ],
)
def test_a_geometry_that_no_processor_has_is_refused(changes: dict[str, Any], message: str) -> None:
    """An encoder.json may come from a stranger: its images must have one size, and room in their padding."""
    with pytest.raises(ValueError, match=message):
        check_geometry(replace(LIKE, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"pad": (40, 60)}, {"pad": (99, 60)}, {"fit": "longest", "resize": 40, "pad": (40, 40)},
        {"fit": "within", "resize": (40, 90), "pad": (90, 90)}, {"fit": "within", "resize": (40, 90), "crop": (8, 8)},
        {"fit": "rounded", "resize": 40, "multiple": 8, "crop": (8, 8), "pad": (9, 8)}, {"fit": "aligned_thumbnail"},
    ],
)  # fmt: skip
@settings(max_examples=30)
@given(st.integers(1, 120), st.integers(1, 120))
def test_every_image_has_the_shape_that_its_geometry_says(changes: dict[str, Any], width: int, height: int) -> None:
    preprocessing = replace(LIKE, **changes)
    check_geometry(preprocessing)
    assert preprocessing.apply(noise(width, height)).shape == preprocessing.shape


def test_no_edge_is_rounded_down_to_nothing() -> None:
    """Where the processors of transformers fail: an edge of an image that is very long becomes one pixel."""
    for fit, resize in (("longest", 40), ("within", (30, 40))):
        preprocessing = replace(LIKE, fit=fit, resize=resize, pad=(40, 40))
        assert preprocessing.resized_sizes(1000, 1) == [(40, 1)]
        assert preprocessing.resized_sizes(1, 1000) == [(1, 40)]
        assert preprocessing.apply(noise(1000, 1))[:, :, 3].sum() == 40


def test_padding_is_marked_in_a_fourth_channel() -> None:
    pixels = replace(LIKE, fit="longest", resize=8, pad=(8, 10)).apply(noise(20, 10))
    assert pixels.shape == (8, 10, 4)
    assert pixels[:4, :8, 3].all()
    assert pixels[:4, :8, :3].any()
    assert not pixels[4:].any()
    assert not pixels[:, 8:].any()
