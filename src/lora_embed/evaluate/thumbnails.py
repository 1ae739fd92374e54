"""Small pictures of the images that a report shows, read once more from their shards."""

import base64
import io
from collections.abc import Iterable

from PIL import Image

from lora_embed.evaluate.collect import Source
from lora_embed.evaluate.records import QueryChange
from lora_embed.images.decode import BadImage
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.preprocess import Preprocessing
from lora_embed.shards.read import read_samples

THUMBNAIL = Preprocessing(resize=96, resample=3, crop=(96, 96), multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))


def thumbnails(changed: Iterable[QueryChange], source: Source) -> dict[str, str]:
    """Small JPEGs in base64 of the images that are shown, by id; their shards are read once more for them."""
    shown = {id_ for query in changed for id_ in (query.id, *(one.id for one in (*query.before, *query.after)))}
    found: dict[str, str] = {}
    with IsolatedDecoder() as decode:
        for shard in source.shards:
            front = f"{shard.prefix}/" if shard.prefix else ""
            left = {id_ for id_ in shown if id_.startswith(front)}
            if not left:
                continue
            for sample in read_samples(shard, source.layout, source.options, lambda number: True):
                if sample.data and (id_ := f"{front}{sample.key}") in left and id_ not in found:
                    left.discard(id_)
                    found |= _thumbnail(id_, sample.data, decode)
                if not left:
                    break
    return found


def _thumbnail(id_: str, data: bytes, decode: IsolatedDecoder) -> dict[str, str]:
    try:
        pixels = decode(data, THUMBNAIL).pixels
    except BadImage:
        return {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return {id_: base64.b64encode(buffer.getvalue()).decode()}
