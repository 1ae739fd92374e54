"""Read a stranger's Parquet file through checks: Arrow creates no extension type, and unpacks no page before it is checked."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.errors import ShardError

TAIL = 2**16  # bytes at a file's end that are read in one request
MOST_FOOTER = 2**24  # bytes; a footer takes about fifty times its size in memory, and a microsecond a byte
MOST_PAGE, TIMES_PACKED = 2**26, 32  # a page may unpack to so many bytes, or to so many times its packed size
MOST_VALUES = 2**24  # values that a nested column may have in a row group, or eight for each unpacked byte
_MAGIC = b"PAR1"
_SCHEMA, _EXTENSION = b"ARROW:schema", b"ARROW:extension:name"
PASSED_OVER = b"-" + _EXTENSION[1:]  # replaces `_EXTENSION` in a field's metadata
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # types of pages
_DELTA_BYTE_ARRAY = 7  # an encoding in which a value may repeat the beginning of the one before: a page may unpack to far more


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a column, by its header."""

    type: int
    packed: int  # bytes
    unpacked: int
    values: int = 0  # in a page with data, nulls included
    encoding: int = 0

    @property
    def repeatable(self) -> int:
        """The bytes that every row of this page may repeat; 0 for a page that unpacks to at most twice its packed size."""
        if self.type == _DICTIONARY or self.encoding == _DELTA_BYTE_ARRAY or self.unpacked > 2 * self.packed:
            return self.unpacked
        return 0


@dataclass(frozen=True)
class _Column:
    """The bytes of one column in a row group; `path` is the column's name, with its parents' names."""

    path: str
    begin: int
    size: int  # bytes
    number: int


