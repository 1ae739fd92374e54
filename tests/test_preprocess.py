"""Preprocessing: pixels of the Hugging Face PIL processors bit for bit, their arithmetic as one multiply-add."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from lora_embed.errors import EncoderError
from lora_embed.model.preprocess import Preprocessing, from_processor
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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.integers(8, 64))
def test_any_size_and_crop(width: int, height: int, crop_height: int, crop_width: int, edge: int) -> None:
    crop = {"height": crop_height, "width": crop_width}
    processor, preprocessing = with_size(CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop), None)
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
        ({"do_center_crop": False}, r"\(X, size {'shortest_edge': 256}\) gives images of different sizes; set image_size"),
        ({"do_resize": False, "do_center_crop": False}, "gives images of different sizes"),
        ({"do_pad": True}, r"\(X\) pads images; that is not supported"),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}}, "is neither height and width nor a shortest edge"),
        ({"size": {"longest_edge": 512}}, "is neither height and width nor a shortest edge"),
        ({"size": {"max_height": 9, "max_width": 9}}, "is neither height and width nor a shortest edge"),
    ],
)
def test_processors_that_no_fixed_size_follows_from(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        from_processor(DINOV2 | {"rescale_factor": 1 / 255, "image_processor_type": "X"} | changes, None)
