"""A data file that is being written: rows are added one table at a time, and a row group is written whenever it is full."""

import contextlib
import io
import json
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.schema import FEATURES, described
from lora_embed.table.parts import parquet_writer


class DataFile:
    """A Parquet file in memory. Its row groups have `group_rows` rows each; the last one may have fewer.

    Its schema tells Hugging Face `datasets` what all of the added rows tell alike of a column, such as the names of classes.
    """

    def __init__(self, schema: pa.Schema, group_rows: int) -> None:
        self._schema = schema
        self._group_rows = group_rows
        self._buffer = io.BytesIO()
        self._writer: pq.ParquetWriter | None = None
        self._written: dict[str, Any] = {}  # what the writer's schema tells of columns
        self._features: dict[str, Any] | None = None  # what all rows so far tell of them
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.rows = 0

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and (self._waiting_rows or self._writer is None):
            self._write(self._joined())
        if self._writer is not None:
            self._writer.close()
        if error is None and self._written != (self._features or {}):
            self._write_again()

    @property
    def data(self) -> bytes:
        """The bytes of the file; complete once it is closed."""
        return self._buffer.getvalue()

    def add(self, rows: pa.Table) -> None:
        if rows.num_rows:
            told, before = _features(rows.schema), self._features
            self._features = told if before is None else {name: told[name] for name in told if told[name] == before.get(name)}
        self._waiting.append(rows)
        self._waiting_rows += rows.num_rows
        self.rows += rows.num_rows
        if self._waiting_rows >= self._group_rows:
            table = self._joined()
            full_rows = table.num_rows - table.num_rows % self._group_rows
            self._write(table.slice(0, full_rows))
            self._waiting, self._waiting_rows = [table.slice(full_rows)], table.num_rows - full_rows

    def _joined(self) -> pa.Table:
        return pa.concat_tables([self._schema.empty_table(), *self._waiting]).unify_dictionaries()

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._written = self._features or {}
            self._writer = parquet_writer(self._buffer, described(self._schema, self._written))
        if table.num_rows:
            self._writer.write_table(table, self._group_rows)

    def _write_again(self) -> None:
        """The same rows, if later ones do not tell of a column what the first ones did: a schema is written first."""
        source, self._buffer = pq.ParquetFile(pa.BufferReader(self.data)), io.BytesIO()
        with parquet_writer(self._buffer, described(self._schema, self._features or {})) as writer:
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group), self._group_rows)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What the metadata of a part or data file tell of its columns."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        features = json.loads((schema.metadata or {})[FEATURES])["info"]["features"]
        return features if isinstance(features, dict) else {}
    return {}
