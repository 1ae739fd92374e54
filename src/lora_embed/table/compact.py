"""Shards → data files: plan which files the next version reuses, and write the others row group by row group."""

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
from lora_embed.schema import FORGOTTEN, FORMAT, REJECT_SCHEMA, VECTOR_TYPES, Layout, Shard, data_schema, part_schema
from lora_embed.store.store import Store
from lora_embed.table.data_file import DataFile
from lora_embed.table.manifest import FileEntry, Manifest, ShardCounts, join_records, prefix_of, prefixes_of_ids
from lora_embed.table.parquet import FIND, count_values, damage_named, file_batches, read_rows, take_columns
from lora_embed.table.parts import to_parquet
from lora_embed.table.staging import VerifiedShard
from lora_embed.text import utc

DATA_FILE_BYTES = 128 * 2**20  # target size of a data file's vectors; a file has at most twice as many
ROW_GROUP_BYTES, ROW_GROUP_ROWS = 4 * 2**20, 65536  # upper limits of a row group, which is read as a whole to get one row
SMALL_FILES = 8
READS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that go into one data file: those of one shard's parts, or the rows of a published file that are kept."""

    shards: tuple[ShardCounts, ...]  # exactly one if the rows come from parts
    parts: tuple[str, ...] = ()
    data: str | None = None
    rejects: tuple[str, ...] = ()

    @property
    def vectors(self) -> int:
        return sum(shard.vectors for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """The sources of one data file, in the order of their shards' names."""

    space_id: str
    dimension: int
    vector_type: str
    carry: tuple[tuple[str, str], ...]
    sources: tuple[Source, ...]
    forgotten: tuple[str, ...]  # ids of images to forget; their rows become rejects

    @property
    def vector_bytes(self) -> int:
        """Bytes of the vectors before compression."""
        return sum(source.vectors for source in self.sources) * row_bytes(self.dimension, self.vector_type)


def row_bytes(dimension: int, vector_type: str) -> int:
    """Bytes of one vector before compression."""
    return dimension * int(VECTOR_TYPES[vector_type].bit_width) // 8


def cut_shard(shard: Shard, verified: VerifiedShard, parts: tuple[str, ...], vector_bytes: int) -> list[Source]:
    """Divide a shard's parts into sources of up to `DATA_FILE_BYTES` of vectors each; most shards need only one source."""
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
    """Sort sources by their first shard's name and group them into files of about `DATA_FILE_BYTES`, at most twice that."""
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
    """Write one data file and, if there are rejects, one reject file, each named by a hash of its content.

    Each source is read once. Memory holds the compressed file that is being written and one source. Raises
    VerificationFailed if the number of rows differs from the shards' counts.
    """
    schema, of_parts = (make(task.dimension, task.vector_type, task.carry) for make in (data_schema, part_schema))
    records: list[ShardCounts] = []
    rejects = [REJECT_SCHEMA.empty_table()]
    paths = [path for source in task.sources for path in source.parts]
    group_rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes(task.dimension, task.vector_type)))
    with DataFile(schema, group_rows) as file, ThreadPoolExecutor(READS_AT_ONCE) as pool:
        # Parts are many small objects: most of the time is spent on waiting, so several are read at once.
        parts = pool.map(lambda path: read_rows(store, path, of_parts), paths)
        for source in task.sources:
            good_rows: Counter[str] = Counter()
            bad_rows: Counter[str] = Counter()
            dropped_rows: Counter[str] = Counter()
            rows = itertools.islice(parts, len(source.parts)) if source.parts else _published(store, source, schema)
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
    """Separate good rows from rejects. In a part, the reason tells them apart; a published file holds only one kind."""
    if "reason" not in table.column_names:
        return table, REJECT_SCHEMA.empty_table()
    if "embedding" not in table.column_names:
        return schema.empty_table(), table
    is_good = pc.is_null(table.column("reason"))
    return take_columns(table.filter(is_good), schema), take_columns(table.filter(pc.invert(is_good)), REJECT_SCHEMA)


def _forget(good: pa.Table, forgotten: tuple[str, ...]) -> tuple[pa.Table, pa.Table]:
    """The rows that are not forgotten, and rejects in place of those that are."""
    if not forgotten:
        return good, REJECT_SCHEMA.empty_table()
    is_forgotten = pc.is_in(good.column("id"), value_set=pa.array(forgotten, pa.string()))
    dropped = good.filter(is_forgotten)
    dropped = dropped.append_column("reason", pa.array([FORGOTTEN] * dropped.num_rows, pa.string()))
    return good.filter(pc.invert(is_forgotten)), take_columns(dropped, REJECT_SCHEMA)


