"""Whole shards → data files: what the next version takes over as it is, and what is written anew."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.errors import VerificationFailed
from lora_embed.manifest import FileEntry, Manifest, ShardCounts, may_hold
from lora_embed.schema import REJECT_SCHEMA, ChunkStats, Layout, Shard, data_schema
from lora_embed.storage import Store
from lora_embed.table import read_rows
from lora_embed.write import to_parquet

DATA_FILE_BYTES = 128 * 2**20
SMALL_FILES = 8
READS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one shard's rows come from: its parts, or a published data file and reject file that hold it among others."""

    shard: ShardCounts
    parts: tuple[str, ...] = ()
    data: str | None = None
    rejects: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What becomes one data file: whole shards, in the order of their names."""

    space_id: str
    dimension: int
    vector_type: str
    carry: tuple[tuple[str, str], ...]
    sources: tuple[Source, ...]
    forgotten: tuple[str, ...]  # ids whose rows become rejects


def plan_compactions(
    sources: list[Source], layout: Layout, space_id: str, dimension: int, forgotten: tuple[str, ...] = ()
) -> list[Compaction]:
    """Group shards, by name, into files of about `DATA_FILE_BYTES` of vectors."""
    row_bytes = dimension * (2 if layout.vector_type == "float16" else 4)
    groups: list[list[Source]] = []
    filled = DATA_FILE_BYTES
    for source in sorted(sources, key=lambda source: source.shard.name):
        if filled >= DATA_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += source.shard.vectors * row_bytes
    return [
        Compaction(
            space_id=space_id,
            dimension=dimension,
            vector_type=layout.vector_type,
            carry=layout.carry,
            sources=tuple(group),
            forgotten=forgotten,
        )
        for group in groups
    ]


def compact(store: Store, task: Compaction) -> tuple[FileEntry, FileEntry | None]:
    """Write one data file and, where there are rejects, one reject file, named by their content.

    Raises VerificationFailed when the rows are not what the shards' counts say.
    """
    schema = data_schema(task.dimension, task.vector_type, task.carry)
    data, rejects, shards = [], [], []
    paths = [path for source in task.sources for path in source.parts]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:  # many small objects: it is the waiting that takes the time
        read = pool.map(lambda path: read_rows(store, path), paths)
    for source in task.sources:
        good, bad = _rows_of(store, source, [next(read) for _ in source.parts])
        if (good.num_rows, bad.num_rows) != (source.shard.vectors, source.shard.rejects):
            raise VerificationFailed(
                f"{store.uri}: shard {source.shard.name} holds {good.num_rows} vectors and {bad.num_rows} rejects, "
                f"expected {source.shard.vectors} and {source.shard.rejects}"
            )
        bad = bad.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)
        good, dropped = _forget(good.select(schema.names).cast(schema), task.forgotten)
        data.append(good)
        rejects += [bad, dropped]
        shards.append(replace(source.shard, vectors=good.num_rows, rejects=bad.num_rows + dropped.num_rows))
    data_entry = _write_file(store, f"data/{task.space_id}", pa.concat_tables(data).unify_dictionaries(), tuple(shards))
    rejected = pa.concat_tables(rejects).unify_dictionaries()
    if not rejected.num_rows:
        return data_entry, None
    return data_entry, _write_file(store, f"rejects/{task.space_id}", rejected, tuple(s for s in shards if s.rejects))


def _forget(good: pa.Table, forgotten: tuple[str, ...]) -> tuple[pa.Table, pa.Table]:
    """The rows that may stay, and rejects in place of the others."""
    if not forgotten:
        return good, REJECT_SCHEMA.empty_table()
    goes = pc.is_in(good.column("id"), value_set=pa.array(forgotten, pa.string()))
    dropped = good.filter(goes).select(["id", "shard", "key"])
    dropped = dropped.append_column("reason", pa.array(["forgotten"] * dropped.num_rows, pa.string()))
    dropped = dropped.append_column("detail", pa.nulls(dropped.num_rows, pa.string()))
    return good.filter(pc.invert(goes)), dropped.cast(REJECT_SCHEMA)


def _rows_of(store: Store, source: Source, parts: list[pa.Table]) -> tuple[pa.Table, pa.Table]:
    """A shard's good rows and its rejects, from its parts or from a published file."""
    if parts:
        table = pa.concat_tables(parts).unify_dictionaries()
        is_good = pc.is_null(table.column("reason"))
        return table.filter(is_good), table.filter(pc.invert(is_good))
    assert source.data is not None
    good = read_rows(store, source.data)
    bad = read_rows(store, source.rejects) if source.rejects else REJECT_SCHEMA.empty_table()
    return good.filter(_is_shard(good, source.shard.name)), bad.filter(_is_shard(bad, source.shard.name))


