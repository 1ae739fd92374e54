"""Files of image processors as people have them: read as transformers reads them, or refused with what is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.errors import EncoderError
from lora_embed.images.preprocess import Preprocessing
from lora_embed.images.processors import from_processor
from lora_embed.model.base_files import find_base
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
from lora_embed.model.prepare import checked_preprocessing
from lora_embed.model.processor import read_processor
from models import SIZE, save_adapter, save_base
from processor_folders import compare, folder_of
from samples import noise

VIT = {"image_processor_type": "ViTImageProcessor"}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


def of(kind: str, **settings: Any) -> dict[str, Any]:
    return {"image_processor_type": f"{kind}ImageProcessor"} | settings


def prepared(folder: Path, written: Any, model_type: str = "vit", image_size: int | None = None) -> Preprocessing:
    """The preprocessing that a build would use."""
    base = folder_of(folder, None, model_type, preprocessor_config=written)
    recipe = Recipe(base_model=str(base.folder), merge_method="none", image_size=image_size)
    return checked_preprocessing(base, recipe)[0]


def test_a_class_of_torchvision_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    for written, model_type in (({"image_processor_type": "RfDetrImageProcessorFast"}, "vit"), ({"size": 40}, "rf_detr")):
        base = folder_of(tmp_path / "base", written, model_type)
        with pytest.raises(EncoderError, match="RfDetrImageProcessor exists in transformers for torchvision alone"):
            read_processor(base.folder)


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ({"image_mean": 0.5, "image_std": 0.25}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
        ({"resample": "bicubic"}, {"resample": 3}),
        ({"resample": "PILImageResampling.LANCZOS"}, {"resample": 1}),
        ({"resample": "BOX"}, {"resample": 4}),
        ({"resample": 3.0}, {"resample": 3}),
        ({"size": 64}, {"size": {"height": 64, "width": 64}}),
        ({"size": [32, 48]}, {"size": {"height": 32, "width": 48}}),
        (CLIP | {"size": 40, "crop_size": 32}, CLIP),
        (CLIP | {"crop_size": [32, 32], "image_processor_type": "CLIPImageProcessorFast"}, CLIP),
        ({"feature_extractor_type": "ViTFeatureExtractor", "image_processor_type": None}, {}),
        ({"image_processor_type": "ViTImageProcessorPil"}, {}),
        ({"image_processor_type": None}, {}),  # by the model's type
        ({"do_rescale": False, "rescale_factor": None}, {"do_rescale": True, "rescale_factor": 1.0}),
        (
            {
                "image_processor_type": "DINOv3ViTImageProcessor",
                "size": 40,
                "image_mean": 0.5,
                "image_std": 0.5,
                "resample": "box",
            },
            {"size": {"height": 40, "width": 40}, "resample": 4},
        ),
    ],
)
def test_settings_as_people_have_them(written: dict[str, Any], same: dict[str, Any], tmp_path: Path) -> None:
    """Each is what the same settings in full are, and what transformers' class makes of them, where it takes them."""
    read = []
    for name, settings in (("written", written), ("same", same)):
        settings = {key: value for key, value in (VIT | settings).items() if value is not None}
        read.append(prepared(tmp_path / name, settings))
    assert read[0] == read[1]


def test_a_processor_config_holds_the_image_processor(tmp_path: Path) -> None:
    """As transformers takes it: before preprocessor_config.json."""
    nested = {"processor_class": "CLIPProcessor", "image_processor": CLIP}
    for name, written in (("alone", None), ("both", VIT)):
        base = folder_of(tmp_path / name, written, processor_config=nested)
        assert compare(base, [noise(50, 40)]).crop == (32, 32)
    nested = {"image_processor": of("DINOv3ViT", size=48)}
    base = folder_of(tmp_path / "without torchvision", VIT, processor_config=nested)
    assert from_processor(read_processor(base.folder).settings, None)[0].size == (48, 48)
    base = folder_of(tmp_path / "flat", VIT, processor_config={"processor_class": "CLIPProcessor"})
    assert compare(base, [noise(50, 40)]).size == (224, 224)