def _published(store: Store, source: Source, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of a published data file and its reject files that are kept, in batches."""
    assert source.data is not None
    names = pa.array([shard.name for shard in source.shards], pa.string())
    for path, columns in [(source.data, schema), *((path, REJECT_SCHEMA) for path in source.rejects)]:
        for batch in file_batches(store, path, columns):
            table = pa.Table.from_batches([batch])
            yield table.filter(pc.is_in(table.column("shard").cast(pa.string()), value_set=names))


def _rows_by_shard(table: pa.Table) -> Counter[str]:
    return count_values(table.column("shard").cast(pa.string()))


def _check_counts(store: Store, source: Source, good: Counter[str], bad: Counter[str]) -> None:
    for shard in source.shards:
        if (good[shard.name], bad[shard.name]) != (shard.vectors, shard.rejects):
            raise VerificationFailed(
                f"{store.uri}: shard {shard.name} has {good[shard.name]} vectors and {bad[shard.name]} rejects, expected "
                f"{shard.vectors} and {shard.rejects}. {FIND}"
            )


def _write_file(store: Store, folder: str, data: bytes, rows: int, shards: tuple[ShardCounts, ...]) -> FileEntry:
    digest = hashlib.sha256(data).hexdigest()
    path = f"{folder}/{digest[:32]}.parquet"
    store.replace(path, data)  # also if it exists: retention may be about to remove a file that no version refers to
    return FileEntry(path=path, rows=rows, bytes=len(data), sha256=digest, shards=shards)


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What the next version takes from the current one: whole files, and some rows of files that also hold other shards."""

    files: tuple[FileEntry, ...]
    rejects: tuple[FileEntry, ...]
    sources: tuple[Source, ...]


def plan_reuse(current: Manifest | None, shard_ids: set[str], forgets: Collection[str] = ()) -> Reuse:
    """Decide which files of a version are reused whole: those with only shards of `shard_ids` and no image to forget.

    Each night that embeds little adds a small file. Once there are `SMALL_FILES` of them, they are merged.
    """
    if current is None:
        return Reuse(files=(), rejects=(), sources=())
    whole_files = [entry for entry in current.files if all(shard.id in shard_ids for shard in entry.shards)]
    if forgets:
        prefixes = prefixes_of_ids(forgets)
        whole_files = [entry for entry in whole_files if not any(prefix_of(shard.name) in prefixes for shard in entry.shards)]
    vector_bytes = row_bytes(current.dimension, current.pins["vector_type"])
    small = {entry.path for entry in whole_files if entry.rows * vector_bytes < DATA_FILE_BYTES / 2}
    if len(small) >= SMALL_FILES:
        whole_files = [entry for entry in whole_files if entry.path not in small]
    kept_places = {shard.place for entry in whole_files for shard in entry.shards}
    whole_paths = {entry.path for entry in whole_files}
    reject_of = {shard.place: entry.path for entry in current.rejects for shard in entry.shards}
    sources = []
    for entry in current.files:
        staying = tuple(shard for shard in entry.shards if shard.id in shard_ids)
        if staying and entry.path not in whole_paths:
            reject_paths = dict.fromkeys(reject_of[shard.place] for shard in staying if shard.place in reject_of)
            sources.append(Source(shards=staying, data=entry.path, rejects=tuple(reject_paths)))
    rejects = tuple(entry for entry in current.rejects if all(shard.place in kept_places for shard in entry.shards))
    return Reuse(files=tuple(whole_files), rejects=rejects, sources=tuple(sources))


def make_manifest(
    version: int,
    space_id: str,
    dimension: int,
    new_files: list[tuple[FileEntry, FileEntry | None]],
    reuse: Reuse,
    **about: Any,
) -> Manifest:
    """Make a manifest of the reused and the newly written files; `about` holds gates, pins and lineage."""
    files = tuple(sorted([*reuse.files, *(data for data, _ in new_files)], key=lambda entry: entry.shards[0].name))
    rejects = tuple(sorted([*reuse.rejects, *(bad for _, bad in new_files if bad)], key=lambda entry: entry.shards[0].name))
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
