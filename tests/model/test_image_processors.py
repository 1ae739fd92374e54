"""Image processors: each class of transformers gives the same model input as here, or is refused by its name."""

import ast
import json
import re
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

from jobs import ROOT
from lora_embed.config.models import Recipe
from lora_embed.errors import EncoderError
from lora_embed.images.decode import to_rgb
from lora_embed.images.preprocess import Joint, Preprocessing
from lora_embed.images.processors import REFUSED, TORCHVISION, from_processor
from lora_embed.model.base import load_headless
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.model.prepare import checked_preprocessing, model_input
from lora_embed.model.processor import read_processor
from lora_embed.model.transformers_private import processor_name_of
from models import SIZE, save_base
from processor_folders import compare, folder_of, made_by
from samples import encoded, noise
from short import slow_but, slow_but_every

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")
SIZES = (
    (1, 1), (7, 1), (1, 7), (2, 3), (64, 64), (223, 225), (225, 223), (224, 224), (500, 375), (375, 500), (31, 120),
    (120, 31), (97, 13), (13, 97), (640, 480), (333, 500), (256, 256), (255, 511), (5, 30), (41, 59),
)  # fmt: skip
FAMILIES = {
    name for model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if (name := processor_name_of(model_type)) is not None
}
EVERY = {names.get("torchvision") or names["pil"] for names in IMAGE_PROCESSOR_MAPPING_NAMES.values()}
QUICK = {f"{kind}ImageProcessor" for kind in ("ViT", "Levit", "MobileViT", "EfficientNet", "PoolFormer", "ImageGPT", "TextNet")}
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
    "superpoint": {"image_processor_type": "SuperPointImageProcessor", "size": {"height": 48, "width": 64}},
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


@pytest.mark.parametrize("name", slow_but(sorted(FAMILIES), QUICK.__contains__))
def test_the_processor_of_each_classification_family(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    """With the defaults of its class. A new family of transformers is equal, or fails here until it is refused by name."""
    base = folder_of(tmp_path / "base", {"image_processor_type": name})
    if name in NOT_SUPPORTED:
        with pytest.raises(EncoderError, match=rf"{name} .*, which is not supported\. Name another base"):
            checked_preprocessing(base, Recipe(base_model=str(base.folder), merge_method="none"))
    elif name in TORCHVISION:
        checked_preprocessing(base, Recipe(base_model=str(base.folder), merge_method="none"))  # compared below
    elif getattr(getattr(transformers, f"{name}Pil"), "is_dummy", False):  # SegFormer's, of transformers 5.21
        with pytest.raises(EncoderError, match=f"{name}', which this version of transformers has for torchvision alone"):
            compare(base, images)
    elif name in DIFFERENT_SIZES:
        with pytest.raises(EncoderError, match=rf"{name}, size .*gives images of different sizes. Set image_size"):
            compare(base, images)
        assert compare(base, images, 96).size == (96, 96)
    else:
        compare(base, images, most=3 if name == "DonutImageProcessor" else 60)  # of 2560×1920 pixels


@pytest.mark.parametrize("name", slow_but_every(4, HUB))
def test_settings_of_the_hub(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    compare(folder_of(tmp_path / "base", HUB[name]), images)


@pytest.mark.parametrize("name", slow_but_every(4, HUB))
def test_an_image_size_gives_images_of_that_size(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", HUB[name])
    image_size = 96 if name == "maskformer" else 84
    assert compare(base, images[-20:], image_size).size == (image_size, image_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EVERY - FAMILIES))
def test_every_other_processor_is_equal_or_refused_by_name(name: str, images: list[Image.Image], tmp_path: Path) -> None:
    """Those of models that take more than images, too: no traceback, and what is accepted is equal on all images."""
    base = folder_of(tmp_path / "base", {"image_processor_type": name})
    for image_size in (None, 96):
        recipe = Recipe(base_model=str(base.folder), merge_method="none", image_size=image_size)
        try:
            checked_preprocessing(base, recipe)
        except EncoderError as error:
            assert name in str(error)  # noqa: PT017 - it need not be raised
        else:
            assert name not in REFUSED
            if name not in TORCHVISION:
                compare(base, images, image_size, most=20)


def test_rules_for_classes_of_torchvision_are_those_that_the_docs_state(images: list[Image.Image], tmp_path: Path) -> None:
    """Pillow resizes where torchvision would; all else is by the class's rule, computed here anew."""

    def dinov3(image: Image.Image) -> NDArray[Any]:
        values = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR), np.float64) / 255
        return (values - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)

    def pp_lcnet(image: Image.Image) -> NDArray[Any]:
        scale = 256 / min(image.size)
        wide, high = (round(edge * scale) for edge in image.size)
        left, top = (wide - 224) // 2, (high - 224) // 2
        resized = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
        return ((np.asarray(resized, np.float64) / 255 - (0.406, 0.456, 0.485)) / (0.225, 0.224, 0.229))[:, :, ::-1]

    for name, rule in (("DINOv3ViTImageProcessorFast", dinov3), ("PPLCNetImageProcessor", pp_lcnet)):
        base = folder_of(tmp_path / name, {"image_processor_type": name, "crop_size": None, "do_convert_rgb": None})
        preprocessing, _ = checked_preprocessing(base, Recipe(base_model=str(base.folder), merge_method="none"))
        for image in images:
            found = model_input(preprocessing, preprocessing.apply(image))
            assert np.abs(found - rule(image).transpose(2, 0, 1)).max() <= 1e-5, (name, image.size)


