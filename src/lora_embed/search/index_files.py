"""Check the files of an index before FAISS or Lance opens them, because somebody else may have written them.

FAISS opens other files that an index names, such as lists on disk, which it maps for writing, and trusts all numbers in an
index. Lance follows the paths and URIs that a dataset names.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

MOST_ID_BYTES = 2**28  # largest size of a row group of ids, unpacked
_FLAT, _IVF, _HNSW = b"IxFI", b"IwFl", b"IHNf"
_BASE_PATHS = 18  # field of a Lance manifest that names places outside the dataset for its files


def check_plain(folder: Path) -> None:
    """Raises ValueError if a folder holds, at any depth, anything but folders and regular files, such as a link."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ValueError(f"{path.relative_to(folder)} is a link, or not a regular file")


def check_ids(ids: pq.ParquetFile, schema: pa.Schema) -> None:
    """Raises ValueError for other columns than these, and for row groups that are too large to be read at once."""
    if not ids.schema_arrow.equals(schema):
        raise ValueError(f"its ids have the columns {ids.schema_arrow.names[:9]}, expected {schema.names}, all of text")
    for number in range(ids.num_row_groups):
        if (size := ids.metadata.row_group(number).total_byte_size) > MOST_ID_BYTES:
            raise ValueError(f"row group {number} of its ids has {size:,} bytes, expected at most {MOST_ID_BYTES:,}")


def check_faiss(path: Path, kind: str, count: int, dimension: int) -> None:
    """Raises ValueError unless the whole file is a FAISS index of this kind, number of vectors and dimension.

    Also checks that every position that the index refers to lies within it.
    """
    expected, check = CHECKS[kind]
    file = _File(path)
    form = file.take("4s")
    if form != expected:
        raise ValueError(f"{path.name} begins with {form!r}, expected {expected!r} for an index of kind {kind}")
    check(file, count, dimension)
    file.expect(file.place == len(file.data), "has more bytes after the index")


def check_lance(folder: Path) -> None:
    """Raises ValueError for a dataset with links, or whose manifest names files outside of it."""
    check_plain(folder)
    for path in folder.rglob("*.manifest"):
        data = path.read_bytes()
        if data[-4:] != b"LANC" or len(data) < 20:
            raise ValueError(f"{path.name} is not a manifest of Lance")
        (start,) = struct.unpack("<Q", data[-16:-8])
        if start + 4 > len(data) - 16:
            raise ValueError(f"{path.name} begins after its end")
        (length,) = struct.unpack_from("<I", data, start)
        if _BASE_PATHS in _fields(data[start + 4 : start + 4 + length], path.name):
            raise ValueError(f"{path.name} names places outside of the dataset")
    for path in folder.rglob("*.lance"):
        if path.is_file():
            _check_lance_file(path)


