"""Make small pictures of the images that a report shows; their shards are read once more."""

from collections.abc import Iterable

from lora_embed.evaluate.collect import Source
from lora_embed.evaluate.records import QueryChange
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.thumbnail import thumbnail
from lora_embed.shards.read import read_samples

SIDE = 96  # pixels of a picture


def thumbnails(changed: Iterable[QueryChange], source: Source) -> dict[str, str]:
    """Small JPEGs in base64 of the images that are shown, by id; their shards are read once more for them."""
    shown = {id_ for query in changed for id_ in (query.id, *(neighbour.id for neighbour in (*query.before, *query.after)))}
    by_id: dict[str, str] = {}
    with IsolatedDecoder() as decode:
        for shard in source.shards:
            front = f"{shard.prefix}/" if shard.prefix else ""
            left = {id_ for id_ in shown if id_.startswith(front)}
            if not left:
                continue
            for sample in read_samples(shard, source.layout, source.options, lambda number: True):
                if sample.data and (id_ := f"{front}{sample.key}") in left and id_ not in by_id:
                    left.discard(id_)
                    if (picture := thumbnail(sample.data, SIDE, decode)) is not None:
                        by_id[id_] = picture
                if not left:
                    break
    return by_id
