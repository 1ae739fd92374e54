"""Image processors: each class of transformers gives the same model input as here, or is refused by its name."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import EncoderError
from lora_embed.images.decode import BadImage, decode_image, to_rgb
from lora_embed.images.preprocess import Joint, Preprocessing, check_geometry, decoding
from lora_embed.images.processors import REFUSED, TORCHVISION, from_processor
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import Base, find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.model.prepare import checked_preprocessing, model_input
from lora_embed.model.processor import read_processor
from lora_embed.model.transformers_private import processor_name_of
from models import SIZE, save_adapter, save_base
from samples import encoded, noise

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")
SIZES = (
    (1, 1), (7, 1), (1, 7), (2, 3), (64, 64), (223, 225), (225, 223), (224, 224), (500, 375), (375, 500), (31, 120),
    (120, 31), (97, 13), (13, 97), (640, 480), (333, 500), (256, 256), (255, 511), (5, 30), (41, 59),
)  # fmt: skip
FAMILIES = {
    name for model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if (name := processor_name_of(model_type)) is not None
}
EVERY = {names.get("torchvision") or names["pil"] for names in IMAGE_PROCESSOR_MAPPING_NAMES.values()}
# The processors of classification families that are not supported; their models take no images alone, or need timm.
NOT_SUPPORTED = {"ImageGPTImageProcessor", "PerceiverImageProcessor", "Siglip2ImageProcessor", "TimmWrapperImageProcessor"}
DIFFERENT_SIZES = {"TextNetImageProcessor"}  # supported with image_size
# Settings of files on the hub that differ from the class's defaults in what they exercise.
HUB: dict[str, dict[str, Any]] = {
    "beit": {"feature_extractor_type": "BeitFeatureExtractor", "size": 256, "do_center_crop": True, "crop_size": 224},
    "dinov2": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    "efficientnet": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 224, "width": 224}, "resample": 0,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.478, 0.473, 0.474],
    },
    "efficientnet offset": {
        "image_processor_type": "EfficientNetImageProcessor", "size": 64, "rescale_offset": True, "rescale_factor": 1 / 127.5,
        "do_normalize": False, "include_top": False, "do_center_crop": True, "crop_size": 48,
    },
    "efficientnet top alone": {
        "image_processor_type": "EfficientNetImageProcessor", "size": 64, "do_normalize": False, "image_std": [0.5, 0.4, 0.3],
    },
    "levit": {"feature_extractor_type": "LevitFeatureExtractor", "size": 224},
    "levit square": {"image_processor_type": "LevitImageProcessor", "size": {"height": 60, "width": 50}},
    "mobilevit": {"feature_extractor_type": "MobileViTFeatureExtractor", "size": 288, "resample": 2, "crop_size": 256},
    "mobilevit normalised": {"image_processor_type": "MobileViTImageProcessor", "do_normalize": True, "size": 80},
    "poolformer": {"feature_extractor_type": "PoolFormerFeatureExtractor", "size": 224, "crop_pct": 0.95, "resample": 3},
    "poolformer square": {"image_processor_type": "PoolFormerImageProcessor", "size": {"height": 70, "width": 70}},
    "poolformer oblong": {"image_processor_type": "PoolFormerImageProcessor", "size": {"height": 270, "width": 240}},
    "textnet": {"image_processor_type": "TextNetImageProcessor", "size": 100, "do_center_crop": True, "crop_size": 96},
    "donut": {"feature_extractor_type": "DonutFeatureExtractor", "size": [120, 160]},
    "donut aligned": {"image_processor_type": "DonutImageProcessor", "size": [120, 160], "do_align_long_axis": True},
    "donut wide": {"image_processor_type": "DonutImageProcessor", "size": [160, 120], "do_align_long_axis": True},
    "dpt": {"image_processor_type": "DPTImageProcessor", "size": 100, "ensure_multiple_of": 14},
    "sam": {"image_processor_type": "SamImageProcessor", "size": {"longest_edge": 90}, "pad_size": {"height": 90, "width": 96}},
    "padded square": {"image_processor_type": "ViTImageProcessor", "size": 50, "do_pad": True, "pad_size": 64},
    "padded crop": {"image_processor_type": "CLIPImageProcessor", "size": 50, "crop_size": 40, "do_pad": True, "pad_size": 64},
    "padded detr": {
        "image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 60, "longest_edge": 100},
        "do_pad": True, "pad_size": {"height": 100, "width": 100},
    },
    "cropped within": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 60, "longest_edge": 100}, "crop_size": 56,
    },
    "maskformer": {"image_processor_type": "MaskFormerImageProcessor", "size": {"height": 100, "width": 70}},
}  # fmt: skip


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """60 images of odd sizes and all modes, as RGB: how modes are converted is not the processor's matter."""
    made = []
    for number in range(60):
        size, mode = SIZES[number % len(SIZES)], MODES[(number + number // len(SIZES) * 3) % len(MODES)]
        image = noise(*size, seed=number)
        if mode == "I;16":
            wide = np.random.default_rng(number).integers(0, 2**16, size[::-1], dtype=np.uint16)
            image = Image.fromarray(wide)
        elif mode in ("LA", "RGBA"):
            image.putalpha(Image.fromarray(np.random.default_rng(number).integers(0, 256, size[::-1], dtype=np.uint8)))
            image = image.convert(mode)
        else:
            image = image.convert(mode)
        assert image.mode == mode
        made.append(to_rgb(image))
    return made


def folder_of(folder: Path, written: dict[str, Any] | None, model_type: str = "vit", **files: Any) -> Base:
    """A model's folder without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if written is not None:
        files["preprocessor_config"] = written
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return Base(uri=str(folder), folder=folder, content_hash="")


def made_by(kind: type, settings: dict[str, Any], image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(kind(**settings)(image)["pixel_values"][0])


def compare(base: Base, images: list[Image.Image], image_size: int | None = None, most: int = 60) -> Preprocessing:
    """Raises AssertionError unless the class itself makes the same of the images."""
    processor = read_processor(base.folder)
    preprocessing, settings = from_processor(processor.settings, image_size)
    check_geometry(preprocessing)
    kind = type(processor.made)
    for image in images[:most]:
        expected = made_by(kind, settings, image)
        pixels = preprocessing.apply(image)
        assert pixels.shape == preprocessing.shape
        found = model_input(preprocessing, pixels)
        assert found.shape == expected.shape, image.size
        assert np.abs(found - expected).max() <= 1e-5, image.size
    return preprocessing


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_processor_of_each_classification_family(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    """With the defaults of its class. A new family of transformers is equal, or fails here until it is refused by name."""
    base = folder_of(tmp_path / "base", {"image_processor_type": name})
    if name in NOT_SUPPORTED:
        with pytest.raises(EncoderError, match=rf"{name} .*, which is not supported\. Name another base"):
            checked_preprocessing(base, Recipe(base_model=str(base.folder), merge_method="none"))
    elif name in TORCHVISION:
        checked_preprocessing(base, Recipe(base_model=str(base.folder), merge_method="none"))  # compared below
    elif name in DIFFERENT_SIZES:
        with pytest.raises(EncoderError, match=rf"{name}, size .*gives images of different sizes. Set image_size"):
            compare(base, images)
        assert compare(base, images, 96).size == (96, 96)
    else:
        compare(base, images, most=3 if name == "DonutImageProcessor" else 60)  # of 2560×1920 pixels


@pytest.mark.parametrize("name", HUB)
def test_settings_of_the_hub(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    compare(folder_of(tmp_path / "base", HUB[name]), images)


@pytest.mark.parametrize("name", HUB)
def test_an_image_size_gives_images_of_that_size(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", HUB[name])
    image_size = 96 if name == "maskformer" else 84
    assert compare(base, images[-20:], image_size).size == (image_size, image_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EVERY - FAMILIES))
def test_every_other_processor_is_equal_or_refused_by_name(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    """Those of models that take more than images, too: no traceback, and what is accepted is equal on all images."""
    base = folder_of(tmp_path / "base", {"image_processor_type": name})
    accepted = False
    for image_size in (None, 96):
        recipe = Recipe(base_model=str(base.folder), merge_method="none", image_size=image_size)
        try:
            checked_preprocessing(base, recipe)
        except EncoderError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            accepted = True
            if name not in TORCHVISION:
                compare(base, images, image_size, most=20)
    assert accepted != (name in REFUSED) or not accepted
