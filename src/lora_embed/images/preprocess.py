"""The image processor's resize, crop and padding on uint8, by Pillow alone; its rescaling as one multiply-add for the device.

So decode workers need neither torch nor transformers, and pixels travel as bytes. The pixels equal those of the Hugging Face
PIL processor bit for bit: `build_encoder` checks that for every encoder. `processors` reads a processor's settings.
"""

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_embed.images import fit
from lora_embed.images.fit import Fit, Resize

Pixels = NDArray[np.uint8]
Decoding = Literal["exact", "fast"]
Channels = Literal["RGB", "BGR"]
Box = tuple[float, float, float, float]
MOST_PIXELS = 16_384  # along an edge of a prepared image
PILLOW_13 = "pillow-13"  # decodes and resizes like Pillow 13.0.0; the arithmetic of encoders that do not name theirs


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The name of the arithmetic that computes pixels, with test hashes from the build of the encoder: see `arithmetic`."""

    name: str = PILLOW_13
    pixels: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)  # (path, hash of a test image's pixels)
    libraries: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)  # (name, version)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes a model's input: resize, centre crop, `pixel · multiply + add` for each channel, then padding."""

    resize: Resize | None  # (height, width), or an edge: as `fit` says
    resample: int  # Pillow's filter number
    crop: tuple[int, int] | None  # (height, width)
    multiply: tuple[float, float, float]
    add: tuple[float, float, float]
    decode: Decoding = "exact"  # fast: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still large enough
    arithmetic: Arithmetic = Arithmetic()
    fit: Fit = "plain"  # the rule by which the size after the resize follows from `resize` and the image
    multiple: int = 1  # the edges after the resize are rounded up to multiples of this
    pad: tuple[int, int] | None = None  # (height, width); zeros on the right and at the bottom of the model's input
    channels: Channels = "RGB"

    def settings(self) -> dict[str, Any]:
        """The settings that are hashed and written. Those that were added later are left out at their defaults.

        Older encoders did not write them, and must stay equal to newer ones with the same settings.
        """
        settings = asdict(self) | {"arithmetic": self.arithmetic.name}
        return {key: value for key, value in settings.items() if key not in _ADDED or value != _ADDED[key]}

    @property
    def parts(self) -> tuple["Preprocessing", ...]:
        """This preprocessing alone; a `Joint` has several."""
        return (self,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels) of every prepared image: 3 channels, or 4 with padding, where the last one marks it."""
        return (*self.size, 3 if self.pad is None else 4)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of every prepared image; None if they have different sizes, which no encoder allows."""
        stretched = self.resize if isinstance(self.resize, tuple) and self.fit != "within" else None
        return self.pad or self.crop or stretched

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every prepared image."""
        assert self.fixed_size is not None
        return self.fixed_size

    def resized_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """(width, height) after each resize of an image of this size."""
        return [] if self.resize is None else fit.sizes(self.fit, self.resize, self.multiple, width, height)

    def is_turned(self, width: int, height: int) -> bool:
        """True if an image of this size is turned by 90° before it is resized."""
        return self.resize is not None and fit.is_turned(self.fit, self.resize, width, height)

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        """The smallest (width, height) that `fast` may decode an image to: twice its size after the resize, turned or not."""
        if self.resize is None:
            return 2 * width, 2 * height
        least = self.resized_sizes(width, height)[0]
        if isinstance(self.resize, tuple) and self.fit == "plain":
            least = (max(least), max(least))
        elif self.is_turned(width, height):
            least = least[::-1]
        return 2 * least[0], 2 * least[1]

    def apply(self, image: Image.Image, size: tuple[int, int] | None = None, part: Box | None = None) -> Pixels:
        """An RGB image → uint8 pixels of `shape`.

        For an image that was decoded smaller, `size` is its whole (width, height) and `part` the box that it fills.
        """
        size = size or image.size
        if self.is_turned(*size):
            part = part and (image.height - part[3], part[0], image.height - part[1], part[2])
            image = image.transpose(Image.Transpose.ROTATE_270)
        # The whole image is resized, also the part that the crop removes: Pillow 13 orders its two passes by their cost, and
        # another order gives other bits. It is also resized to an equal size: like the processor, Pillow then copies it.
        for target in self.resized_sizes(*size):
            image, part = image.resize(target, Image.Resampling(self.resample), part), None
        pixels = np.asarray(image)
        if self.crop is not None:
            pixels = _center_crop(pixels, self.crop)
        elif self.fit in fit.THUMBNAILS:
            pixels = _centred(pixels, self.size)
        if self.channels == "BGR":
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        return pixels if self.pad is None else _padded(pixels, self.pad)


_ADDED = {"decode": "exact", "arithmetic": PILLOW_13, "fit": "plain", "multiple": 1, "pad": None, "channels": "RGB"}


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
    resize = (preprocessing.resize, preprocessing.fit, preprocessing.multiple)
    return (preprocessing.decode, resize if preprocessing.decode == "fast" else None)


def check_geometry(preprocessing: Preprocessing) -> None:
    """Raises ValueError for images of different sizes, too large ones, or a geometry that no processor has."""
    rule, resize, crop, pad = preprocessing.fit, preprocessing.resize, preprocessing.crop, preprocessing.pad
    edges = resize if isinstance(resize, tuple) else (resize if resize is not None else 1,)
    lengths = [*(crop or ()), *(pad or ()), *edges, preprocessing.multiple]
    wrong = [length for length in lengths if not 1 <= length <= MOST_PIXELS]
    if wrong:
        raise ValueError(f"preprocessing gives images with an edge of {wrong[0]} pixels, expected 1 to {MOST_PIXELS:,}")
    if rule != "plain" and (resize is None or (len(edges) == 2) != (rule in fit.PAIRS)):
        raise ValueError(f"preprocessing.resize is {resize}, which does not go with fit {rule!r}")
    if preprocessing.fixed_size is None:
        raise ValueError("preprocessing gives images of different sizes: resize has no height and width, and crop is null")
    if preprocessing.multiple != 1 and crop is None:
        raise ValueError(f"the edges after the resize are multiples of {preprocessing.multiple}, which needs a crop")
    height, width = preprocessing.fixed_size
    largest = crop or (fit.largest(rule, resize) if resize is not None and preprocessing.multiple == 1 else None)
    if pad is not None and (largest is None or largest[0] > height or largest[1] > width):
        raise ValueError(f"preprocessing pads images to {height}×{width} pixels, but some may be larger than that")


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


def _centred(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Pad with zeros on all sides; where that is uneven, the right and the bottom get one row more."""
    room = [length - image_length for length, image_length in zip(size, pixels.shape, strict=False)]
    return np.pad(pixels, [*((space // 2, space - space // 2) for space in room), (0, 0)])


def _padded(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Pad on the right and at the bottom, and add a channel that is 1 for the image and 0 for the padding.

    The padding is 0 after normalisation, which no pixel of 8 bits is. So the device multiplies the others by that channel.
    """
    padded = np.zeros((*size, 4), np.uint8)
    pixels = pixels[: size[0], : size[1]]  # the fit "within" leaves an image as it is that would shrink by less than a pixel
    height, width = pixels.shape[:2]
    padded[:height, :width, :3], padded[:height, :width, 3] = pixels, 1
    return padded
