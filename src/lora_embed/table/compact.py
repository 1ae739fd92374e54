"""Shards → data files: what the next version takes over as it is, and what is written anew, row group by row group."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.errors import VerificationFailed
from lora_embed.schema import FORMAT, REJECT_SCHEMA, Layout, Shard, data_schema
from lora_embed.store.store import Store
from lora_embed.table.data_file import DataFile
from lora_embed.table.manifest import FileEntry, Manifest, ShardCounts, join_records, prefix_of, prefixes_of_ids
from lora_embed.table.parquet import count_values, damage_named, file_batches, read_rows
from lora_embed.table.parts import to_parquet
from lora_embed.table.staging import VerifiedShard
from lora_embed.text import utc

DATA_FILE_BYTES = 128 * 2**20  # of vectors, about; a file has at most twice as many
ROW_GROUP_BYTES, ROW_GROUP_ROWS = 4 * 2**20, 65536  # of vectors, at most: what is read to look one row up
SMALL_FILES = 8
READS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that go into one data file: of a shard, from its parts, or what stays of a published file, which is read once."""

    shards: tuple[ShardCounts, ...]  # of parts, one
    parts: tuple[str, ...] = ()
    data: str | None = None
    rejects: tuple[str, ...] = ()

    @property
    def vectors(self) -> int:
        return sum(shard.vectors for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What becomes one data file: sources in the order of their shards' names."""

    space_id: str
    dimension: int
    vector_type: str
    carry: tuple[tuple[str, str], ...]
    sources: tuple[Source, ...]
    forgotten: tuple[str, ...]  # ids whose rows become rejects

    @property
    def vector_bytes(self) -> int:
        """Bytes of the vectors before compression."""
        return sum(source.vectors for source in self.sources) * row_bytes(self.dimension, self.vector_type)


def row_bytes(dimension: int, vector_type: str) -> int:
    """Bytes of one vector."""
    return dimension * (2 if vector_type == "float16" else 4)


def cut_shard(shard: Shard, verified: VerifiedShard, parts: tuple[str, ...], vector_bytes: int) -> list[Source]:
    """A shard's parts as sources of up to `DATA_FILE_BYTES` of vectors each; one source for all but the largest shards."""
    cuts, filled = [0], 0
    for number, vectors in enumerate(verified.vectors_of_parts):
        if filled and (filled + vectors) * vector_bytes > DATA_FILE_BYTES:
            cuts.append(number)
            filled = 0
        filled += vectors
    starts = [0, *itertools.accumulate(verified.samples_of_parts)]
    sources = []
    for first, end in itertools.pairwise([*cuts, len(parts)]):
        samples, vectors = starts[end] - starts[first], sum(verified.vectors_of_parts[first:end])
        record = ShardCounts(
            id=shard.id, name=shard.name, samples=samples, vectors=vectors, rejects=samples - vectors, start=starts[first]
        )
        sources.append(Source(shards=(record,), parts=parts[first:end]))
    return sources


def plan_compactions(
    sources: list[Source], layout: Layout, space_id: str, dimension: int, forgotten: tuple[str, ...] = ()
) -> list[Compaction]:
    """Group sources, by their first shard's name, into files of about `DATA_FILE_BYTES` of vectors and at most twice that."""
    vector_bytes = row_bytes(dimension, layout.vector_type)
    groups: list[list[Source]] = []
    filled = DATA_FILE_BYTES
    for source in sorted(sources, key=lambda source: (source.shards[0].name, source.shards[0].start)):
        size = source.vectors * vector_bytes
        if filled >= DATA_FILE_BYTES or filled + size > 2 * DATA_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += size
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

    Each source is read once, and rows pass through memory a row group at a time: what is held is the file that is
    written, compressed, and one source. Raises VerificationFailed when the rows are not what the shards' counts say.
    """
    schema = data_schema(task.dimension, task.vector_type, task.carry)
    records: list[ShardCounts] = []
    rejects = [REJECT_SCHEMA.empty_table()]
    paths = [path for source in task.sources for path in source.parts]
    group_rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes(task.dimension, task.vector_type)))
    with DataFile(schema, group_rows) as file, ThreadPoolExecutor(READS_AT_ONCE) as pool:
        # Many small objects: it is the waiting that takes the time.
        parts = pool.map(lambda path: read_rows(store, path), paths)
        for source in task.sources:
            good_rows: Counter[str] = Counter()
            bad_rows: Counter[str] = Counter()
            dropped_rows: Counter[str] = Counter()
            rows = itertools.islice(parts, len(source.parts)) if source.parts else _published(store, source)
            with damage_named(store.name(source.data or source.parts[0])):
                for table in rows:
                    good, bad = _split(table, schema)
                    good_rows += _rows_by_shard(good)
                    bad_rows += _rows_by_shard(bad)
                    good, dropped = _forget(good, task.forgotten)
                    dropped_rows += _rows_by_shard(dropped)
                    file.add(good)
                    rejects += [bad, dropped]
            _check_counts(store, source, good_rows, bad_rows)
            records += [
                replace(shard, vectors=shard.vectors - dropped, rejects=shard.rejects + dropped)
                for shard in source.shards
                for dropped in [dropped_rows[shard.name]]
            ]
    shards = tuple(join_records(records).values())
    data_entry = _write_file(store, f"data/{task.space_id}", file.data, file.rows, shards)
    rejected = pa.concat_tables(rejects).unify_dictionaries()
    if not rejected.num_rows:
        return data_entry, None
    with_rejects = tuple(shard for shard in shards if shard.rejects)
    return data_entry, _write_file(store, f"rejects/{task.space_id}", to_parquet(rejected), rejected.num_rows, with_rejects)


def _split(table: pa.Table, schema: pa.Schema) -> tuple[pa.Table, pa.Table]:
    """Good rows and rejects: of a part, by their reason; a published file has one kind."""
    if "reason" not in table.column_names:
        return table.select(schema.names).cast(schema), REJECT_SCHEMA.empty_table()
    is_good = pc.is_null(table.column("reason"))
    bad = table.filter(pc.invert(is_good)).select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)
    if "embedding" not in table.column_names:
        return schema.empty_table(), bad
    return table.filter(is_good).select(schema.names).cast(schema), bad


def _forget(good: pa.Table, forgotten: tuple[str, ...]) -> tuple[pa.Table, pa.Table]:
    """The rows that may stay, and rejects in place of the others."""
    if not forgotten:
        return good, REJECT_SCHEMA.empty_table()
    goes = pc.is_in(good.column("id"), value_set=pa.array(forgotten, pa.string()))
    dropped = good.filter(goes).select(["id", "shard", "key"])
    dropped = dropped.append_column("reason", pa.array(["forgotten"] * dropped.num_rows, pa.string()))
    dropped = dropped.append_column("detail", pa.nulls(dropped.num_rows, pa.string()))
    return good.filter(pc.invert(goes)), dropped.cast(REJECT_SCHEMA)


def _published(store: Store, source: Source) -> Iterator[pa.Table]:
    """What stays of a published data file and of its rejects, in batches."""
    assert source.data is not None
    names = pa.array([shard.name for shard in source.shards], pa.string())
    for path in (source.data, *source.rejects):
        for batch in file_batches(store, path):
            table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
            yield table.filter(pc.is_in(table.column("shard").cast(pa.string()), value_set=names))


def _rows_by_shard(table: pa.Table) -> Counter[str]:
    return count_values(table.column("shard").cast(pa.string()))


def _check_counts(store: Store, source: Source, good: Counter[str], bad: Counter[str]) -> None:
    for shard in source.shards:
        if (good[shard.name], bad[shard.name]) != (shard.vectors, shard.rejects):
            raise VerificationFailed(
                f"{store.uri}: shard {shard.name} holds {good[shard.name]} vectors and {bad[shard.name]} rejects, "
                f"expected {shard.vectors} and {shard.rejects}"
            )


def _write_file(store: Store, folder: str, data: bytes, rows: int, shards: tuple[ShardCounts, ...]) -> FileEntry:
    digest = hashlib.sha256(data).hexdigest()
    path = f"{folder}/{digest[:32]}.parquet"
    store.replace(path, data)  # also where it is there: one that no version refers to may be due to be removed
    return FileEntry(path=path, rows=rows, bytes=len(data), sha256=digest, shards=shards)


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What the next version takes from the current one: whole files, and what stays of those that also hold other shards."""

    files: tuple[FileEntry, ...]
    rejects: tuple[FileEntry, ...]
    sources: tuple[Source, ...]


def plan_reuse(current: Manifest | None, wanted: set[str], forgets: Collection[str] = ()) -> Reuse:
    """Split a version's files by whether all of their shards are still wanted (by id) and hold nothing to be forgotten.

    Small files, one for each night that brought little, are put together once there are `SMALL_FILES` of them.
    """
    if current is None:
        return Reuse(files=(), rejects=(), sources=())
    whole = [entry for entry in current.files if all(shard.id in wanted for shard in entry.shards)]
    if forgets:
        prefixes = prefixes_of_ids(forgets)
        whole = [entry for entry in whole if not any(prefix_of(shard.name) in prefixes for shard in entry.shards)]
    vector_bytes = row_bytes(current.dimension, current.pins["vector_type"])
    small = {entry.path for entry in whole if entry.rows * vector_bytes < DATA_FILE_BYTES / 2}
    if len(small) >= SMALL_FILES:
        whole = [entry for entry in whole if entry.path not in small]
    kept = {shard.place for entry in whole for shard in entry.shards}
    taken = {entry.path for entry in whole}
    reject_of = {shard.place: entry.path for entry in current.rejects for shard in entry.shards}
    sources = []
    for entry in current.files:
        staying = tuple(shard for shard in entry.shards if shard.id in wanted)
        if staying and entry.path not in taken:
            of_these = dict.fromkeys(reject_of[shard.place] for shard in staying if shard.place in reject_of)
            sources.append(Source(shards=staying, data=entry.path, rejects=tuple(of_these)))
    rejects = tuple(entry for entry in current.rejects if all(shard.place in kept for shard in entry.shards))
    return Reuse(files=tuple(whole), rejects=rejects, sources=tuple(sources))


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
    shards = join_records(shard for entry in files for shard in entry.shards).values()
    counts = {
        "shards": len(shards),
        "samples": sum(shard.samples for shard in shards),
        "vectors": sum(shard.vectors for shard in shards),
        "rejects": sum(shard.rejects for shard in shards),
    }
    created = utc()
    return Manifest(
        format=FORMAT,
        version=version,
        space_id=space_id,
        dimension=dimension,
        created=created,
        files=files,
        rejects=rejects,
        counts=counts,
        **about,
    )
