"""The table on storage: what is staged and published, verification, compaction, versions, and opening one."""

import hashlib
import io
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from lora_embed.errors import TableError, VerificationFailed
from lora_embed.schema import (
    REJECT_SCHEMA,
    ChunkStats,
    FileEntry,
    Layout,
    Manifest,
    Part,
    data_schema,
    encoder_path,
    prefix_of,
)
from lora_embed.storage import Store
from lora_embed.versions import listed_versions, read_manifest
from lora_embed.write import part_path, read_footer

if TYPE_CHECKING:
    from lora_embed.model.encoder import Encoder

BATCH_ROWS = 8192


def staged_parts(store: Store, space_id: str, layout_id: str) -> dict[str, list[Part]]:
    """Committed parts of one layout by shard id, from one listing."""
    found: dict[str, list[Part]] = defaultdict(list)
    for entry in store.list_files(part_path(space_id, layout_id)):
        part = Part.parse(entry.path.rsplit("/", 1)[-1])
        if part is not None:
            found[part.shard_id].append(part)
    return {shard: sorted(parts, key=lambda part: part.chunk) for shard, parts in found.items()}


def part_paths(space_id: str, layout: Layout, parts: list[Part]) -> tuple[str, ...]:
    return tuple(part_path(space_id, layout.layout_id, part) for part in parts)


def is_complete(parts: list[Part]) -> bool:
    """Do sorted parts tile a shard from its first chunk to a proven last one?"""
    chunks = [part.chunk for part in parts]
    return bool(parts) and parts[-1].last and chunks == list(range(len(parts)))


def verify_parts(store: Store, space_id: str, layout: Layout, parts: list[Part]) -> ChunkStats:
    """Check one complete shard's parts by their footers against names and layout; its counts.

    Raises VerificationFailed for a part of another space or layout, a gap, or counts that do not add up.
    """
    samples = vectors = 0
    for part in parts:
        path = part_path(space_id, layout.layout_id, part)
        try:
            with store.open(path) as file:
                metadata = pq.ParquetFile(file).metadata
        except FileNotFoundError:
            raise VerificationFailed(f"{store.uri}/{path}: is gone, though it was listed; run the same command again") from None
        facts = read_footer(metadata)
        full = layout.chunk_size if not part.last else metadata.num_rows
        expected = {
            "space_id": space_id,
            "layout_id": layout.layout_id,
            "start": samples,
            "samples": full,
        }
        if facts is None or {key: facts[key] for key in expected} != expected or metadata.num_rows != full:
            raise VerificationFailed(f"{store.uri}/{path}: its footer says {facts}, expected {expected}; remove it, run again")
        samples += metadata.num_rows
        vectors += int(str(facts["vectors"]))
    return ChunkStats(shard_id=parts[0].shard_id, chunk=len(parts), samples=samples, vectors=vectors, rejects=samples - vectors)


def read_rows(store: Store, path: str) -> pa.Table:
    """A Parquet file of the table, whole. Raises VerificationFailed when it is gone."""
    data = store.read(path)
    if data is None:
        raise VerificationFailed(f"{store.uri}/{path}: is gone, though it is referred to")
    file = pq.ParquetFile(pa.BufferReader(data))  # of a small part, read_table takes three times as long
    return file.read(use_threads=len(data) > 2**20).replace_schema_metadata(None)


def clear_absorbed(store: Store, manifest: Manifest, layout: Layout) -> None:
    """Remove the staged parts of shards that a version holds, also where a run died just after it was committed."""
    staged = staged_parts(store, manifest.space_id, layout.layout_id)
    for shard_id in set(staged) & set(manifest.shards):
        store.delete(list(part_paths(manifest.space_id, layout, staged[shard_id])))
    store.clear_temporary()


def verify_file(store: Store, entry: FileEntry, *, is_data: bool) -> set[str]:
    """Read a published file again and check its sum, rows per shard and, in a data file, that ids differ; its ids.

    Raises VerificationFailed with what differs.
    """
    where = f"{store.uri}/{entry.path}"
    data = store.read(entry.path)
    if data is None:
        raise VerificationFailed(f"{where}: is gone, though the version refers to it")
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise VerificationFailed(f"{where}: {len(data)} bytes that are not the {entry.bytes} it was published with")
    table = pq.read_table(io.BytesIO(data), columns=["id", "shard"])
    counted = pc.value_counts(table.column("shard").cast(pa.string())).to_pylist()
    per_shard = {value["values"]: value["counts"] for value in counted}
    expected = {shard.name: shard.vectors if is_data else shard.rejects for shard in entry.shards}
    if per_shard != {name: rows for name, rows in expected.items() if rows} or table.num_rows != entry.rows:
        raise VerificationFailed(f"{where}: rows per shard differ from the manifest's counts")
    ids = set(table.column("id").to_pylist())
    if is_data and len(ids) != table.num_rows:
        raise VerificationFailed(f"{where}: {table.num_rows - len(ids)} ids stand there twice")
    return ids


