"""Parquet files of a table, which others may have written: the one place where they are opened to be read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.errors import LoraEmbedError, VerificationFailed
from lora_embed.store.store import READ_AHEAD, Store

BATCH_ROWS = 8192
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, KeyError, MemoryError)


@contextmanager
def damage_named(where: str, kinds: tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """What Arrow says of a table's file that is none of ours, or no longer → VerificationFailed, naming `where`."""
    try:
        yield
    except FileNotFoundError:
        raise VerificationFailed(f"{where}: is gone, though it is referred to") from None
    except LoraEmbedError:
        raise
    except kinds as error:
        says = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise VerificationFailed(
            f"{where}: cannot be read as what lora-embed has written there ({says}). Bring it back from a copy, or return to a "
            "version without it by `lora-embed rollback`."
        ) from None


def _open(data: Any, where: str) -> pq.ParquetFile:
    """Whatever is raised here is the file's fault: types of Ray's, which a schema may name, raise what they like."""
    with damage_named(where, (Exception,)):
        return pq.ParquetFile(data)


def read_rows(store: Store, path: str) -> pa.Table:
    """A Parquet file of the table, whole. Raises VerificationFailed when it is gone or damaged."""
    data, where = store.read(path), store.name(path)
    if data is None:
        raise VerificationFailed(f"{where}: is gone, though it is referred to")
    with damage_named(where):
        file = _open(pa.BufferReader(data), where)  # of a small part, read_table takes three times as long
        return file.read(use_threads=len(data) > 2**20).replace_schema_metadata(None)


@contextmanager
def opened_file(store: Store, path: str, ahead: int = READ_AHEAD) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the table, to be read in pieces. Raises VerificationFailed when it is gone or damaged."""
    where = store.name(path)
    with damage_named(where), store.open(path, ahead) as data:
        yield _open(data, where)


def file_batches(store: Store, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file of the table in batches, read once and in their order; raises as `opened_file` does."""
    with opened_file(store, path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns)


def count_values(column: pa.ChunkedArray | pa.Array) -> Counter[str]:
    """How often each text stands in a column."""
    return Counter({pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()})
