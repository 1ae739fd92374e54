"""The image processor's resize and crop on uint8, by Pillow alone; its rescaling as one multiply-add for the device.

So decode workers need neither torch nor transformers, and pixels travel as bytes. The pixels equal those of the Hugging Face
PIL processor bit for bit: `build_encoder` checks that for every encoder.
"""

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_embed.errors import EncoderError

Pixels = NDArray[np.uint8]
Decoding = Literal["exact", "fast"]
Box = tuple[float, float, float, float]
PILLOW_13 = "pillow-13"  # decodes and resizes like Pillow 13.0.0; the arithmetic of encoders that do not name theirs


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The name of the arithmetic that computes pixels, with test hashes from the build of the encoder: see `arithmetic`."""

    name: str = PILLOW_13
    pixels: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)  # (path, hash of a test image's pixels)
    libraries: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)  # (name, version)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes a model's input: resize, centre crop, then `pixel · multiply + add` for each channel."""

    resize: tuple[int, int] | int | None  # (height, width), or the shorter edge
    resample: int  # Pillow's filter number
    crop: tuple[int, int] | None  # (height, width)
    multiply: tuple[float, float, float]
    add: tuple[float, float, float]
    decode: Decoding = "exact"  # fast: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still large enough
    arithmetic: Arithmetic = Arithmetic()

    def settings(self) -> dict[str, Any]:
        """The settings that are hashed and written. `decode` and `arithmetic` are left out at their oldest values.

        Older encoders did not write these two, and must stay equal to newer ones with the same settings.
        """
        settings = asdict(self) | {"arithmetic": self.arithmetic.name}
        usual = {"decode": "exact", "arithmetic": PILLOW_13}
        return {key: value for key, value in settings.items() if key not in usual or value != usual[key]}

    @property
    def parts(self) -> tuple["Preprocessing", ...]:
        """This preprocessing alone; a `Joint` has several."""
        return (self,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3) of every prepared image."""
        return (*self.size, 3)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every prepared image."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.resize, tuple)
        return self.resize

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the resize, rounded like in the Hugging Face processors."""
        if self.resize is None:
            return width, height
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        short, long = min(width, height), max(width, height)
        longer = int(self.resize * long / short)
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        """The smallest (width, height) that `fast` may decode an image to: twice its size after the resize, turned or not."""
        if isinstance(self.resize, tuple):
            width = height = max(self.resize)
        else:
            width, height = self.resized_size(width, height)
        return 2 * width, 2 * height

    def apply(self, image: Image.Image, size: tuple[int, int] | None = None, part: Box | None = None) -> Pixels:
        """An RGB image → uint8 pixels (height, width, 3).

        For an image that was decoded smaller, `size` is its whole (width, height) and `part` the box that it fills.
        """
        # The whole image is resized, also the part that the crop removes: Pillow 13 orders its two passes by their cost, and
        # another order gives other bits. It is also resized to an equal size: like the processor, Pillow then copies it.
        if self.resize is not None:
            target = self.resized_size(*(size or image.size))
            image = image.resize(target, Image.Resampling(self.resample), part)
        if self.crop is None:
            return np.asarray(image)
        return _center_crop(np.asarray(image), self.crop)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The preprocessings of several encoders: an image is decoded once, and prepared for each of them."""

    parts: tuple[Preprocessing, ...]  # all with the same `decoding`

    @property
    def shape(self) -> tuple[int, ...]:
        """(bytes,): the size of one image's pixels for all encoders together."""
        return (sum(math.prod(part.shape) for part in self.parts),)

    @property
    def decode(self) -> Decoding:
        return self.parts[0].decode

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        """`Preprocessing.least_size`, which is the same for all parts."""
        return self.parts[0].least_size(width, height)

    def apply(self, image: Image.Image, size: tuple[int, int] | None = None, part: Box | None = None) -> Pixels:
        """Like `Preprocessing.apply`, but uint8 (bytes,): the pixels for all encoders, one after the other."""
        return np.concatenate([preprocessing.apply(image, size, part).reshape(-1) for preprocessing in self.parts])

    def split(self, pixels: Pixels) -> list[Pixels]:
        """Prepared images, uint8 (n, bytes) → (n, height, width, 3) for each encoder."""
        ends = list(itertools.accumulate(math.prod(part.shape) for part in self.parts))
        return [
            pixels[:, start:end].reshape(len(pixels), *part.shape)
            for start, end, part in zip([0, *ends], ends, self.parts, strict=False)
        ]


def decoding(preprocessing: Preprocessing) -> tuple[Any, ...]:
    """The settings that two preprocessings must share to use one decoded image: `fast` decodes for a certain resize."""
    return (preprocessing.decode, preprocessing.resize if preprocessing.decode == "fast" else None)


