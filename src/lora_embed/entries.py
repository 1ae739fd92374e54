"""Stored objects: one, and many in little memory, since an input may list millions of them."""

import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_BLOCK = 64  # entries that are packed together
_CODEC = ("utf-8", "surrogatepass")  # names on local disks need not be UTF-8


State = tuple[str, int, str, str]  # path, size, etag and `broken` of an entry


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object."""

    path: str  # below the store's root
    size: int  # bytes
    etag: str  # a mark that changes whenever the content changes
    modified: float = field(default=0.0, compare=False, repr=False)  # seconds since 1970 by the store's clock
    broken: str = ""  # why no file is behind this name of an input: a link whose target is gone, for example

    @property
    def state(self) -> State:
        """What decides whether it has changed."""
        return self.path, self.size, self.etag, self.broken


class Entries:
    """Entries in the order in which they were given, without `modified`, at about 12 bytes each beside path and etag."""

    __slots__ = ("_broken", "_ends", "_etags", "_odd", "_packed", "_paths", "_sizes")

    def __init__(self, states: Iterable[State] = ()) -> None:
        self._packed, self._ends = bytearray(), array("Q")  # blocks of paths and of etags in turn, and where each ends
        self._odd: dict[int, list[str]] = {}  # blocks that cannot be packed
        self._paths, self._etags = list[str](), list[str]()  # of the last entries, which are not in a block yet
        self._sizes = array("Q")
        self._broken: dict[int, str] = {}
        states = iter(states)
        while block := list(itertools.islice(states, _BLOCK)):
            paths, sizes, etags, broken = zip(*block, strict=True)
            self._broken.update((number, why) for number, why in enumerate(broken, len(self)) if why)
            self._sizes.extend(sizes)
            self._paths, self._etags = list(paths), list(etags)
            if len(paths) == _BLOCK:
                self._end_block()

    def add(self, path: str, size: int, etag: str, broken: str = "") -> None:
        """Add one more."""
        if broken:
            self._broken[len(self._sizes)] = broken
        self._paths.append(path)
        self._sizes.append(size)
        self._etags.append(etag)
        if len(self._paths) == _BLOCK:
            self._end_block()

    def _end_block(self) -> None:
        self._pack(self._paths)
        self._pack(self._etags)
        self._paths, self._etags = [], []

    def _pack(self, texts: list[str]) -> None:
        """Texts in little memory, unless one holds a NUL, which no name on a disk does."""
        packed = "\0".join(texts)
        if packed.count("\0") == len(texts) - 1:
            self._packed += packed.encode(*_CODEC)
        else:
            self._odd[len(self._ends)] = texts
        self._ends.append(len(self._packed))

    @property
    def size(self) -> int:
        """Bytes of all objects together."""
        return sum(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Entry]:
        return (Entry(path, size, etag, 0.0, broken) for path, size, etag, broken in self.states())

    def paths(self) -> Iterator[str]:
        """The paths alone, in less time than the entries."""
        return (path for paths, _ in self._blocks() for path in paths)

    def states(self) -> Iterator[State]:
        """What the entries hold, in a fifth of the time."""
        sizes, broken = iter(self._sizes), map(self._broken.get, itertools.count(), itertools.repeat(""))
        for paths, etags in self._blocks():
            yield from zip(paths, sizes, etags, broken)  # noqa: B905 (the paths end first)

    def _blocks(self) -> Iterator[tuple[list[str], list[str]]]:
        for number in range(0, len(self._ends), 2):
            yield self._unpacked(number), self._unpacked(number + 1)
        yield self._paths, self._etags

    def _unpacked(self, number: int) -> list[str]:
        begin = self._ends[number - 1] if number else 0
        return self._odd.get(number) or self._packed[begin : self._ends[number]].decode(*_CODEC).split("\0")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and list(self.states()) == list(other.states())

    def __hash__(self) -> int:
        return hash(tuple(self._sizes))

    def __repr__(self) -> str:
        return f"<{len(self)} entries of {self.size} bytes>"