WRONG: list[tuple[Any, str]] = [
    (VIT | {"resample": "cubic-ish"}, "ViTImageProcessor has resample 'cubic-ish', expected a filter of Pillow (nearest, "),
    (VIT | {"resample": 9}, "has resample '9', expected a filter"),
    (VIT | {"image_mean": [0.5]}, "has image_mean (0.5,), expected one number or three. Correct the image processor's file"),
    (VIT | {"image_mean": "grey"}, "has image_mean 'grey', expected a number"),
    (VIT | {"image_std": 0}, "has a 0 in image_std 0, by which pixels are divided"),
    (VIT | {"image_std": float("nan")}, "has image_std 'nan', expected a number"),
    (VIT | {"size": "big"}, "preprocessor_config.json: its settings cannot be used by ViTImageProcessor: Could not convert"),
    (VIT | {"size": {"longest_edge": 40}}, "expected height and width, or shortest_edge; image_size in the recipe would"),
    (VIT | {"size": 20_000}, "gives images with an edge of 20000 pixels, expected 1 to 16,384"),
    (VIT | {"do_pad": True, "pad_size": 100}, "pads images to 100×100 pixels, but some may be larger"),
    (VIT | {"do_resize": False}, "gives images of different sizes. Set image_size"),
    (CLIP | {"crop_size": {"shortest_edge": 20}}, "has crop_size {'shortest_edge': 20}, expected height and width"),
    (of("VideoMAE"), "VideoMAEImageProcessor prepares videos, which is not supported. Name another base"),
    (of("GLPN"), "GLPNImageProcessor gives each image a size of its own, whatever its settings say"),
    (of("My"), "its image processor is 'MyImageProcessor', which this version of transformers does not have. Install a newer"),
    ({"image_processor_type": "AutoModel"}, "its image processor is 'AutoModel', which this version of transformers does not"),
    ({"feature_extractor_type": "WhisperFeatureExtractor"}, "its image processor is 'WhisperImageProcessor', which this"),
    (of("Yolos"), "gives images of different sizes. Set image_size"),
    (of("Donut", do_pad=False), "has do_pad false, expected true"),
    (of("Donut", do_center_crop=True, crop_size=9), "has do_center_crop true, expected false"),
    (of("ConvNext", size=224, crop_pct=0), "has crop_pct 0, expected a number above 0"),
    (of("ConvNext", size={"height": 9, "width": 9}), "has size {'height': 9, 'width': 9}, expected a shortest_edge"),
    (of("DPT", size={"shortest_edge": 9}), "has size {'shortest_edge': 9}, expected a height"),
    (of("DPT", keep_aspect_ratio=True), "gives images of different sizes. Set image_size"),
    (of("PoolFormer", crop_pct=1e-9), "an edge of 224000000000 pixels, expected 1 to 16,384"),
    (of("PPLCNet", size_divisor="x"), "has size_divisor 'x', expected a number"),
    (of("PPLCNet", size_divisor=-8), "has size_divisor -8, expected a number above 0"),
    (of("PPLCNet", resize_short=[9]), "has resize_short '[9]', expected a number"),
    (of("DINOv3ViT", size={"height": "a", "width": 9}), "has height 'a', expected a number"),
    (of("DINOv3ViT", size=True), "has height 'True', expected a number"),
    (of("DINOv3ViT", size=1e308), "expected 1 to 16,384"),
    (of("DINOv3ViT", size="9"), "has size '9', expected the lengths of edges"),
    (of("DINOv3ViT", resample=[]), "has resample '[]', expected a filter"),
    (of("DINOv3ViT", rescale_factor={}), "has rescale_factor '{}', expected a number"),
    (of("DINOv3ViT", do_center_crop=True), "has crop_size {}, expected height and width"),
    ({"video_processor_type": "VivitVideoProcessor"}, "has no image_processor_type, and transformers takes none"),
    ({"image_processor_type": 7}, "its image processor is '7', which this version"),
    ({"feature_extractor_type": ["x"]}, "which this version of transformers does not have"),
    ([1], "holds a list, expected a JSON object"),
    ("{", "preprocessor_config.json: is not valid JSON (Expecting property name"),
]