@pytest.mark.parametrize("name", TORCHVISION)
def test_defaults_of_classes_of_torchvision_are_the_installed_ones(name: str) -> None:
    """By their source, since they cannot be imported without torchvision."""
    module = next(m for m, names in IMAGE_PROCESSOR_MAPPING_NAMES.items() if name in names.values())
    spec = find_spec(f"transformers.models.{module}")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / f"image_processing_{module}.py").read_text()
    body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    named = {"IMAGENET_DEFAULT_MEAN": [0.485, 0.456, 0.406], "IMAGENET_DEFAULT_STD": [0.229, 0.224, 0.225]}
    named |= {"IMAGENET_STANDARD_MEAN": [0.5] * 3, "IMAGENET_STANDARD_STD": [0.5] * 3, "PILImageResampling.BILINEAR": 2}
    written = {"rescale_factor": 1 / 255}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = ast.unparse(node.value)
            try:
                written[node.targets[0].id] = named[text] if text in named else ast.literal_eval(text)
            except ValueError:
                continue
    written["crop_size"] = {"height": 224, "width": 224} if written.get("crop_size") == 224 else None
    assert {key: written[key] for key in TORCHVISION[name]} == TORCHVISION[name]


@torch.inference_mode()
@pytest.mark.parametrize(
    "written",
    [
        {"image_processor_type": "SamImageProcessor", "size": {"longest_edge": SIZE}, "pad_size": SIZE},
        {"image_processor_type": "MobileViTImageProcessor", "size": 40, "crop_size": SIZE},
        {"image_processor_type": "DonutImageProcessor", "size": SIZE, "do_align_long_axis": True},
        {"image_processor_type": "EfficientNetImageProcessor", "size": SIZE, "rescale_offset": True},
    ],
    ids=lambda written: written["image_processor_type"],
)
def test_an_encoder_embeds_what_the_processor_gives_its_model(written: dict[str, Any], tmp_path: Path) -> None:
    """From the image to the vector, from the file that is saved, and together with another encoder."""
    base = save_base(tmp_path / "base")
    (base / "preprocessor_config.json").write_text(json.dumps(written))
    built = build_encoder(gather(Recipe(base_model=str(base), merge_method="none")), tmp_path / "out", lambda line: None)
    assert read_description(tmp_path / "out") == built
    encoder = load_encoder(tmp_path / "out")
    assert encoder.embed([]).shape == (0, built.dimension)
    processor, model = read_processor(base), load_headless(base, "base")
    settings = from_processor(processor.settings, None)[1]
    images = [noise(*size) for size in ((40, 60), (60, 40), (32, 32), (90, 31))]
    values = np.stack([made_by(type(processor.made), settings, image) for image in images])
    states = model(pixel_values=torch.tensor(values), output_hidden_states=True).hidden_states[-1].mean(dim=1).numpy()
    for found in (encoder.embed(images), encoder.embed([encoded(image) for image in images])):
        assert np.abs(found - states).max() <= 1e-5 * np.abs(states).max()
    plain = Preprocessing(resize=(8, 8), resample=2, crop=None, multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))
    joint = Joint(parts=(plain, built.preprocessing))
    prepared = np.stack([joint.apply(image) for image in images])
    assert prepared.shape[1:] == joint.shape
    assert np.array_equal(joint.split(prepared)[1], np.stack([built.preprocessing.apply(image) for image in images]))


def test_the_docs_name_each_class_with_a_reason_or_a_measurement() -> None:
    rows = [line for line in (ROOT / "docs" / "processors.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for name, reason in REFUSED.items():
        assert [row.endswith(f"| {reason} |") for row in rows if f"`{name}`" in row] == [True], name
    for name in TORCHVISION:
        assert any(re.match(rf"\| `{name}` \| \d", row) for row in rows), name
