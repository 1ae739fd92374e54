"""Images whose samples do not have 8 bits → 8 bits, with the colour that a PNG of such samples declares transparent."""

import contextlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FEW_BITS = {"L;2": 85, "L;4": 17}  # Pillow's name of grey with so few bits → what its values are multiplied by
_LOW = "low bytes"  # in an image's `info`
_ROUNDING = 0.001  # floats may lie outside of 0…1 by so much


class NotPixels(ValueError):
    """Values of an image that are no brightness on a known scale, such as heights above the sea."""


def load(image: Image.Image) -> Image.Image:
    """Load an opened image; of samples with 16 or 32 bits, return an image with 8. Raises NotPixels.

    16-bit grey is divided by 256. Floats of 0…1 are multiplied by 255, and floats of 0…255 are cut to whole numbers. Whole
    numbers of 32 bits are taken as 8-bit values if all are at most 255, or as 16-bit values if all are at most 65,535.
    """
    rawmode, key = _rawmode_of(image), image.info.get("transparency")
    if rawmode in _FEW_BITS and isinstance(key, int):
        image.info["transparency"] = key * _FEW_BITS[rawmode]  # Pillow compares it with the multiplied values
    if rawmode == "RGB;16B" and key is not None:
        image.info[_LOW] = _low_bytes(image)  # kept, since it cannot be read once the image is loaded
    image.load()
    key, low = image.info.get("transparency"), image.info.get(_LOW)
    if image.mode == "F":
        return _from_floats(image)
    if image.mode.startswith("I"):
        return _from_integers(image, key)
    if low is not None and image.mode == "RGB":
        image = image.copy()
        values = np.asarray(image).astype(np.uint16) << 8 | low
        image.putalpha(Image.fromarray(_opaque((values != np.array(key, np.uint16)).any(axis=2))))
    return image


def _rawmode_of(image: Image.Image) -> str | None:
    """How the samples lie in a file that is not loaded yet, by Pillow's name; None where that is not known."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else None
    return arguments if isinstance(arguments, str) else None


def _low_bytes(image: Image.Image) -> NDArray[np.uint8] | None:
    """The low bytes of an opened PNG with 16 bits a colour, of which Pillow gives the high ones; None if it cannot be read."""
    file = getattr(image, "fp", None)
    if file is None:
        return None
    place = file.tell()
    file.seek(0)
    copy = io.BytesIO(file.read())
    file.seek(place)
    with contextlib.suppress(Exception), Image.open(copy, formats=("PNG",)) as low:  # if it is damaged, so is the image
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        return np.asarray(low)
    return None


def _from_integers(image: Image.Image, key: object) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "I" and image.format != "PPM":  # Pillow scales PPM to 16 bits
        values = _unsigned(image, values)
        least, most = int(values.min()), int(values.max())
        if least < 0 or most > 65535:
            raise NotPixels(f"has whole numbers from {least} to {most}, expected 0 to 255 or 0 to 65535")
        values = values if most > 255 else values << 8
    grey = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(_opaque(values != key)))
    return grey


def _unsigned(image: Image.Image, values: NDArray[np.int32]) -> NDArray[np.integer]:
    """Values of a TIFF that declares them unsigned, which Pillow reads as signed."""
    tags = getattr(image, "tag_v2", {})
    return values.view(np.uint32) if tags.get(258) == (32,) and tags.get(339, (1,)) == (1,) else values


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if least >= -_ROUNDING and most <= 1 + _ROUNDING:
        return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
    if least >= 0 and most <= 255:
        return image
    raise NotPixels(f"has numbers from {least:g} to {most:g}, expected 0 to 1 or 0 to 255")


def _opaque(is_opaque: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.where(is_opaque, 255, 0).astype(np.uint8)
