"""A Parquet file from somebody else, as Arrow gets to see it: no foreign type is made, no page is unpacked unchecked."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lora_embed.errors import ShardError

TAIL = 2**16  # bytes that are read at once of a file's end
MOST_FOOTER = 2**24  # bytes; it takes some fifty times as much memory, and a microsecond a byte
MOST_PAGE, TIMES_PACKED = 2**26, 32  # bytes that a page may unpack to: so many, or so many times its own where that is more
MOST_VALUES = 2**24  # of a nested column in a row group, where it is less than eight to a byte
_MAGIC = b"PAR1"
_SCHEMA, _EXTENSION = b"ARROW:schema", b"ARROW:extension:name"
PASSED_OVER = b"-" + _EXTENSION[1:]  # what stands in a field's metadata instead
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # types of pages
_DELTA_BYTE_ARRAY = 7  # an encoding: each value may begin as the one before it ends up, so a page may hold far more than it has


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page of a column, as its header says."""

    type: int
    packed: int  # bytes
    unpacked: int
    values: int = 0  # of a page with data; nulls count
    encoding: int = 0

    @property
    def repeatable(self) -> int:
        """Bytes of it that a row may take, and the row after it again; 0 where it holds little more than the file itself."""
        if self.type == _DICTIONARY or self.encoding == _DELTA_BYTE_ARRAY or self.unpacked > 2 * self.packed:
            return self.unpacked
        return 0


@dataclass(frozen=True)
class _Column:
    """Where a column of a row group lies, by the path of its name."""

    path: str
    begin: int
    size: int  # bytes
    number: int


class ParquetFile:
    """An opened file: its `schema`, but for extension types, which are passed over, and the `rows` that each group has.

    Raises ShardError for what is no Parquet file, and whatever Arrow raises over a damaged one.
    """

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self._file, self._where = file, where
        self._unread = size  # bytes: columns do not share any, so no footer makes more of a file than there is
        self._held = _Held(size)
        footer = _without_extensions(self._read_footer(size), where)
        # Not by Arrow's own accessors: from some, what is thrown over a bent footer ends the process.
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
        """A row group's columns, in batches of up to `most` rows: fewer where they could repeat large values.

        Each column's bytes are read, and their pages checked, before Arrow unpacks one.
        """
        wanted = [one for one in self._columns[group] if any(f"{one.path}.".startswith(f"{name}.") for name in columns)]
        heaviest = max(map(self._hold, wanted), default=0)
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
                f"{self._where}: its footer has {length} bytes, allowed are {MOST_FOOTER}. Write larger row groups."
            )
        if length > len(tail):
            self._file.seek(size - length)
            tail = self._file.read(length)
        return tail[-length:]

    def _hold(self, column: _Column) -> int:
        """Read and check a column; the most bytes that each row of it may repeat."""
        self._unread -= column.size
        if column.begin < 0 or column.size < 0 or self._unread < 0:
            raise ShardError(f"{self._where}: its footer gives a column bytes that it has not. Upload it again.")
        self._file.seek(column.begin)
        data = self._file.read(column.size)
        values = heaviest = unpacked = 0
        for page in read_pages(data):
            self._check(page)
            values, unpacked = values + page.values, unpacked + page.unpacked
            heaviest = max(heaviest, page.repeatable)
        if values > max(MOST_VALUES, 8 * unpacked) and self._leaves.column(column.number).max_repetition_level:
            raise ShardError(f"{self._where}: column {column.path} has {values} values in {unpacked} bytes. {_ANEW}")
        self._held.columns[column.begin] = data
        return heaviest

    def _check(self, page: Page) -> None:
        if page.unpacked > max(MOST_PAGE, TIMES_PACKED * page.packed):
            raise ShardError(
                f"{self._where}: a page of {page.packed} bytes unpacks to {page.unpacked}, allowed are {MOST_PAGE}, or "
                f"{TIMES_PACKED} times its own. {_ANEW}"
            )


_ANEW = "Write it anew with smaller pages and without dictionaries."


class _Held(io.RawIOBase):
    """The file that Arrow reads: columns by their first byte, and nothing else."""

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
    """By what the footer says of it, as Arrow takes it: a dictionary stands first where there is one."""
    begin, dictionary = described.get(9, 0), described.get(11, 0)
    path = ".".join(part.decode("utf-8", "replace") for part in described.get(3, []))
    return _Column(path, dictionary if 0 < dictionary < begin else begin, described.get(7, 0), number)


def _without_extensions(footer: bytes, where: str) -> bytes:
    """The footer, in whose Arrow schema no field names an extension type, but for Arrow's own; of the same length.

    To make such a type is to run code of the library that registered it, on bytes of the file: Ray's take pickles there
    where a variable of the environment says so. So Arrow itself is not asked for the schema before.
    """
    place = footer.find(_SCHEMA) + len(_SCHEMA)
    if place < len(_SCHEMA):
        return footer
    thrift = _Thrift(footer, place)
    try:
        given = thrift.binary()
        schema = base64.b64decode(given, validate=True)
    except (ValueError, IndexError):
        given = schema = b""
    if not given or base64.b64encode(schema) != given or _SCHEMA in footer[place:]:  # Arrow might read another one
        raise ShardError(f"{where}: cannot be read as Parquet to its end (its Arrow schema is damaged). Upload it again.")
    if _EXTENSION not in schema:
        return footer
    mended = schema.replace(_EXTENSION, PASSED_OVER)
    names = {name for field in pa.ipc.read_schema(pa.py_buffer(mended)) for name in extensions(field)}
    if all(name.startswith("arrow.") for name in names):
        return footer
    return footer[: thrift.place - len(given)] + base64.b64encode(mended) + footer[thrift.place :]


def extensions(field: pa.Field) -> Iterator[str]:
    """Names of the extension types that a field, or a part of it, was passed over for."""
    name = (field.metadata or {}).get(PASSED_OVER)
    if name is not None:
        yield name.decode("utf-8", "backslashreplace")
    kind = field.type
    for part in range(kind.num_fields):
        yield from extensions(kind.field(part))


def read_pages(data: bytes) -> Iterator[Page]:
    """The pages of a column, by their headers alone.

    Raises ValueError, KeyError or IndexError where its bytes are no row of pages.
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
    """What Thrift's compact protocol wrote at a place of some bytes."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self.place = data, place

    def struct(self) -> dict[int, Any]:
        """A struct: its numbers, bytes, lists and structs by the numbers of the fields; other types are passed over."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            if head & 15 not in (_TRUE, _FALSE):
                fields[number] = self._value(head & 15)
        return fields

    def binary(self) -> bytes:
        """The value of the field of that type that follows."""
        if self._byte() & 15 != _BINARY:
            raise ValueError("no text where text was expected")
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
        return self._byte() if kind in (_TRUE, _FALSE) else self._value(kind)  # within a list these take a byte

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self.place:
            raise ValueError(f"{length} bytes where fewer follow")
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
