"""A small square copy of an image, for a page."""

import base64
import io

from PIL import Image

from lora_embed.images.decode import BadImage
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.preprocess import Preprocessing

QUALITY = 80


def thumbnail(data: bytes, side: int, decode: IsolatedDecoder) -> str | None:
    """A JPEG of side × side pixels in base64; None where the image cannot be decoded."""
    square = Preprocessing(resize=side, resample=3, crop=(side, side), multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))
    try:
        pixels = decode(data, square).pixels
    except BadImage:
        return None
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
