"""Find the nearest images of a query, exactly over a table's files or through an index, and read their pictures."""

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_embed.config.foreign import parse_record
from lora_embed.errors import ConfigError, LoraEmbedError, TableError
from lora_embed.images.decode import BadImage
from lora_embed.monitor.progress import say
from lora_embed.schema import Layout, Shard
from lora_embed.search.export import open_index
from lora_embed.search.index import HIT_COLUMNS, Hit, refuse_other_space, unit_queries
from lora_embed.search.places import refuse_elsewhere
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from lora_embed.store.local import correct_the_path
from lora_embed.store.store import Store
from lora_embed.table.read import Table
from lora_embed.text import in_lines, in_one_line, number_of
from lora_embed.vectors.rows import unit, vectors_of

MOST_SHOWN = 60  # characters of a field on a terminal
QUERIES_AT_ONCE = 1024  # queries in one pass over the files; scores take 4 bytes per query and row of a batch


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search for one image."""

    image: str
    table: str
    version: int  # version of the searched vectors; the index's version if an index was searched
    current: int  # version of the table, which an index may lag behind
    space_id: str
    method: str  # `exact`, or the kind of the index
    count: int  # vectors searched
    hits: tuple[Hit, ...]  # best first
    data: bytes = field(repr=False)  # the query's file

    def describe(self) -> str:
        """For a person: a line for each hit, score and id."""
        if not self.count:
            return f"version {self.version} of {self.table} holds no vectors, so nothing was found"
        head = (
            f"{len(self.hits)} nearest of {number_of(self.count, 'image')}, version {self.version}, space {self.space_id}, "
            f"{self.method}"
        )
        old = (
            f"note: the index holds version {self.version}, and the table is at version {self.current}. Export the index again "
            "to search that."
        )
        lines = [head, *(f"{hit.score: .6f}  {hit.id}{_shown(hit.fields)}" for hit in self.hits)]
        return in_lines([*lines, *([old] if self.version != self.current else [])])


def _shown(fields: dict[str, Any]) -> str:
    """Those fields of a hit that have a value, in one line each of limited length."""
    return "".join(f"  {name}={in_one_line(value, MOST_SHOWN)}" for name, value in fields.items() if value is not None)


def search_table(table: Table, vectors: NDArray[Any], k: int, space_id: str | None = None) -> list[list[Hit]]:
    """The k nearest of all vectors of a table by cosine, for each query (m, d); best first, equal scores by id.

    Reads file by file, so the memory does not depend on the table's size. If k is larger than the table, finds all rows.
    Raises ConfigError for queries of another shape or, if `space_id` is given, of another space than the table's.
    """
    if space_id is not None:
        refuse_other_space(
            f"{table.store.uri}: version {table.version}", table.space_id, space_id, "Get it with table.encoder()."
        )
    queries = unit_queries(vectors, table.dimension, k)
    blocks = [queries[start : start + QUERIES_AT_ONCE] for start in range(0, len(queries), QUERIES_AT_ONCE)]
    return [hits for block in blocks for hits in _search_block(table, block, k)]


def _search_block(table: Table, queries: NDArray[np.float32], k: int) -> list[list[Hit]]:
    best: list[list[Hit]] = [[] for _ in queries]
    shown = [*HIT_COLUMNS, *(name for name, _ in table.manifest.carry)]
    for batch in table.batches([*shown, "embedding"]):
        for number, scores in enumerate(queries @ unit(vectors_of(batch)).T):
            floor = best[number][-1].score if len(best[number]) == k else -np.inf
            if len(scores) > k:
                floor = max(floor, np.partition(scores, -k)[-k])
            rows = np.flatnonzero(scores >= floor)  # with equal scores, so that ids decide and not the order of files
            near_rows = batch.select(shown).take(rows).to_pylist() if len(rows) else []
            hits = [_hit(float(score), row) for score, row in zip(scores[rows], near_rows, strict=True)]
            best[number] = sorted([*best[number], *hits], key=lambda hit: (-hit.score, hit.id))[:k]
    return best


def _hit(score: float, row: dict[str, Any]) -> Hit:
    own = {name: row.pop(name) for name in HIT_COLUMNS}
    return Hit(score=score, **own, fields=row)


def _with_fields(hits: list[Hit], table: Table) -> list[Hit]:
    """Hits of an index, with the fields that the table's version has of their ids."""
    names = [name for name, _ in table.manifest.carry]
    if not names:
        return hits
    fields = {row.pop("id"): row for row in table.rows([hit.id for hit in hits], names).to_pylist()}
    return [replace(hit, fields=fields.get(hit.id, {})) for hit in hits]


