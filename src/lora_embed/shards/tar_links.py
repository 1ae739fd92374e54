"""Follow the links of a tar to the members that they lead to. No link leads out of the archive."""

import posixpath
import tarfile
from array import array
from bisect import bisect
from typing import BinaryIO

from lora_embed.shards.tar_headers import Headers, header_at, open_headers, read_members
from lora_embed.text import printable

MOST_STEPS = 40  # from link to link, as on Linux
MOST_INDEXED = 4_000_000  # members among which the target of a link is searched; an index of so many takes 0.5 GB


class Links:
    """The names of a tar's members and where their headers are, as far as it was read. The rest is read when a link needs it.

    A link leads to the nearest member of that name before it, or else to the first one after it.
    """

    def __init__(self, file: BinaryIO, tar: tarfile.TarFile, headers: Headers, where: str, begin: int) -> None:
        self._file, self._tar, self._headers, self._where = file, tar, headers, where
        self._begin = begin  # where reading began: what is before is not known yet
        self._is_whole = False
        self._hashes, self._offsets = array("q"), array("Q")
        self._index: dict[int, list[int]] | None = None  # made when the first link is followed: most tars have none

    def note(self, member: tarfile.TarInfo) -> None:
        """Remember where a member is."""
        if self._is_whole or len(self._offsets) >= MOST_INDEXED:
            return
        name = hash(_plain(member.name))
        self._hashes.append(name)
        self._offsets.append(member.offset)
        if self._index is not None:
            self._index.setdefault(name, []).append(member.offset)

    def follow(self, member: tarfile.TarInfo) -> tarfile.TarInfo | str:
        """The member that holds the content: this one, or the one that a link leads to. Text says why there is none."""
        if member.isreg():
            return member
        said = f"a link to {printable(member.linkname)}"
        for _ in range(MOST_STEPS):
            if member.isreg():
                return member
            if not member.islnk() and not member.issym():
                return "a pipe or device" if said == "a link to " else f"{said}, which is a folder, pipe or device"
            offset = self._find(_target_of(member), member.offset)
            if offset is None:
                return f"{said}, which is not in the archive"
            member = header_at(self._tar, self._headers, offset)
        return f"{said}, which leads in a circle"

    def _find(self, name: str, near: int) -> int | None:
        """Where the header of the member of this name is."""
        if self._begin:
            self._scan(0, self._begin)
            self._begin = 0
        if (offset := self._nearest(name, near)) is None and not self._is_whole:
            self._scan(self._tar.offset, None)
            self._is_whole = True
            offset = self._nearest(name, near)
        return offset

    def _nearest(self, name: str, near: int) -> int | None:
        """The member of this name that is nearest before the byte `near`, or else the first after it."""
        if self._index is None:
            self._index = {}
            for known, offset in zip(self._hashes, self._offsets, strict=True):
                self._index.setdefault(known, []).append(offset)
        offsets = sorted(self._index.get(hash(name), []))
        place = bisect(offsets, near - 1)
        for offset in [*reversed(offsets[:place]), *offsets[place:]]:
            if offset != near and _plain(header_at(self._tar, self._headers, offset).name) == name:
                return offset
        return None

    def _scan(self, start: int, end: int | None) -> None:
        """Read the headers of another part of the tar."""
        self._file.seek(start)
        tar, headers = open_headers(self._file, self._where)
        for member in read_members(tar, headers, end):
            self.note(member)


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _target_of(link: tarfile.TarInfo) -> str:
    """The name that a link leads to: of a hard link a member's name, of a symbolic one a path from the link's folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))
