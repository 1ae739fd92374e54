"""Read one version of a table: its rows, rejects and encoder."""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from lora_embed.errors import TableError, VerificationFailed
from lora_embed.schema import REJECT_SCHEMA, data_schema, encoder_path
from lora_embed.store.lend import lend
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest, prefix_of, prefixes_of_ids
from lora_embed.table.parquet import BATCH_ROWS, file_batches, opened_file, read_rows, take_columns
from lora_embed.table.versions import no_version, read_manifest
from lora_embed.text import number_of, without_secrets

if TYPE_CHECKING:
    from lora_embed.model.encoder import Encoder


def _rows_with(file: pq.ParquetFile, ids: set[str], schema: pa.Schema) -> list[pa.Table]:
    """Rows of a data file that have one of these ids, read from those row groups alone that can hold one."""
    ordered, tables = sorted(ids), []
    for group in range(file.num_row_groups):
        bounds = file.metadata.row_group(group).column(0).statistics  # of the first column, `id`
        if bounds is not None and bounds.has_min_max:
            first = bisect_left(ordered, bounds.min)
            if first == len(ordered) or ordered[first] > bounds.max:
                continue
        has_id = pc.is_in(file.read_row_group(group, columns=["id"]).column("id"), pa.array(ordered, pa.string()))
        if pc.any(has_id).as_py():
            tables.append(take_columns(file.read_row_group(group, columns=schema.names), schema).filter(has_id))
    return tables


@dataclass(frozen=True, repr=False)
class Table:
    """One version of an embedding table, open for reading; other versions may be published meanwhile."""

    store: Store
    manifest: Manifest

    def __repr__(self) -> str:
        return (
            f"<Table {without_secrets(self.store.uri)}: version {self.version}, {number_of(self.count, 'vector')} of "
            f"{self.dimension} "
            f"numbers, space {self.space_id}>"
        )

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def space_id(self) -> str:
        """12 hex digits; only vectors of an encoder with this space id can be compared with these vectors."""
        return self.manifest.space_id

    @property
    def dimension(self) -> int:
        return self.manifest.dimension

    @property
    def count(self) -> int:
        """Number of vectors; rejects do not count."""
        return self.manifest.counts["vectors"]

    def to_dataset(self) -> pds.Dataset:
        """All data files as one dataset with the columns of `schema.data_schema`; failed reads are retried as in `batches`."""
        paths = [self.store.full_path(entry.path) for entry in self.manifest.files]
        return pds.dataset(paths, schema=self.schema, format="parquet", filesystem=lend(self.store))

    @property
    def schema(self) -> pa.Schema:
        """Columns of the data files: `schema.data_schema` of this version."""
        return data_schema(self.dimension, self.manifest.pins["vector_type"], self.manifest.carry)

    @property
    def files(self) -> list[str]:
        """URIs of all data files, for any reader of Parquet."""
        return [self.store.name(entry.path) for entry in self.manifest.files]

    def batches(self, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """These columns of all rows, in batches of up to `rows`. One file is open at a time; other columns are not read.

        Raises TableError for a column that does not exist, and VerificationFailed for a missing or damaged file.
        """
        schema = self._schema_of(columns)
        for entry in self.manifest.files:
            if entry.rows:
                yield from file_batches(self.store, entry.path, schema, rows)

    def rows(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of these ids, in the order of the ids, with `id` and these columns, or with all columns.

        Ids that do not exist are left out, so `id` says which row is whose.

        Only files of shards whose name an id begins with are opened, and only row groups whose range of ids includes one of
        the ids are read. Raises as `batches` does.
        """
        names = list(self.schema.names if columns is None else columns)
        names = names if "id" in names else ["id", *names]
        schema = self._schema_of(names)
        in_order = list(ids)
        of_file: dict[int, set[str]] = defaultdict(set)
        for sample_id in in_order:
            for number in self._may_hold(sample_id):
                of_file[number].add(sample_id)
        tables = [schema.empty_table()]
        for number, ids_in_file in sorted(of_file.items()):
            with opened_file(self.store, self.manifest.files[number].path, schema) as file:
                tables += _rows_with(file, ids_in_file, schema)
        rows = pa.concat_tables(tables).unify_dictionaries()
        place = {sample_id: row for row, sample_id in enumerate(rows.column("id").to_pylist())}
        order = pa.array([place[sample_id] for sample_id in in_order if sample_id in place], pa.int64())
        return rows.take(order)

    def _may_hold(self, sample_id: str) -> set[int]:
        """Numbers of the files that hold a shard with the same id prefix as this id."""
        return set().union(*(self._files_by_prefix.get(prefix, ()) for prefix in prefixes_of_ids([sample_id])))

    @cached_property
    def _files_by_prefix(self) -> dict[str, list[int]]:
        """Id prefix (the part of an id before `/` and key) → numbers of the files that hold such rows."""
        files: dict[str, list[int]] = defaultdict(list)
        for number, entry in enumerate(self.manifest.files):
            for prefix in {prefix_of(shard.name) for shard in entry.shards if shard.vectors}:
                files[prefix].append(number)
        return files

    def _schema_of(self, columns: Sequence[str]) -> pa.Schema:
        """Some columns of the data files, in this order. Raises TableError for a column that does not exist."""
        schema = self.schema
        if unknown := [name for name in columns if name not in schema.names]:
            raise TableError(f"{self.store.uri}: has no column {unknown[0]!r}. Choose from {', '.join(schema.names)}.")
        return pa.schema([schema.field(name) for name in columns])

    def rejects(self) -> pa.Table:
        """All rejects, with the columns id, shard, key, reason, detail."""
        tables = [read_rows(self.store, entry.path, REJECT_SCHEMA) for entry in self.manifest.rejects]
        return pa.concat_tables([REJECT_SCHEMA.empty_table(), *tables]).unify_dictionaries()

    def encoder(self, device: str = "cpu", base: str | None = None) -> "Encoder":
        """Load the encoder that made the vectors, in float32; queries must be embedded with it. `base` as in `load_encoder`.

        Raises VerificationFailed if the table holds another encoder under its space id.
        """
        from lora_embed.model.encoder import load_encoder  # imports torch, which reading a table does not need

        uri = f"{self.store.uri}/{encoder_path(self.space_id)}"
        encoder = load_encoder(uri, device=device, storage_options=self.store.options, base=base)
        if encoder.space_id != self.space_id:
            raise VerificationFailed(
                f"{uri}: holds an encoder of space {encoder.space_id}, expected space {self.space_id}. Restore the directory "
                "from a copy."
            )
        return encoder


def open_table(uri: str | Path, version: int | None = None, storage_options: dict[str, Any] | None = None) -> Table:
    """Open a version of a table, by default the current one. Raises TableError if it does not exist."""
    uri = str(uri) if "://" in str(uri) else os.path.expanduser(uri)
    store = Store(uri, storage_options or {})
    manifest = read_manifest(store, version)
    if manifest is None:
        raise no_version(uri, version)
    return Table(store, manifest)