def _check_lance_file(path: Path) -> None:
    """Check the last 40 bytes of a data file: Lance ends the process if they ask for more memory than there is.

    These are the positions of three tables, the numbers of buffers and of columns, a version, and the letters LANC.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 40))
        end = file.read()
    if len(end) < 40 or end[-4:] != b"LANC":
        raise ValueError(f"{path.name} is not a data file of Lance")
    *places, buffers, columns = struct.unpack("<QQQII", end[:32])
    if max(places) > size or (buffers + columns) * 16 > size:
        raise ValueError(f"{path.name} ends with positions or numbers beyond its size")


class _File:
    """A FAISS file, read field by field without copying it."""

    def __init__(self, path: Path) -> None:
        if not path.stat().st_size:
            raise ValueError(f"{path.name} is empty")
        self.name = path.name
        self.data = np.memmap(path, np.uint8, "r")
        self.place = 0

    def expect(self, holds: object, otherwise: str) -> None:
        if not holds:
            raise ValueError(f"{self.name}: {otherwise}")

    def take(self, form: str) -> Any:
        """Read one value; `form` is a format of `struct`."""
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")).tobytes())[0]

    def bytes(self, size: int) -> NDArray[np.uint8]:
        self.expect(size <= len(self.data) - self.place, "is cut off, or claims to be longer than it is")
        self.place += size
        return self.data[self.place - size : self.place]

    def array(self, kind: str) -> NDArray[Any]:
        """Read an array that begins with the number of its values."""
        return self.bytes(self.take("Q") * np.dtype(kind).itemsize).view(kind)

    def header(self, count: int, dimension: int) -> None:
        """Check the header that follows the first four letters of every index."""
        size = self.take("i"), self.take("q")
        self.expect(size == (dimension, count), f"holds {size[1]} vectors of {size[0]}, expected {count} of {dimension}")
        self.bytes(16)  # not used
        self.expect((self.take("B"), self.take("i")) == (1, 0), "is not trained, or its metric is not the inner product")

    def vectors(self, count: int, dimension: int) -> None:
        """Check a flat index, after its first four letters."""
        self.header(count, dimension)
        self.expect(len(self.array("<f4")) == count * dimension, f"does not hold {count} vectors of {dimension}")

    def flat(self, count: int, dimension: int) -> None:
        """Check a flat index within another index."""
        self.expect(self.take("4s") == _FLAT, "holds another kind of index than a flat one")
        self.vectors(count, dimension)


def _check_ivf(file: _File, count: int, dimension: int) -> None:
    file.header(count, dimension)
    lists = file.take("Q")
    file.take("Q")  # number of lists that a search reads
    file.expect(0 < lists <= count, f"has {lists} lists for {count} vectors")
    file.flat(lists, dimension)
    file.expect(file.take("B") == 0 and not len(file.array("<i8")), "has a map of ids, which `lora-embed export` never writes")
    form = file.take("4s")
    file.expect(form == b"ilar", f"keeps its lists as {form!r}, expected b'ilar', within the file")
    file.expect((file.take("Q"), file.take("Q")) == (lists, 4 * dimension), "has another number or width of lists")
    sizes = _list_sizes(file, lists)
    file.expect(sum(sizes) == count, f"has {sum(sizes)} vectors in its lists, expected {count}")
    for size in sizes:
        file.bytes(size * 4 * dimension)
        ids = file.bytes(size * 8).view("<i8")
        file.expect(not size or (ids.min() >= 0 and ids.max() < count), "names vectors that it does not hold")


def _list_sizes(file: _File, lists: int) -> list[int]:
    """Sizes of lists, in order: of all lists, or, after their numbers, of those that are not empty."""
    form = file.take("4s")
    values: list[int] = file.array("<u8").tolist()
    if form == b"full":
        file.expect(len(values) == lists, "does not say the sizes of its lists")
        return values
    numbers = values[::2]
    file.expect(form == b"sprs" and len(values) % 2 == 0, "does not say the sizes of its lists")
    file.expect(numbers == sorted(set(numbers)) and (not numbers or numbers[-1] < lists), "names lists that it does not have")
    return values[1::2]


def _check_hnsw(file: _File, count: int, dimension: int) -> None:
    file.header(count, dimension)
    file.array("<f8")  # probability of each level
    firsts, levels = file.array("<i4").astype(np.int64), file.array("<i4").astype(np.int64)
    starts, links = file.array("<u8"), file.array("<i4")
    entry, top = file.take("i"), file.take("i")
    file.bytes(12)  # width of searches
    is_sized = len(firsts) >= 2 and firsts[0] == 0 and (np.diff(firsts) >= 0).all() and firsts[-1] <= 2**16
    file.expect(is_sized and len(levels) == count and len(starts) == count + 1, "has a graph of another size")
    file.expect((levels >= 1).all() and (levels < len(firsts)).all(), "has vectors on levels that it does not have")
    file.expect((starts <= len(links)).all(), "has links beyond its end")
    ends = np.concatenate([[0], np.cumsum(firsts[levels])])
    file.expect((starts == ends).all() and ends[-1] == len(links), "has links that overlap")
    file.expect(0 <= entry < count and levels[entry] == top + 1 == levels.max(), "begins at a vector that it does not hold")
    file.expect(links.min(initial=0) >= -1 and links.max(initial=0) < count, "links to vectors that it does not hold")
    for level in range(1, int(levels.max())):
        upper = np.flatnonzero(levels > level)
        neighbours = links[starts[upper].astype(np.int64)[:, None] + np.arange(firsts[level], firsts[level + 1])]
        file.expect((levels[neighbours[neighbours >= 0]] > level).all(), "links to vectors on levels that they are not on")
    file.flat(count, dimension)


# By kind: the first four letters of the file, and the check of what follows.
CHECKS: dict[str, tuple[bytes, Callable[[_File, int, int], None]]] = {
    "faiss-flat": (_FLAT, _File.vectors),
    "faiss-ivf": (_IVF, _check_ivf),
    "faiss-hnsw": (_HNSW, _check_hnsw),
}


def _fields(message: bytes, name: str) -> set[int]:
    """Numbers of the fields of a protobuf message."""
    numbers, place = set(), 0
    while place < len(message):
        tag, place = _varint(message, place, name)
        numbers.add(tag >> 3)
        kind = tag & 7
        if kind == 0:
            place = _varint(message, place, name)[1]
        elif kind == 2:
            size, place = _varint(message, place, name)
            place += size
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError(f"{name} is no manifest of Lance")
    return numbers


def _varint(message: bytes, place: int, name: str) -> tuple[int, int]:
    """Read a protobuf number; returns it and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        value |= (message[place] & 127) << shift
        place += 1
        if message[place - 1] < 128:
            return value, place
    raise ValueError(f"{name} is cut off")