def search_image(
    table: Table, image: str, k: int = 10, index: Path | None = None, image_options: dict[str, Any] | None = None
) -> Found:
    """Embed an image (a path, or a URI with storage options) with the table's encoder, and find the nearest images.

    Raises ConfigError for an image that cannot be read, and for an index of another space.
    """
    data = _read_image(image, image_options)
    opened = open_index(index) if index is not None else None
    encoder = table.encoder()
    try:
        vectors = encoder.embed([data])
    except BadImage as error:
        raise ConfigError(f"{image}: cannot be embedded: {error.reason} ({error}). Give another image.") from None
    version, count, method = table.version, table.count, "exact"
    if opened is None:
        hits = search_table(table, vectors, k, encoder.space_id)[0]
    else:
        hits = _with_fields(opened.search(vectors, k, encoder.space_id)[0], table)
        version, count, method = opened.description.version, opened.description.count, opened.description.kind
    return Found(
        image=image,
        table=table.store.uri,
        version=version,
        current=table.version,
        space_id=encoder.space_id,
        method=method,
        count=count,
        hits=tuple(hits),
        data=data,
    )


def _read_image(image: str, options: dict[str, Any] | None) -> bytes:
    if "://" in image:
        root, _, name = image.rpartition("/")
        data = Store(root, options or {}, follows_links=True).read(name)
    else:
        path = Path(image)
        data = Store(str(path.absolute().parent), follows_links=True).read(path.name) if path.name else None
    if data is None:
        remedy = "Correct the path." if "://" in image else correct_the_path(image)
        raise ConfigError(f"{image}: no such file, expected an image. {remedy}")
    return data


def find_pictures(
    table: Table, hits: tuple[Hit, ...], input_options: dict[str, Any] | None = None, inputs: tuple[str, ...] = ()
) -> dict[str, bytes]:
    """Encoded images of hits, by id, read again from the shards that the version was made from.

    Only shards in the table's store or in `inputs`, which the user names, are opened; for others, the reason is logged.
    Images are left out if their shard cannot be read or has changed. A tar is read up to the last image that is needed.
    """
    try:
        lineage = parse_record(_Origin, json.dumps({name: table.manifest.lineage.get(name) for name in ("input", "layout")}))
    except ValueError:
        return {}
    layout = lineage.layout
    shards = {
        shard.id: shard for place in lineage.input for shard in _shards_of(table, place, layout, inputs, input_options or {})
    }
    published = {shard.name: shard.id for shard in table.manifest.shards.values()}
    keys_of_shard: dict[str, dict[str, str]] = defaultdict(dict)
    for hit in hits:
        if published.get(hit.shard) in shards:
            keys_of_shard[published[hit.shard]][hit.key] = hit.id
    pictures: dict[str, bytes] = {}
    for shard_id, ids in keys_of_shard.items():
        ids_left = dict(ids)
        try:
            for sample in read_samples(shards[shard_id], layout, input_options or {}, lambda number: True):
                if sample.data and sample.key in ids_left:
                    pictures[ids_left.pop(sample.key)] = sample.data
                if not ids_left:
                    break
        except LoraEmbedError:
            continue
    return pictures


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """The fields of a version's lineage that say where its images come from."""

    input: tuple[str, ...]
    layout: Layout


def _shards_of(table: Table, place: str, layout: Layout, inputs: tuple[str, ...], options: dict[str, Any]) -> list[Shard]:
    """Shards of one input that the table names; none if it must not or cannot be opened."""
    try:
        refuse_elsewhere(place, table.store.uri, inputs)
    except TableError as error:
        say(f"pictures are left out: {error}")
        return []
    try:
        return list_shards((place,), options, fields=[name for name, _ in layout.carry])
    except LoraEmbedError:
        return []