@pytest.mark.parametrize(("written", "says"), WRONG)
def test_processors_that_are_refused(written: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=re.escape(says)) as caught:
        prepared(tmp_path / "base", written)
    assert str(tmp_path / "base") in str(caught.value)


def test_a_file_without_a_type_is_refused_where_transformers_takes_none_by_itself(tmp_path: Path) -> None:
    assert prepared(tmp_path / "base", {"size": 32}, "dinov2").size == (224, 224)
    with pytest.raises(EncoderError, match="has no image_processor_type, and transformers takes none for a model of"):
        prepared(tmp_path / "base", {"size": 32}, "dinov2_with_registers")


def test_an_image_size_that_a_processor_rounds_is_refused_with_the_right_one(tmp_path: Path) -> None:
    written = {"image_processor_type": "MaskFormerImageProcessor"}
    assert prepared(tmp_path / "base", written, image_size=128).size == (128, 128)
    with pytest.raises(
        EncoderError, match=r"rounds image_size, which is 100, to images of 128×128 pixels. Set image_size: 128"
    ):
        prepared(tmp_path / "base", written, image_size=100)


def test_a_folder_without_an_image_processor_names_the_file_that_is_missing(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"has neither preprocessor_config.json nor .* Save the image processor there"):
        find_base(str(base), None)
    (base / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(EncoderError, match=r"neither in preprocessor_config.json nor as image_processor in processor_config"):
        read_processor(base)
    (base / "processor_config.json").unlink()
    for config in ({"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5]}}, {"model_type": "timm_wrapper"}):
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(EncoderError, match=r"is a model of the library timm, .* Name the same model in the form"):
            find_base(str(base), None)


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ("{", "could not be compared with the base's. The build uses the base's .*is not valid JSON"),
        ("[1]", "could not be compared"),
        ('{"size": 32}', "could not be compared with the base's. The build uses the base's .*has no image_processor_type"),
        (json.dumps(VIT | {"size": {"shortest_edge": SIZE}}), "could not be compared with .*gives images of different sizes"),
        (json.dumps({"image_processor_type": "SamImageProcessor"}), "prepares images in another way than the base's, which is"),
        (json.dumps({"image_processor_type": "ImageGPTImageProcessor"}), "could not be compared .*the number of a colour"),
        (json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}), "could not be compared"),
        (json.dumps(VIT | {"size": SIZE}), ""),
        ("folder", "could not be compared"),
        ("link", "could not be compared with the base's. The build uses the base's .*is a link"),
    ],
)
def test_a_processor_beside_an_adapter_never_stops_a_build(beside: str, says: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, 3)
    file = adapter / "preprocessor_config.json"
    if beside == "folder":
        file.mkdir()
    elif beside == "link":
        file.symlink_to(base / "preprocessor_config.json")
    else:
        file.write_text(beside)
    said: list[str] = []
    recipe = Recipe(base_model=str(base), adapters=(AdapterSpec(path=str(adapter)),))
    build_encoder(gather(recipe), tmp_path / "out", said.append)
    notes = [line for line in said if line.startswith("note: ")]
    assert len(notes) == (1 if says else 0), said
    assert not says or (f"{adapter} holds a preprocessor_config.json" in notes[0])
    if says:
        assert re.search(says, notes[0]), notes[0]
        assert not re.search(r"another base|in the recipe|Correct|Save ", notes[0]), "the build does not depend on that file"
