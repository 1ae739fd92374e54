"""Columns of a stranger's Parquet file, read in windows: no byte is given to Arrow before its page's header is checked."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, TypeAlias

import pyarrow as pa

from lora_embed.shards.thrift import Thrift

WINDOW = 2**25  # bytes of a column that are read and held at once; more for a larger page
MOST_HEADER = 2**24  # bytes of a page's header, as for Arrow
_STEP = 2**16  # bytes that are read in addition where a window ends within a header
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # types of pages
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}  # of those that Arrow reads, by their numbers
_MOST_ENTRIES = 2**16  # of a dictionary, that are measured one by one
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
    def is_dictionary(self) -> bool:
        return self.type == _DICTIONARY

    @property
    def repeatable(self) -> int:
        """The bytes that every row of this page may repeat; 0 for a page that unpacks to at most twice its packed size."""
        if self.is_dictionary or self.encoding == _DELTA_BYTE_ARRAY or self.unpacked > 2 * self.packed:
            return self.unpacked
        return 0


@dataclass(frozen=True)
class Column:
    """The bytes of one column in a row group; `path` is the column's name, with its parents' names."""

    path: str
    begin: int
    size: int  # bytes
    number: int
    codec: int = 0

    @property
    def end(self) -> int:
        return self.begin + self.size


Check: TypeAlias = Callable[[Page, Callable[[], memoryview]], None]  # of a page, and what reads the bytes of that page


class ColumnReader:
    """Reads a column from its first byte on. `check` is called for each page, and may raise, before the page can be read."""

    def __init__(self, file: BinaryIO, column: Column, check: Check) -> None:
        self._file, self._column, self._check = file, column, check
        self._begin = self._checked = column.begin  # of the window; of the first page that is not checked
        self._window = memoryview(b"")
        self.fill(column.begin, column.begin)

    def holds(self, place: int) -> bool:
        """Does the byte at this place belong to the column?"""
        return self._column.begin <= place < self._column.end

    def read(self, place: int, size: int) -> memoryview:
        end = min(place + size, self._column.end)
        if end > self._begin + len(self._window):
            self.fill(place, end)
        return self._window[place - self._begin : end - self._begin]

    def fill(self, place: int, end: int) -> None:
        """Move the window: from `place` up to `end` at least. Raises ValueError, KeyError or IndexError for damaged headers."""
        if not self._begin <= place <= self._checked:
            raise ValueError("a column that is not read in order")
        self._window, self._begin = self._window[place - self._begin :], place
        self._extend(max(end, min(place + WINDOW, self._column.end)))
        while self._checked < self._begin + len(self._window):
            page, begin = self._next_page()
            self._checked = begin + page.packed
            if not 0 <= page.packed < 2**31 or not 0 <= page.unpacked < 2**31 or self._checked > self._column.end:
                raise ValueError(f"a page of {page.packed} bytes that unpacks to {page.unpacked}")
            self._check(page, partial(self._bytes_of, page, begin))

    def _bytes_of(self, page: Page, begin: int) -> memoryview:
        """The bytes of a page, still packed, whose data begins at this place. The window then ends with the page, or later."""
        end = begin + page.packed
        if end > self._begin + len(self._window):
            self._extend(end)
        return self._window[begin - self._begin : end - self._begin]

    def _next_page(self) -> tuple[Page, int]:
        """The first page that is not checked, and where its data begins. More is read if its header is not in the window."""
        step = _STEP
        while True:
            try:
                return read_page(self._window, self._checked - self._begin, self._begin)
            except (IndexError, ValueError):  # the header ends after the window, or is damaged
                end = self._begin + len(self._window)
                if end == self._column.end or end - self._checked > MOST_HEADER:
                    raise
                self._extend(min(end + step, self._column.end))
                step *= 2

    def _extend(self, end: int) -> None:
        # In Arrow's pool, which takes less time for memory that it had before than `bytes` takes for new memory.
        window = memoryview(pa.allocate_buffer(end - self._begin)).cast("B")
        held = len(self._window)
        window[:held] = self._window
        self._file.seek(self._begin + held)
        if self._file.readinto(window[held:]) != len(window) - held:  # type: ignore[attr-defined]  # all files have it
            raise ValueError("a column that ends after the file")
        self._window = window


def read_page(data: bytes | memoryview, place: int, start: int = 0) -> tuple[Page, int]:
    """The page whose header begins at a place in some bytes, and where its data begins, both counted with `start`.

    Raises ValueError, KeyError or IndexError where there is no whole header.
    """
    thrift = Thrift(data, place)
    header = thrift.struct()
    kind, unpacked, packed = (int(header[number]) for number in (1, 2, 3))
    inner = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, 0), {})
    encoding = inner.get(4 if kind == _DATA_2 else 2, 0)
    values = inner.get(1, 0) if kind != _DICTIONARY else 0
    return Page(type=kind, packed=packed, unpacked=unpacked, values=values, encoding=encoding), start + thrift.place


def largest_entry(data: memoryview, page: Page, codec: int) -> int:
    """The bytes of the largest value in a dictionary of texts or bytes, or more where it has too many values.

    `data` are the bytes of its page; `codec` is the number that Parquet gives to what packed them. Raises ValueError,
    struct.error or an error of Arrow for damaged ones.
    """
    if codec and codec not in _CODECS:
        return page.unpacked
    packed = pa.py_buffer(data)
    unpacked = pa.decompress(packed, page.unpacked, _CODECS[codec]) if codec else packed
    place = largest = 0
    for _ in range(_MOST_ENTRIES):
        if place >= len(unpacked):
            break
        (size,) = struct.unpack_from("<I", unpacked, place)
        place, largest = place + 4 + size, max(largest, size)
    return max(largest, len(unpacked) - place)
