"""Folders with an image processor's file, and the comparison of what it says with what its class makes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_embed.images.preprocess import Preprocessing
from lora_embed.images.processors import from_processor
from lora_embed.model.base_files import Base
from lora_embed.model.prepare import model_input
from lora_embed.model.processor import read_processor


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
    kind = type(processor.made)
    for image in images[:most]:
        expected = made_by(kind, settings, image)
        pixels = preprocessing.apply(image)
        assert pixels.shape == preprocessing.shape
        found = model_input(preprocessing, pixels)
        assert found.shape == expected.shape, image.size
        assert np.abs(found - expected).max() <= 1e-5, image.size
    return preprocessing