class ParquetFile:
    """An opened file: its `schema`, with extension types replaced by their storage types, and the `rows` of each row group.

    Raises ShardError for a file that is not Parquet, and any error of Arrow for a damaged one.
    """

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file, self._where = file, where
        self._unread = size  # bytes; columns share none, so a footer cannot make a file larger than it is
        self._held = _Held(size)
        footer = _without_extensions(self._read_footer(size), where)
        # Not by Arrow's own accessors: some of them end the process when a footer is wrong.
        described = _Thrift(footer, 0).struct()
        groups = described.get(4, [])
        self.num_rows: int = described.get(3, 0)
        self.rows: list[int] = [group.get(3, 0) for group in groups]
        self._columns = [[_column_of(chunk.get(3, {}), number) for number, chunk in enumerate(group[1])] for group in groups]
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
        self._leaves = metadata.schema
        self._parquet = pq.ParquetFile(self._held, metadata=metadata, pre_buffer=False)
        self.schema: pa.Schema = self._parquet.schema_arrow

    def batches(self, group: int, columns: list[str], most: int, most_bytes: int) -> Iterator[pa.RecordBatch]:
        """A row group's columns, in batches of up to `most` rows, or fewer where rows could repeat large values.

        All columns are read, and their pages checked, before Arrow unpacks any.
        """
        named = [column for column in self._columns[group] if any(f"{column.path}.".startswith(f"{name}.") for name in columns)]
        heaviest = max(map(self._hold, named), default=0)
        most = max(1, min(most, most_bytes // max(heaviest, 1)))
        yield from self._parquet.iter_batches(batch_size=most, row_groups=[group], columns=columns)
        self._held.columns.clear()

    def _read_footer(self, size: int) -> bytes:
        self._file.seek(max(0, size - TAIL))
        tail = self._file.read(TAIL)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < 12 or tail[-4:] != _MAGIC or length > size:
            raise ShardError(f"{self._where}: cannot be read as Parquet to its end (it has no footer). Upload it again.")
        if length > MOST_FOOTER:
            raise ShardError(
                f"{self._where}: its footer has {length} bytes; at most {MOST_FOOTER} are allowed. Write larger row groups."
            )
        if length > len(tail):
            self._file.seek(size - length)
            tail = self._file.read(length)
        return tail[-length:]

    def _hold(self, column: _Column) -> int:
        """Read and check a column. Returns the most bytes that each of its rows may repeat."""
        self._unread -= column.size
        if column.begin < 0 or column.size < 0 or self._unread < 0:
            raise ShardError(f"{self._where}: its footer names bytes that the file does not have. Upload it again.")
        self._file.seek(column.begin)
        data = self._file.read(column.size)
        values = heaviest = unpacked = 0
        for page in read_pages(data):
            self._check(page)
            values, unpacked = values + page.values, unpacked + page.unpacked
            heaviest = max(heaviest, page.repeatable)
        if values > max(MOST_VALUES, 8 * unpacked) and self._leaves.column(column.number).max_repetition_level:
            raise ShardError(
                f"{self._where}: column {column.path} has {values} values in {unpacked} bytes; at most {MOST_VALUES}, or eight "
                f"for each byte, are allowed. {_ANEW}"
            )
        self._held.columns[column.begin] = data
        return heaviest

    def _check(self, page: Page) -> None:
        if page.unpacked > max(MOST_PAGE, TIMES_PACKED * page.packed):
            raise ShardError(
                f"{self._where}: a page of {page.packed} bytes unpacks to {page.unpacked} bytes; at most {MOST_PAGE}, or "
                f"{TIMES_PACKED} times the page's own size, are allowed. {_ANEW}"
            )


_ANEW = "Write the file again with smaller pages and without dictionaries."


class _Held(io.RawIOBase):
    """The file that Arrow reads. It holds only checked columns, by the position of their first byte."""

    def __init__(self, size: int) -> None:
        self.columns: dict[int, bytes] = {}
        self._size = size
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        data = self.columns.get(self._place, b"")
        self._place += size
        return data[:size]

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        self._place = place if whence == io.SEEK_SET else self._size + place
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _column_of(described: dict[int, Any], number: int) -> _Column:
    """A column from its description in the footer. Like for Arrow, it begins with its dictionary, if it has one."""
    begin, dictionary = described.get(9, 0), described.get(11, 0)
    path = ".".join(part.decode("utf-8", "replace") for part in described.get(3, []))
    return _Column(path, dictionary if 0 < dictionary < begin else begin, described.get(7, 0), number)


def _without_extensions(footer: bytes, where: str) -> bytes:
    """The footer, of the same length, with an Arrow schema that names no extension type other than Arrow's own.

    To create an extension type runs code of the library that registered it, on bytes of the file. Ray's types unpickle such
    bytes if an environment variable is set. So Arrow does not see the schema before this.
    """
    place = footer.find(_SCHEMA) + len(_SCHEMA)
    if place < len(_SCHEMA):
        return footer
    thrift = _Thrift(footer, place)
    try:
        encoded = thrift.binary()
        schema = base64.b64decode(encoded, validate=True)
    except (ValueError, IndexError):
        encoded = schema = b""
    if not encoded or base64.b64encode(schema) != encoded or _SCHEMA in footer[place:]:  # Arrow might read another schema
        raise ShardError(f"{where}: cannot be read as Parquet to its end (its Arrow schema is damaged). Upload it again.")
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


def read_pages(data: bytes) -> Iterator[Page]:
    """The pages of a column, by their headers alone.

    Raises ValueError, KeyError or IndexError where the bytes are not a sequence of pages.
    """
    place = 0
    while place < len(data):
        thrift = _Thrift(data, place)
        header = thrift.struct()
        kind, unpacked, packed = (int(header[number]) for number in (1, 2, 3))
        place = thrift.place + packed
        if not 0 <= packed < 2**31 or not 0 <= unpacked < 2**31 or place > len(data):
            raise ValueError(f"a page of {packed} bytes that unpacks to {unpacked}")
        inner = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, 0), {})
        encoding = inner.get(4 if kind == _DATA_2 else 2, 0)
        values = inner.get(1, 0) if kind != _DICTIONARY else 0
        yield Page(type=kind, packed=packed, unpacked=unpacked, values=values, encoding=encoding)


_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


class _Thrift:
    """A reader of Thrift's compact protocol, from a position in some bytes on."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self.place = data, place

    def struct(self) -> dict[int, Any]:
        """A struct: field number → number, bytes, list or struct; true and false are ignored."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            if head & 15 not in (_TRUE, _FALSE):
                fields[number] = self._value(head & 15)
        return fields

    def binary(self) -> bytes:
        """The value of the next field, which must be of type binary."""
        if self._byte() & 15 != _BINARY:
            raise ValueError("another type where text was expected")
        return self._take(self._varint())

    def _value(self, kind: int) -> Any:
        if 3 < kind < _DOUBLE:
            return self._number()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct()
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._element(head & 15) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [(self._element(kinds >> 4), self._element(kinds & 15)) for _ in range(count)]
        if kind not in (_BYTE, _DOUBLE):
            raise ValueError(f"a field of type {kind}, which Thrift does not know")
        return self._take(1 if kind == _BYTE else 8)

    def _element(self, kind: int) -> Any:
        return self._byte() if kind in (_TRUE, _FALSE) else self._value(kind)  # in a list, true and false take a byte

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self.place:
            raise ValueError(f"a value of {length} bytes where fewer are left")
        self.place += length
        return self._data[self.place - length : self.place]

    def _byte(self) -> int:
        byte = self._data[self.place]
        self.place += 1
        return byte

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    def _number(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
