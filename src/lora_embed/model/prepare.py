"""A base's image processor and a recipe → the preprocessing, checked against that processor, and the golden images."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_embed.config.models import Recipe
from lora_embed.errors import EncoderError, ProcessorRefused
from lora_embed.images.arithmetic import name_arithmetic
from lora_embed.images.preprocess import Pixels, Preprocessing
from lora_embed.images.processors import from_processor
from lora_embed.model import golden
from lora_embed.model.base_files import Base
from lora_embed.model.encoder import golden_pixels
from lora_embed.model.processor import ERRORS, read_processor
from lora_embed.text import in_one_line

MOST_LARGE = 8192  # pixels along an edge of the large golden image
MOST_MOVED = 4.0  # of 255; 0.3 is usual, 2.3 was seen with images of 32 pixels, 4.7 with the filter "nearest"


def checked_preprocessing(base: Base, recipe: Recipe) -> tuple[Preprocessing, dict[str, Any]]:
    """The preprocessing read from the base's processor, checked against it on images of unusual sizes, and its settings.

    A class that exists for torchvision alone is not made; the rule for it is this package's own.
    """
    original = read_processor(base.folder)
    try:
        preprocessing, settings = from_processor(original.settings, recipe.image_size, recipe.decode)
    except ProcessorRefused as error:
        raise ProcessorRefused(f"{base.uri}: {error}") from None
    if original.made is not None:
        _compare(preprocessing, type(original.made), settings, base)
    return name_arithmetic(preprocessing), settings


def _compare(preprocessing: Preprocessing, kind: Any, settings: dict[str, Any], base: Base) -> None:
    """Raises EncoderError if the processor of this class with these settings makes something else of an image."""
    rng = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 333), (64, 64), (31, 200), (223, 225), (1, 7)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            expected = np.asarray(kind(**settings)(image)["pixel_values"][0])
        except ERRORS as error:
            raise EncoderError(
                f"{base.uri}: its {kind.__name__} cannot prepare an image of {width}×{height} pixels: {in_one_line(error)}. "
                "Correct its settings in the folder of the base, or name another base."
            ) from None
        ours = model_input(preprocessing, preprocessing.apply(image))
        if expected.shape != ours.shape or not np.abs(expected - ours).max() <= 1e-5:
            raise EncoderError(
                f"{base.uri}: its {kind.__name__} does more to a {width}×{height} image than resize, crop, rescale, "
                "normalise and pad by its settings, so it is not supported. Use another base or processor."
            )


def model_input(preprocessing: Preprocessing, pixels: Pixels) -> NDArray[np.float32]:
    """What an encoder gives its model for prepared pixels (height, width, channels): float32 (3, height, width)."""
    multiply, add = (np.array(values, np.float32).reshape(3, 1, 1) for values in (preprocessing.multiply, preprocessing.add))
    values = pixels.transpose(2, 0, 1).astype(np.float32)
    return (values[:3] * multiply + add) * (values[3:] if preprocessing.pad is not None else np.float32(1))


def golden_images(preprocessing: Preprocessing, base: Base) -> dict[str, bytes]:
    """The golden images; for `fast` also a large JPEG, whose pixels, decoded at a quarter, are compared with exact ones."""
    images = golden.make_images()
    if preprocessing.decode == "exact":
        return images
    edge = 4 * max(preprocessing.least_size(1, 1))
    if preprocessing.resize is None:
        raise EncoderError(f"{base.uri}: decode: fast has no effect with this processor. Set decode: exact in the recipe.")
    if edge > MOST_LARGE:
        raise EncoderError(
            f"{base.uri}: its images are so large that decode: fast would be checked with a JPEG of {edge}×{edge}, and at most "
            f"{MOST_LARGE}×{MOST_LARGE} is supported. Set decode: exact in the recipe."
        )
    large = golden.make_large(edge)
    exact = golden_pixels(large, replace(preprocessing, decode="exact")).astype(int)
    moved = float(np.abs(golden_pixels(large, preprocessing) - exact).mean())
    if not 0 < moved < MOST_MOVED:
        raise EncoderError(
            f"{base.uri}: with decode: fast, the pixels of a JPEG of {edge}×{edge} differ from exact ones by {moved:.2f} of "
            f"255 on average, expected more than 0 and less than {MOST_MOVED:g}. Set decode: exact in the recipe."
        )
    return dict(sorted((images | large).items()))