def _is_shard(table: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.equal(pc.cast(table.column("shard"), pa.string()), name)


def _write_file(store: Store, folder: str, table: pa.Table, shards: tuple[ShardCounts, ...]) -> FileEntry:
    data = to_parquet(table)
    digest = hashlib.sha256(data).hexdigest()
    path = f"{folder}/{digest[:32]}.parquet"
    store.replace(path, data)  # also where it is there: one that no version refers to may be due to be removed
    return FileEntry(path=path, rows=table.num_rows, bytes=len(data), sha256=digest, shards=shards)


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What the next version takes from the current one: whole files, and shards whose file also holds others."""

    files: tuple[FileEntry, ...]
    rejects: tuple[FileEntry, ...]
    sources: tuple[Source, ...]


def plan_reuse(current: Manifest | None, wanted: set[str], forgets: Iterable[str] = ()) -> Reuse:
    """Split a version's files by whether all of their shards are still wanted (by id) and hold nothing to be forgotten.

    Small files, one for each night that brought little, are put together once there are `SMALL_FILES` of them.
    """
    if current is None:
        return Reuse(files=(), rejects=(), sources=())
    whole = tuple(entry for entry in current.files if all(shard.id in wanted for shard in entry.shards))
    whole = tuple(entry for entry in whole if not any(may_hold(shard, id_) for shard in entry.shards for id_ in forgets))
    small = [entry for entry in whole if entry.bytes < DATA_FILE_BYTES / 2]
    if len(small) >= SMALL_FILES:
        whole = tuple(entry for entry in whole if entry not in small)
    kept = {shard.id for entry in whole for shard in entry.shards}
    reject_of = {shard.id: entry.path for entry in current.rejects for shard in entry.shards}
    sources = tuple(
        Source(shard=shard, data=entry.path, rejects=reject_of.get(shard.id))
        for entry in current.files
        for shard in entry.shards
        if shard.id in wanted and shard.id not in kept
    )
    rejects = tuple(entry for entry in current.rejects if all(shard.id in kept for shard in entry.shards))
    return Reuse(files=whole, rejects=rejects, sources=sources)


def make_manifest(
    version: int,
    space_id: str,
    dimension: int,
    written: list[tuple[FileEntry, FileEntry | None]],
    reuse: Reuse,
    **about: Any,
) -> Manifest:
    """Put reused and newly written files together; `about` holds gates, pins and lineage."""
    files = tuple(sorted([*reuse.files, *(data for data, _ in written)], key=lambda entry: entry.shards[0].name))
    rejects = tuple(sorted([*reuse.rejects, *(bad for _, bad in written if bad)], key=lambda entry: entry.shards[0].name))
    shards = [shard for entry in files for shard in entry.shards]
    counts = {
        "shards": len(shards),
        "samples": sum(shard.samples for shard in shards),
        "vectors": sum(shard.vectors for shard in shards),
        "rejects": sum(shard.rejects for shard in shards),
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Manifest(
        version=version,
        space_id=space_id,
        dimension=dimension,
        created=created,
        files=files,
        rejects=rejects,
        counts=counts,
        **about,
    )


def shard_counts(shard: Shard, stats: ChunkStats) -> ShardCounts:
    return ShardCounts(id=shard.id, name=shard.name, samples=stats.samples, vectors=stats.vectors, rejects=stats.rejects)
