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
    ids = {id_ for query in changed for id_ in (query.id, *(neighbour.id for neighbour in (*query.before, *query.after)))}
    by_id: dict[str, str] = {}
    with IsolatedDecoder() as decode:
        for shard in source.shards:
            prefix = f"{shard.prefix}/" if shard.prefix else ""
            ids_left = {id_ for id_ in ids if id_.startswith(prefix)}
            if not ids_left:
                continue
            for sample in read_samples(shard, source.layout, source.options, lambda number: True):
                if sample.data and (id_ := f"{prefix}{sample.key}") in ids_left and id_ not in by_id:
                    ids_left.discard(id_)
                    if (picture := thumbnail(sample.data, SIDE, decode)) is not None:
                        by_id[id_] = picture
                if not ids_left:
                    break
    return by_id
