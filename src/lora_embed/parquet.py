"""Parquet files of a table, which others may have written: the one place where they are opened to be read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.errors import VerificationFailed
from lora_embed.storage import READ_AHEAD, Store

BATCH_ROWS = 8192


@contextmanager
def damage_named(where: str) -> Iterator[None]:
    """What Arrow says of a table's file that is none of ours, or no longer → VerificationFailed, naming `where`."""
    try:
        yield
    except FileNotFoundError:
        raise VerificationFailed(f"{where}: is gone, though it is referred to") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError, MemoryError) as error:
        says = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise VerificationFailed(
            f"{where}: cannot be read as what lora-embed has written there ({says}). Bring it back from a copy, or return to a "
            "version without it by `lora-embed rollback`."
        ) from None


def read_rows(store: Store, path: str) -> pa.Table:
    """A Parquet file of the table, whole. Raises VerificationFailed when it is gone or damaged."""
    data = store.read(path)
    if data is None:
        raise VerificationFailed(f"{store.name(path)}: is gone, though it is referred to")
    with damage_named(store.name(path)):
        file = pq.ParquetFile(pa.BufferReader(data))  # of a small part, read_table takes three times as long
        return file.read(use_threads=len(data) > 2**20).replace_schema_metadata(None)


@contextmanager
def opened_file(store: Store, path: str, ahead: int = READ_AHEAD) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the table, to be read in pieces. Raises VerificationFailed when it is gone or damaged."""
    with damage_named(store.name(path)), store.open(path, ahead) as data:
        yield pq.ParquetFile(data)


def file_batches(store: Store, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file of the table in batches, read once and in their order; raises as `opened_file` does."""
    with opened_file(store, path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns)
