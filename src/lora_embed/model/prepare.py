"""A base's image processor and a recipe → the preprocessing, checked against that processor, and the golden images."""

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from lora_embed.config.models import Recipe
from lora_embed.errors import EncoderError
from lora_embed.images.arithmetic import name_arithmetic
from lora_embed.images.preprocess import Preprocessing, from_processor
from lora_embed.model import golden
from lora_embed.model.base import read_processor
from lora_embed.model.base_files import Base
from lora_embed.model.encoder import golden_pixels

MOST_LARGE = 8192  # pixels along an edge of the large golden image
MOST_MOVED = 4.0  # of 255; 0.3 is usual, 2.3 was seen with images of 32 pixels, 4.7 with the filter "nearest"


def checked_preprocessing(base: Base, recipe: Recipe) -> tuple[Preprocessing, dict[str, Any]]:
    """The preprocessing read from the base's processor, checked against it on images of unusual sizes, and its settings."""
    original = read_processor(base.folder)
    preprocessing, settings = from_processor(original.to_dict(), recipe.image_size, recipe.decode)
    processor = type(original)(**settings)
    multiply, add = (np.array(values, np.float32).reshape(3, 1, 1) for values in (preprocessing.multiply, preprocessing.add))
    rng = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 333), (64, 64), (31, 200), (223, 225), (1, 7)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.asarray(processor(image)["pixel_values"][0])
        ours = preprocessing.apply(image).transpose(2, 0, 1).astype(np.float32) * multiply + add
        if expected.shape != ours.shape or np.abs(expected - ours).max() > 1e-5:
            raise EncoderError(
                f"{base.uri}: its {type(original).__name__} does more to a {width}×{height} image than resize, crop, rescale "
                "and normalise, so it is not supported. Use another base or processor."
            )
    return name_arithmetic(preprocessing), settings


def golden_images(preprocessing: Preprocessing, base: Base) -> dict[str, bytes]:
    """The golden images; for `fast` also a large JPEG, whose pixels, decoded at a quarter, are compared with exact ones."""
    images = golden.make_images()
    if preprocessing.decode == "exact":
        return images
    edge = 4 * max(preprocessing.least_size(1, 1))
    if preprocessing.resize is None or edge > MOST_LARGE:
        raise EncoderError(f"{base.uri}: decode: fast has no effect with this processor. Set decode: exact in the recipe.")
    large = golden.make_large(edge)
    exact = golden_pixels(large, replace(preprocessing, decode="exact")).astype(int)
    moved = float(np.abs(golden_pixels(large, preprocessing) - exact).mean())
    if not 0 < moved < MOST_MOVED:
        raise EncoderError(
            f"{base.uri}: with decode: fast, the pixels of a JPEG of {edge}×{edge} differ from exact ones by {moved:.2f} of "
            f"255 on average, expected more than 0 and less than {MOST_MOVED:g}. Set decode: exact in the recipe."
        )
    return dict(sorted((images | large).items()))
