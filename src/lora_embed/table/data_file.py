"""A data file that is being written: rows are added one table at a time, and a row group is written whenever it is full."""

import io
from types import TracebackType

import pyarrow as pa

from lora_embed.table.parts import parquet_writer


class DataFile:
    """A Parquet file in memory. Its row groups have `group_rows` rows each; the last one may have fewer."""

    def __init__(self, schema: pa.Schema, group_rows: int) -> None:
        self._schema = schema
        self._group_rows = group_rows
        self._buffer = io.BytesIO()
        self._writer = parquet_writer(self._buffer, schema)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.rows = 0

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._waiting_rows:
            self._write(self._joined())
        self._writer.close()

    @property
    def data(self) -> bytes:
        """The bytes of the file; complete once it is closed."""
        return self._buffer.getvalue()

    def add(self, rows: pa.Table) -> None:
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
        self._writer.write_table(table, self._group_rows)