def _center_crop(pixels: Pixels, crop: tuple[int, int]) -> Pixels:
    """Cut out the middle. A smaller image is padded with zeros, placed like in the Hugging Face processors."""
    for axis, length in enumerate(crop):
        image_length = pixels.shape[axis]
        if image_length < length:
            before = -(-(length - image_length) // 2)
            padding = [(0, 0)] * pixels.ndim
            padding[axis] = (before, length - image_length - before)
            pixels = np.pad(pixels, padding)
        else:
            start = (image_length - length) // 2
            pixels = pixels[start : start + length] if axis == 0 else pixels[:, start : start + length]
    return pixels


def from_processor(
    processor: dict[str, Any], image_size: int | None, decode: Decoding = "exact"
) -> tuple[Preprocessing, dict[str, Any]]:
    """Read a Hugging Face processor's settings. Returns a `Preprocessing`, and the settings changed for `image_size`.

    `image_size` overrides the size of the model's input; a resize before a crop changes in proportion.
    Raises EncoderError for settings that give images of different sizes, or that are not supported.
    """
    settings = dict(processor)
    kind, size = settings.get("image_processor_type"), settings.get("size") or {}
    if image_size is not None:
        _set_image_size(settings, size, image_size)
        size = settings["size"]
    resize, crop = _resize_and_crop(settings, size)
    if crop is None and not isinstance(resize, tuple):
        raise EncoderError(
            f"the image processor ({kind}, size {size}) gives images of different sizes. "
            "Set image_size in the recipe, or use a processor with a square size or a centre crop."
        )
    if settings.get("do_pad"):
        raise EncoderError(f"the image processor ({kind}) pads images, which is not supported. Use a processor that does not.")
    multiply, add = _multiply_and_add(settings)
    preprocessing = Preprocessing(
        resize=resize,
        resample=int(settings["resample"]) if settings.get("resample") is not None else 2,  # 0 is a filter: nearest
        crop=crop,
        multiply=multiply,
        add=add,
        decode=decode,
    )
    return preprocessing, settings


def _multiply_and_add(settings: dict[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    scale = float(settings["rescale_factor"]) if settings.get("do_rescale", True) else 1.0
    normalise = settings.get("do_normalize", True)
    mean = [float(value) for value in settings["image_mean"]] if normalise else [0.0] * 3
    std = [float(value) for value in settings["image_std"]] if normalise else [1.0] * 3
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise EncoderError(
            f"the image processor has image_mean {mean} and image_std {std}; expected three numbers each, and no 0 in "
            "image_std. Correct the base's preprocessor_config.json."
        )
    return (scale / std[0], scale / std[1], scale / std[2]), (-mean[0] / std[0], -mean[1] / std[1], -mean[2] / std[2])


def _set_image_size(settings: dict[str, Any], size: dict[str, Any], image_size: int) -> None:
    square = {"height": image_size, "width": image_size}
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if _is_convnext(settings):
        settings["size"] = {"shortest_edge": image_size}
    elif crop is None:
        settings["size"] = square
    else:
        factor = image_size / min(int(crop["height"]), int(crop["width"]))
        settings["size"] = {edge: round(int(length) * factor) for edge, length in size.items() if length}
        settings["crop_size"] = square


def _resize_and_crop(
    settings: dict[str, Any], size: dict[str, Any]
) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    if _is_convnext(settings) and settings.get("do_resize", True):
        return _convnext_resize_and_crop(settings, size)
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    return _resize_of(settings, size), (int(crop["height"]), int(crop["width"])) if crop else None


def _is_convnext(settings: dict[str, Any]) -> bool:
    return str(settings.get("image_processor_type")).startswith("ConvNext")


def _convnext_resize_and_crop(
    settings: dict[str, Any], size: dict[str, Any]
) -> tuple[tuple[int, int] | int, tuple[int, int] | None]:
    """ConvNeXT's `size` is the size of a centre crop below 384 pixels, and of a square resize without crop from 384 on."""
    if not size.get("shortest_edge"):
        raise EncoderError(
            f"the image processor's size is {size}; expected a shortest_edge, as {settings['image_processor_type']} needs. "
            "Correct the base's preprocessor_config.json."
        )
    edge = int(size["shortest_edge"])
    if edge >= 384:
        return (edge, edge), None
    return int(edge / float(settings["crop_pct"])), (edge, edge)


def _resize_of(settings: dict[str, Any], size: dict[str, Any]) -> tuple[int, int] | int | None:
    if not settings.get("do_resize", True):
        return None
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return int(size["shortest_edge"])
    raise EncoderError(
        f"the image processor's size is {size}; expected height and width, or shortest_edge alone. "
        "Correct the base's preprocessor_config.json."
    )
