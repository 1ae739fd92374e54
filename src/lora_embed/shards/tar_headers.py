"""Read the headers of a tar through `tarfile`, with limits for each member and in total."""

import contextlib
import re
import tarfile
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

from lora_embed.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
MOST_HEADERS = 2**20 + 16 * BLOCK  # bytes of headers before one member: its own, and those with its long name or attributes
MEAN_HEADERS = 2**13  # bytes of headers for each member on average, in addition: two of the longest paths on Linux
_DIGITS = re.compile(rb"[0-9]{257}")  # so many digits in a row: the time of `tarfile` grows with the square of their number
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_GLOBAL_FIELDS = ("path", "size")  # fields of a header for the whole tar that change what is read


def open_headers(file: BinaryIO, where: str) -> tuple[tarfile.TarFile, "Headers"]:
    """A tar whose headers are read from the file's present position on.

    Names that are not UTF-8 are escaped, since an id must be UTF-8 and equal on every machine.
    """
    headers = Headers(file, where)
    return tarfile.TarFile(fileobj=cast(IO[bytes], headers), encoding="utf-8", errors="backslashreplace"), headers


class Headers:
    """The file from which `tarfile` reads headers. It allows a certain number of bytes, and some more with each member.

    So the size of every kind of header is limited before it is read, and their total grows only with the members.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self.seek, self.tell = file.seek, file.tell
        self._left = float(MOST_HEADERS)
        self._is_pax = False  # True if the next bytes are the content of a pax header
        self.has_global = False  # True after a header with attributes for the whole tar

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise ShardError(
                f"{self._where}: incomplete or damaged tar: the headers before the member at byte {self.tell()} have more than "
                f"{MOST_HEADERS} bytes, or all headers more than {MEAN_HEADERS} bytes a member on average. Write the tar again "
                "with shorter names and without global pax headers."
            )
        self._left -= size
        data = self._file.read(size)
        if self._is_pax:
            _check_pax(data)
        self._is_pax = not self._is_pax and size == BLOCK and data[156:157] in _PAX
        return data

    def pass_member(self, tar: tarfile.TarFile) -> None:
        """Called when a member's headers were read. Of headers for the whole tar, only `_GLOBAL_FIELDS` are kept.

        Otherwise `tarfile` would go through all of them again for each member.
        """
        self._left = min(self._left + MEAN_HEADERS, MOST_HEADERS)
        if tar.pax_headers:
            self.has_global = True
            tar.pax_headers = {name: tar.pax_headers[name] for name in _GLOBAL_FIELDS if name in tar.pax_headers}

    def content(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        """A member's content, which does not count as a header."""
        if not member.issparse():
            self.seek(member.offset_data)
            return self._file.read(member.size)
        stream, left, self._left = tar.extractfile(member), self._left, float("inf")
        assert stream is not None
        try:
            return stream.read()
        finally:
            self._left = left

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which the header of another member is read; it does not count among those that are read in order."""
        left, is_pax, has_global = self._left, self._is_pax, self.has_global
        self._left, self._is_pax = float(MOST_HEADERS), False
        try:
            yield
        finally:
            self._left, self._is_pax, self.has_global = left, is_pax, has_global


def read_members(tar: tarfile.TarFile, headers: Headers, end: int | None) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # to save memory: a tar may have a million members
        headers.pass_member(tar)
        if member.size < 0:  # tarfile would go back by so many bytes, and never end
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        yield member
        if tar.offset == end:
            return


def header_at(tar: tarfile.TarFile, headers: Headers, offset: int) -> tarfile.TarInfo:
    """The member whose headers begin at this byte. Where the tar is read in order stays as it is."""
    before = tar.offset
    try:
        with headers.aside():
            headers.seek(offset)
            return tarfile.TarInfo.fromtarfile(tar)
    finally:
        tar.offset = before


def _check_pax(data: bytes) -> None:
    """Raises ValueError unless data are records `length keyword=value`: some others take `tarfile` of Python 3.11 hours."""
    place = 0
    while place < len(data) and data[place]:
        length = data[place : place + 10].partition(b" ")[0]
        end = place + int(length) if length.isdigit() else 0
        if end <= place or data[end - 1 : end] != b"\n" or data.find(b"=", place, end) < 0:
            raise ValueError(f"a pax header with a damaged record at its byte {place}")
        place = end
    if _DIGITS.search(data):
        raise ValueError("a pax header with more than 256 digits in a row")
