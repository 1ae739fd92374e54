"""The page that `search --page` writes: the query, and the nearest images with their pictures."""

import base64
import io
from pathlib import Path

from PIL import Image

from lora_embed.images.decode import BadImage
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.preprocess import Preprocessing
from lora_embed.report.page import page, write
from lora_embed.search.search import Found

THUMBNAIL = Preprocessing(resize=160, resample=3, crop=(160, 160), multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))


def write_page(result: Found, pictures: dict[str, bytes], out: Path) -> None:
    """One HTML file that needs nothing else: the query, and the hits with their pictures where there are any.

    Raises StorageError when it cannot be written.
    """
    with IsolatedDecoder() as decode:
        query = _thumbnail(result.data, decode)
        thumbnails = {id_: _thumbnail(data, decode) for id_, data in pictures.items()}
    lead = [f"version {result.version} of {result.table}", f"space {result.space_id}", result.method, "cosine"]
    title, sections = f"Nearest of {result.count:,} images", {"found": "Nearest first"}
    write(page(title, lead, "search/templates", sections, result=result, query=query, thumbnails=thumbnails), out)


def _thumbnail(data: bytes, decode: IsolatedDecoder) -> str:
    """A square JPEG in base64; empty where the image cannot be decoded."""
    try:
        pixels = decode(data, THUMBNAIL).pixels
    except BadImage:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
