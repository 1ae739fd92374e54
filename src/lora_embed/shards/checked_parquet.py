"""Read a stranger's Parquet file through checks: Arrow creates no extension type, and unpacks no page before it is checked."""

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.errors import MAKE_AGAIN, ShardError
from lora_embed.images.recognise import name_of
from lora_embed.shards.pages import Column, ColumnReader, Page, largest_entry
from lora_embed.shards.thrift import Thrift

TAIL = 2**16  # bytes at a file's end that are read in one request
MOST_FOOTER = 2**24  # bytes; a footer takes about fifty times its size in memory, and a microsecond a byte
MOST_PAGE, TIMES_PACKED = 2**26, 32  # a page may unpack to so many bytes, or to so many times its packed size
MOST_BATCH = 2**26  # bytes of a batch of rows, by the mean size of the rows of each page
MOST_REPEATED = 2**28  # bytes that the rows of a batch may take in memory beyond their size in the file
MOST_VALUES = 2**24  # values that a nested column may have in a row group, or eight for each unpacked byte
_MAGIC = b"PAR1"
_SCHEMA, _EXTENSION = b"ARROW:schema", b"ARROW:extension:name"
PASSED_OVER = b"-" + _EXTENSION[1:]  # replaces `_EXTENSION` in a field's metadata
_BUFFER = 2**20  # bytes that Arrow asks for at once, or a page


