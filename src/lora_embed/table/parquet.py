"""Read the Parquet files of a table. Somebody else may have written them, so they are opened for reading only here."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.errors import LoraEmbedError, VerificationFailed
from lora_embed.store.store import READ_AHEAD, Store

BATCH_ROWS = 8192
RESTORE = "Restore it from a copy, or return to a version without it with `lora-embed rollback`."
RETURN = "Return to an earlier version with `lora-embed rollback`, and run the job again."
FIND = "Run `lora-embed verify` to find the damaged file."
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, KeyError, MemoryError)


@contextmanager
def damage_named(where: str, kinds: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Turn what Arrow raises for a missing, damaged or foreign file of a table into VerificationFailed, naming `where`."""
    try:
        yield
    except FileNotFoundError:
        raise VerificationFailed(missing(where)) from None
    except LoraEmbedError:
        raise
    except kinds as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise VerificationFailed(f"{where}: is damaged, or lora-embed did not write it ({reason}). {RESTORE}") from None


def missing(where: str) -> str:
    """The message for a file that should exist at `where`."""
    return f"{where}: is missing, but the table needs it. {RESTORE}"


def _open(data: Any, where: str) -> pq.ParquetFile:
    """Open a file. Every exception counts as damage: a schema may name types of Ray's, which raise any kind."""
    with damage_named(where, (Exception,)):
        return pq.ParquetFile(data)


def _check_columns(file: pq.ParquetFile, schema: pa.Schema) -> None:
    """Raises KeyError or ArrowInvalid, unless the file has the columns of `schema`; those that may be null can be missing."""
    for column in schema:
        if column.nullable and column.name not in file.schema_arrow.names:
            continue
        kind_in_file = file.schema_arrow.field(column.name).type
        if kind_in_file != column.type:
            raise pa.ArrowInvalid(f"column {column.name} is of type {kind_in_file}, expected {column.type}")


def take_columns(rows: Rows, schema: pa.Schema) -> Rows:
    """Exactly the columns of `schema`. One that the rows lack is null: an older release wrote them, which did not know it.

    The rows keep the metadata of their own schema.
    """
    columns = [
        rows.column(column.name) if column.name in rows.schema.names else pa.nulls(rows.num_rows, column.type)
        for column in schema
    ]
    return type(rows).from_arrays(columns, schema=schema.with_metadata(rows.schema.metadata))


def read_rows(store: Store, path: str, schema: pa.Schema) -> pa.Table:
    """All rows of a Parquet file of the table, with the columns of `schema`, as `take_columns` makes them.

    Raises VerificationFailed if the file is missing or damaged.
    """
    data, where = store.read(path), store.name(path)
    if data is None:
        raise VerificationFailed(missing(where))
    with damage_named(where):
        file = _open(pa.BufferReader(data), where)  # read_table takes three times as long for a small part
        _check_columns(file, schema)
        return take_columns(file.read(schema.names, use_threads=len(data) > 2**20), schema)


@contextmanager
def opened_file(store: Store, path: str, schema: pa.Schema, ahead: int = READ_AHEAD) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the table, open for reading these columns in pieces; `take_columns` adds those that it lacks.

    Raises VerificationFailed if it is missing or damaged.
    """
    where = store.name(path)
    with damage_named(where), store.open(path, ahead) as data:
        file = _open(data, where)
        _check_columns(file, schema)
        yield file


def file_batches(store: Store, path: str, schema: pa.Schema, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file of the table, in order, in batches of up to `rows`, with the columns of `schema`.

    Other columns are not read. Raises as `opened_file` does.
    """
    with opened_file(store, path, schema) as file:
        for batch in file.iter_batches(rows, columns=schema.names):
            yield take_columns(batch, schema)


def count_values(column: pa.ChunkedArray | pa.Array) -> Counter[str]:
    """How often each text occurs in a column."""
    return Counter({pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()})
