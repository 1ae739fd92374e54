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
        self._text, self._lengths, self._sizes = bytearray(), array("L"), array("Q")
        self._broken: dict[int, str] = {}
        for entry in entries:
            self.append(entry)

    def append(self, entry: Entry) -> None:
        """Add one more."""
        for text in (entry.path, entry.etag):
            data = text.encode("utf-8", "surrogatepass")  # names on local disks need not be UTF-8
            self._text += data
            self._lengths.append(len(data))
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
        end = 0
        for number, size in enumerate(self._sizes):
            path_end = end + self._lengths[2 * number]
            begin, end = end, path_end + self._lengths[2 * number + 1]
            path, etag = (
                bytes(part).decode("utf-8", "surrogatepass") for part in (self._text[begin:path_end], self._text[path_end:end])
            )
            yield Entry(path=path, size=size, etag=etag, broken=self._broken.get(number, ""))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash((bytes(self._text), len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} entries of {self.size} bytes>"
