"""Stored objects: one, and many in little memory, since an input may list millions of them."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object."""

    path: str  # below the store's root
    size: int  # bytes
    etag: str  # a mark that changes whenever the content changes
    modified: float = field(default=0.0, compare=False, repr=False)  # seconds since 1970 by the store's clock
    broken: str = ""  # why no file is behind this name of an input: a link whose target is gone, for example


class Entries:
    """Entries in the order in which they were given, without `modified`, at about 25 bytes each beside path and etag."""

    __slots__ = ("_broken", "_lengths", "_sizes", "_text")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._text, self._sizes = bytearray(), array("Q")
        self._lengths = array("L")  # of each entry two: its bytes in `_text`, and the characters of its path
        self._broken: dict[int, str] = {}
        for entry in entries:
            self.append(entry)

    def append(self, entry: Entry) -> None:
        """Add one more."""
        data = (entry.path + entry.etag).encode("utf-8", "surrogatepass")  # names on local disks need not be UTF-8
        self._text += data
        self._lengths.append(len(data))
        self._lengths.append(len(entry.path))
        if entry.broken:
            self._broken[len(self._sizes)] = entry.broken
        self._sizes.append(entry.size)

    @property
    def size(self) -> int:
        """Bytes of all objects together."""
        return sum(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Entry]:
        broken = self._broken.get
        for number, ((text, length), size) in enumerate(zip(self._texts(), self._sizes, strict=True)):
            yield Entry(text[:length], size, text[length:], 0.0, broken(number, ""))

    def paths(self) -> Iterator[str]:
        """The paths alone, in less time than the entries."""
        for text, length in self._texts():
            yield text[:length]

    def _texts(self) -> Iterator[tuple[str, int]]:
        """Of each entry, its path with the etag behind it, and the path's length in characters."""
        lengths, begin = iter(self._lengths), 0
        for size, length in zip(lengths, lengths, strict=True):
            end = begin + size
            yield self._text[begin:end].decode("utf-8", "surrogatepass"), length
            begin = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((bytes(self._text), len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} entries of {self.size} bytes>"