def _rows_with(file: pq.ParquetFile, ids: set[str], columns: list[str]) -> list[pa.Table]:
    """Rows of a data file that have one of these ids, from the row groups that can hold one."""
    ordered, found = sorted(ids), []
    for group in range(file.num_row_groups):
        bounds = file.metadata.row_group(group).column(0).statistics  # of the first column, `id`
        if bounds is not None and bounds.has_min_max:
            first = bisect_left(ordered, bounds.min)
            if first == len(ordered) or ordered[first] > bounds.max:
                continue
        here = pc.is_in(file.read_row_group(group, columns=["id"]).column("id"), pa.array(ordered, pa.string()))
        if pc.any(here).as_py():
            found.append(file.read_row_group(group, columns=columns).select(columns).filter(here))
    return found


@dataclass(frozen=True)
class Table:
    """One version of an embedding table, open for reading; other versions may be published meanwhile."""

    store: Store
    manifest: Manifest

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def space_id(self) -> str:
        """12 hex digits; only the encoder of this space makes vectors to compare with these."""
        return self.manifest.space_id

    @property
    def dimension(self) -> int:
        return self.manifest.dimension

    @property
    def count(self) -> int:
        """Vectors, without rejects."""
        return self.manifest.counts["vectors"]

    def to_dataset(self) -> pds.Dataset:
        """All data files as one dataset; columns as in `schema.data_schema`."""
        paths = [self.store.full_path(entry.path) for entry in self.manifest.files]
        return pds.dataset(paths, schema=self.schema, format="parquet", filesystem=self.store.filesystem)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the data files: `schema.data_schema` of this version."""
        carry = tuple((name, kind) for name, kind in self.manifest.pins["carry"])
        return data_schema(self.dimension, self.manifest.pins["vector_type"], carry)

    @property
    def files(self) -> list[str]:
        """URIs of all data files, for readers of Parquet."""
        return [self.store.name(entry.path) for entry in self.manifest.files]

    def batches(self, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """These columns of all rows, in batches of up to `rows`: one file open at a time, no other column read.

        Raises TableError for a column that is not there, and VerificationFailed for a file that is gone.
        """
        self._check_columns(columns)
        for entry in self.manifest.files:
            if entry.rows:
                with self._opened(entry) as file:
                    yield from (batch.select(columns) for batch in file.iter_batches(rows, columns=columns))

    def rows(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of these ids, in their order; an id that this version lacks has none. All columns unless told which.

        Opened are only the files of shards that an id begins with, and read only their row groups whose smallest and
        largest id lie around one. Raises as `batches` does.
        """
        names = list(self.schema.names if columns is None else columns)
        self._check_columns(names)
        wanted = list(ids)
        of_file: dict[int, set[str]] = defaultdict(set)
        for sample_id in wanted:
            for number in self._may_hold(sample_id):
                of_file[number].add(sample_id)
        found = [self.schema.empty_table().select(names if "id" in names else ["id", *names])]
        for number, some in sorted(of_file.items()):
            with self._opened(self.manifest.files[number]) as file:
                found += _rows_with(file, some, found[0].column_names)
        rows = pa.concat_tables(found).unify_dictionaries()
        place = {sample_id: row for row, sample_id in enumerate(rows.column("id").to_pylist())}
        order = pa.array([place[sample_id] for sample_id in wanted if sample_id in place], pa.int64())
        return rows.take(order).select(names)

    def _may_hold(self, sample_id: str) -> set[int]:
        """Numbers of the files that hold a shard whose samples' ids begin as this one does."""
        cuts = (cut.start() for cut in re.finditer("/", sample_id))
        begins = [sample_id[:cut] for cut in cuts]
        return set().union(*(self._files_by_prefix.get(prefix, ()) for prefix in ["", *begins]))

    @cached_property
    def _files_by_prefix(self) -> dict[str, list[int]]:
        """What stands before the key in ids of a shard → numbers of the files that hold such rows."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, entry in enumerate(self.manifest.files):
            for prefix in {prefix_of(shard.name) for shard in entry.shards if shard.vectors}:
                found[prefix].append(number)
        return found

    @contextmanager
    def _opened(self, entry: FileEntry) -> Iterator[pq.ParquetFile]:
        try:
            with self.store.open(entry.path) as file:
                yield pq.ParquetFile(file)
        except FileNotFoundError:
            raise VerificationFailed(f"{self.store.name(entry.path)}: is gone, though the version refers to it") from None

    def _check_columns(self, columns: Sequence[str]) -> None:
        if unknown := [name for name in columns if name not in self.schema.names]:
            raise TableError(f"{self.store.uri}: has no column {unknown[0]!r}; it has {', '.join(self.schema.names)}")

    def rejects(self) -> pa.Table:
        """All rejects: id, shard, key, reason, detail."""
        tables = [read_rows(self.store, entry.path) for entry in self.manifest.rejects]
        return pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables]).unify_dictionaries()

    def encoder(self, device: str = "cpu") -> "Encoder":
        """The encoder that made the vectors, in float32: the only one whose queries match them."""
        from lora_embed.fetch import fetch_directory
        from lora_embed.model.encoder import FILES, load_encoder  # torch, which reading a table does not need

        uri = f"{self.store.uri}/{encoder_path(self.space_id)}"
        return load_encoder(fetch_directory(uri, None, FILES, self.store.options), device=device)


def open_table(uri: str, version: int | None = None, storage_options: dict[str, Any] | None = None) -> Table:
    """Open a version of a table, by default the current one. Raises TableError where there is none."""
    store = Store(uri, storage_options or {})
    manifest = read_manifest(store, version)
    if manifest is None:
        wanted = f"version {version}" if version is not None else "published version"
        raise TableError(f"{uri}: has no {wanted}; `lora-embed status {uri}` says what is there")
    return Table(store, manifest)


def verify_table(opened: Table) -> None:
    """Check every file of a version against its manifest, and that no id stands in two of them.

    Raises VerificationFailed with the first thing that differs.
    """
    manifest = opened.manifest
    if opened.store.read(f"{encoder_path(manifest.space_id)}/encoder.json") is None:
        raise VerificationFailed(f"{opened.store.uri}: the encoder of space {manifest.space_id} is gone")
    seen: set[str] = set()
    for entry in manifest.files:
        ids = verify_file(opened.store, entry, is_data=True)
        if twice := seen & ids:
            raise VerificationFailed(
                f"{opened.store.uri}/{entry.path}: {len(twice)} ids stand in another file too: {min(twice)} …"
            )
        seen |= ids
    for entry in manifest.rejects:
        verify_file(opened.store, entry, is_data=False)
    if len(seen) != manifest.counts["vectors"]:
        raise VerificationFailed(f"{opened.store.uri}: holds {len(seen)} vectors, its manifest says {manifest.counts}")


@dataclass(frozen=True, kw_only=True)
class TableState:
    """What `status` shows."""

    table: str
    version: int | None
    space_id: str | None
    created: str | None
    counts: dict[str, int]
    versions: list[int]
    staged: dict[str, int]  # parts, by space and layout
    held: dict[str, str]  # spaces that a rollback holds back → why
    forgotten: int  # images that stay out
    gates: dict[str, dict[str, Any]]  # of the current version, as its manifest has them

    def describe(self) -> str:
        """For a person."""
        lines = [f"table     {self.table}"]
        if self.version is None:
            lines.append("version   nothing published yet")
        else:
            counted = ", ".join(f"{number:,} {name}" for name, number in self.counts.items())
            lines += [f"version   {self.version} of {self.created}, space {self.space_id}", f"holds     {counted}"]
            lines += [f"retained  versions {', '.join(map(str, self.versions))}", *_gate_lines(self.gates)]
        lines += [f"held back space {space}: {why}" for space, why in self.held.items()]
        lines += [f"forgotten {self.forgotten:,} images"] if self.forgotten else []
        lines += [f"staged    {parts:,} parts in {layout}" for layout, parts in self.staged.items()] or ["staged    nothing"]
        return "\n".join(lines)


def _gate_lines(gates: dict[str, dict[str, Any]]) -> list[str]:
    """The gates that held, in one line, and a line for each that a person let through."""
    held, accepted = [], []
    for name, gate in gates.items():
        value, limit = "not finite" if gate["value"] is None else f"{gate['value']:.3g}", f"{gate['limit']:.3g}"
        if gate.get("holds", True):  # the first tables have gates of a figure and a limit alone
            held.append(f"{name} {value} {'≥' if gate.get('direction') == 'at least' else '≤'} {limit}")
        else:
            accepted.append(f"accepted  {name} {value}, {gate['direction']} {limit} ({gate['accepted']}): {gate['says']}")
    return [f"gates     {len(held)} held: {', '.join(held)}"] * bool(held) + accepted


def describe_table(uri: str, storage_options: dict[str, Any] | None = None) -> TableState:
    """Versions and staged parts of a table. Raises TableError when there is no table at all."""
    store = Store(uri, storage_options or {})
    staged: dict[str, int] = defaultdict(int)
    for entry in store.list_files("staging"):
        folder, _, name = entry.path.removeprefix("staging/").rpartition("/")
        if Part.parse(name) is not None:
            staged[folder] += 1
    manifest = read_manifest(store)
    if manifest is None and not staged and not store.list_files("encoders"):
        raise TableError(f"{uri}: is not a table, or nothing was ever written to it")
    return TableState(
        table=uri,
        version=manifest.version if manifest else None,
        space_id=manifest.space_id if manifest else None,
        created=manifest.created if manifest else None,
        counts=manifest.counts if manifest else {},
        versions=listed_versions(store),
        staged=dict(staged),
        held=manifest.held if manifest else {},
        forgotten=len(manifest.forgotten) if manifest else 0,
        gates=manifest.gates if manifest else {},
    )