class ParquetFile:
    """An opened file: its `schema`, with extension types replaced by their storage types, and the `rows` of each row group.

    Raises ShardError for a file that is not Parquet, and any error of Arrow for a damaged one.
    """

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file, self._where = file, where
        self._unread = size  # bytes; columns share none, so a footer cannot make a file larger than it is
        footer = _without_extensions(self._read_footer(size), where)
        # Not by Arrow's own accessors: some of them end the process when a footer is wrong.
        described = Thrift(footer, 0).struct()
        groups = described.get(4, [])
        self.num_rows: int = described.get(3, 0)
        self.rows: list[int] = [group.get(3, 0) for group in groups]
        self._columns = [[_column_of(chunk.get(3, {}), number) for number, chunk in enumerate(group[1])] for group in groups]
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
        self._leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        # Values in lists stay in their dictionary: a list may name a large one a million times.
        lists = [leaf.path for leaf in self._leaves if leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY"]
        self._checked = _Checked(file, size)
        self._parquet = pq.ParquetFile(
            self._checked, metadata=metadata, pre_buffer=False, buffer_size=_BUFFER, read_dictionary=lists
        )
        self.schema: pa.Schema = self._parquet.schema_arrow

    def batches(self, group: int, columns: list[str], most: int) -> Iterator[pa.RecordBatch]:
        """A row group's columns, in batches of up to `most` rows, or fewer where rows are large or may repeat large values.

        A batch takes about `MOST_BATCH` bytes and two pages, or one row. Where a later page shows that batches are too large,
        the group is read again from its beginning, in smaller ones.
        """
        named = [column for column in self._columns[group] if any(f"{column.path}.".startswith(f"{name}.") for name in columns)]
        for column in named:
            self._unread -= column.size
            if column.begin < 0 or column.size < 0 or self._unread < 0:
                raise ShardError(f"{self._where}: its footer names bytes that the file does not have. {_AGAIN}")
        given = 0  # rows
        while True:
            rows = self.rows[group]
            checks = [_PageCheck(column, self._leaves[column.number], rows, most, self._where) for column in named]
            self._checked.open(named, checks)
            most = min([most, *(check.most for check in checks)])
            for check in checks:
                check.used = most
            try:
                for batch in self._read_group(group, columns, most, given):
                    yield batch
                    given += batch.num_rows
                return
            except _TooManyRows as error:
                most = min(error.most, max(1, most // 2))
            finally:
                self._checked.readers.clear()

    def _read_group(self, group: int, columns: list[str], rows: int, skipped: int) -> Iterator[pa.RecordBatch]:
        """Batches of so many rows, without the first `skipped` rows of the group."""
        try:
            for batch in self._parquet.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                if skipped < batch.num_rows:
                    yield batch.slice(skipped)
                skipped = max(0, skipped - batch.num_rows)
        except Exception:
            if self._checked.error is not None:  # which Arrow may have put into another error
                raise self._checked.error from None
            raise

    def _without_footer(self, tail: bytes) -> str:
        """What a file without a footer is, and what helps."""
        if tail[-4:] == b"PARE":
            return "is encrypted Parquet, which is not read. Write it without encryption."
        self._file.seek(0)
        head = self._file.read(4096)
        if not head or head.startswith(_MAGIC):
            return f"cannot be read as Parquet to its end ({'it has no footer' if head else 'it has 0 bytes'}). {_AGAIN}"
        return (
            f"is not Parquet, although its name says so. It has {name_of(head)}. Give it the name of what it is, or remove it."
        )

    def _read_footer(self, size: int) -> bytes:
        self._file.seek(max(0, size - TAIL))
        tail = self._file.read(TAIL)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < 12 or tail[-4:] != _MAGIC or length > size:
            raise ShardError(f"{self._where}: {self._without_footer(tail)}")
        if length > MOST_FOOTER:
            raise ShardError(
                f"{self._where}: its footer has {length} bytes; at most {MOST_FOOTER} are allowed. Write larger row groups."
            )
        if length > len(tail):
            self._file.seek(size - length)
            tail = self._file.read(length)
        return tail[-length:]


class _TooManyRows(Exception):
    """A page was found of which a batch may hold at most `most` rows, but batches are larger."""

    def __init__(self, most: int) -> None:
        super().__init__(f"at most {most} rows")
        self.most = most


class _PageCheck:
    """Checks the pages of a column one by one. `most`: the rows that a batch may hold, by the pages so far."""

    def __init__(self, column: Column, leaf: Any, rows: int, most: int, where: str) -> None:
        self._column, self._where = column, where
        self._is_list, self._has_lengths = bool(leaf.max_repetition_level), leaf.physical_type == "BYTE_ARRAY"
        self._values = self._unpacked = 0
        self.used: int | None = None  # rows of each batch, once they are read
        self.most = min(most, max(1, MOST_BATCH * rows // column.size)) if column.size else most

    def __call__(self, page: Page, read: Callable[[], memoryview]) -> None:
        if page.unpacked > max(MOST_PAGE, TIMES_PACKED * page.packed):
            raise ShardError(
                f"{self._where}: a page of {page.packed} bytes unpacks to {page.unpacked} bytes; at most {MOST_PAGE}, or "
                f"{TIMES_PACKED} times the page's own size, are allowed. {_ANEW}"
            )
        self._values, self._unpacked = self._values + page.values, self._unpacked + page.unpacked
        if self._is_list and self._values > max(MOST_VALUES, 8 * self._unpacked):
            raise ShardError(
                f"{self._where}: column {self._column.path} has {self._values} values in {self._unpacked} bytes; at most "
                f"{MOST_VALUES}, or eight for each byte, are allowed. {_ANEW}"
            )
        of_size = MOST_BATCH * page.values // max(page.unpacked, 1) if page.values and not self._is_list else self.most
        self.most = max(1, min(self.most, of_size, self._most_repeats(page, read)))
        if self.used is not None and self.most < self.used:
            raise _TooManyRows(self.most)

    def _most_repeats(self, page: Page, read: Callable[[], memoryview]) -> int:
        """The rows that a batch may hold if each repeats the largest value that this page lets it repeat."""
        repeatable = page.repeatable
        if page.is_dictionary and self._has_lengths and repeatable * self.most > MOST_REPEATED:
            repeatable = largest_entry(read(), page, self._column.codec)
        return MOST_REPEATED // repeatable if repeatable else self.most


_AGAIN = f"{MAKE_AGAIN}."
_ANEW = "Write the file again with smaller pages and without dictionaries."


class _Checked(io.RawIOBase):
    """The file that Arrow reads. It has only the bytes of opened columns, whose pages were checked."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readers: list[ColumnReader] = []
        self.error: Exception | None = None
        self._place = 0

    def open(self, columns: list[Column], checks: list[_PageCheck]) -> None:
        """Open columns, and read and check the first window of each."""
        self.error = None
        self.readers = [ColumnReader(self._file, column, check) for column, check in zip(columns, checks, strict=True)]

    def read(self, size: int = -1) -> bytes | memoryview:  # Arrow takes any buffer
        place = self._place
        self._place += size
        try:
            return next((reader.read(place, size) for reader in self.readers if reader.holds(place)), b"")
        except Exception as error:
            self.error = error
            raise

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self._place = place if whence == io.SEEK_SET else self._size + place
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _column_of(described: dict[int, Any], number: int) -> Column:
    """A column from its description in the footer. Like for Arrow, it begins with its dictionary, if it has one."""
    begin, dictionary = described.get(9, 0), described.get(11, 0)
    path = ".".join(part.decode("utf-8", "replace") for part in described.get(3, []))
    return Column(path, dictionary if 0 < dictionary < begin else begin, described.get(7, 0), number, described.get(4, 0))


def _without_extensions(footer: bytes, where: str) -> bytes:
    """The footer, of the same length, with an Arrow schema that names no extension type other than Arrow's own.

    To create an extension type runs code of the library that registered it, on bytes of the file. Ray's types unpickle such
    bytes if an environment variable is set. So Arrow does not see the schema before this.
    """
    place = footer.find(_SCHEMA) + len(_SCHEMA)
    if place < len(_SCHEMA):
        return footer
    thrift = Thrift(footer, place)
    try:
        encoded = thrift.binary()
        schema = base64.b64decode(encoded, validate=True)
    except (ValueError, IndexError):
        encoded = schema = b""
    if not encoded or base64.b64encode(schema) != encoded or _SCHEMA in footer[place:]:  # Arrow might read another schema
        raise ShardError(f"{where}: cannot be read as Parquet to its end (its Arrow schema is damaged). {_AGAIN}")
    if _EXTENSION not in schema:
        return footer
    harmless = schema.replace(_EXTENSION, PASSED_OVER)
    names = {name for field in pa.ipc.read_schema(pa.py_buffer(harmless)) for name in extensions(field)}
    if all(name.startswith("arrow.") for name in names):
        return footer
    return footer[: thrift.place - len(encoded)] + base64.b64encode(harmless) + footer[thrift.place :]


def extensions(field: pa.Field) -> Iterator[str]:
    """Names of the extension types that were removed from a field or its children."""
    name = (field.metadata or {}).get(PASSED_OVER)
    if name is not None:
        yield name.decode("utf-8", "backslashreplace")
    kind = field.type
    for part in range(kind.num_fields):
        yield from extensions(kind.field(part))
