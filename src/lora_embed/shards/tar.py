"""A tar → its samples, to its proven end; headers are bounded, one by one and in their sum."""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from lora_embed.errors import ShardError
from lora_embed.schema import WHOLE, Layout, Sample, Shard, Span, Wanted
from lora_embed.shards.fields import MOST_FIELD
from lora_embed.shards.listing import IMAGES

BLOCK = tarfile.BLOCKSIZE
MOST_HEADERS = 2**20 + 16 * BLOCK  # bytes before one member: its own header, and those that only name what follows
MEAN_HEADERS = 2**13  # bytes a member in the mean, beyond that: two of the longest paths that Linux takes
MOST_PADDING = 2**20 + 2 * BLOCK  # tar pads with zeros to a record of 10 KiB, or of up to 1 MiB where it is told to
_DIGITS = re.compile(rb"[0-9]{257}")  # in a row: on those `tarfile` spends the square of their number
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_OF_ALL = ("path", "size")  # what a header for the whole tar may say that changes what is read


def read_tar(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """WebDataset: consecutive members that share a name up to the first dot of its last part are one sample.

    A member that the sample already has begins a sample of the same key, so that no image goes uncounted. Raises
    ShardError for a tar that is cut short or has too many headers, and whatever `tarfile` raises on damaged ones.
    """
    where, size = f"{shard.root}/{shard.name}", shard.files[0].size
    if size == 0:
        raise ShardError(f"{where}: is an empty file, not a tar; an empty tar has an end of its own")
    current: Sample | None = None
    taken: set[str] = set()  # extensions of the current sample
    number = span.first
    file.seek(span.begin)
    headers = _Headers(file, where)
    try:
        # Names that are not UTF-8 are escaped: an id must be UTF-8, and the same on every machine.
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:  # type: ignore[call-overload]
            for member in _members(tar, headers, span.end):
                key, extension = _split_name(member.name)
                if not member.isreg() or posixpath.basename(member.name).startswith("."):  # macOS adds ._name to each
                    continue
                if current is None or key != current.key or extension in taken:
                    begin = None if headers.has_global else member.offset  # those for the whole tar stand at its beginning
                    if current is not None:
                        current.end = begin
                        yield current
                        number += 1
                    current, taken = Sample(key, begin=begin), set()
                taken.add(extension)
                if not member.issparse() and member.offset_data + member.size > size:  # before memory is taken for it
                    raise tarfile.ReadError("unexpected end of data")
                if wanted(number):
                    _add_field(current, tar, headers, member, extension, layout)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        if size >= BLOCK and current is None and not span.begin and not _begins_with_header(file):
            raise ShardError(f"{where}: is not a tar, whatever its name says") from None
        raise ShardError(_cut_short(where, size, str(error))) from None
    if span.end is None:
        _prove_end(file, end, size, where)
    elif end != span.end:
        raise ShardError(f"{where}: damaged tar: its members end at byte {end}, expected {span.end}. Upload it again.")
    if current is not None:
        current.end = end
        yield current


class _Headers:
    """The tar's file as `tarfile` reads headers of it: so many bytes, and with each member that was passed a few more.

    So all kinds of headers are bounded, also those that continue others or name what follows, before one is read, and
    their sum is no more than in proportion to the members.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        self.seek, self.tell = file.seek, file.tell
        self._left = float(MOST_HEADERS)
        self._is_pax = False  # is what comes next the content of a pax header?
        self.has_global = False  # did any header say something of the whole tar?

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise ShardError(
                f"{self._where}: incomplete or damaged tar: the headers before the member at byte {self.tell()} have more than "
                f"the {MOST_HEADERS} bytes that are allowed, or than {MEAN_HEADERS} bytes a member in the mean. Write it anew "
                "with shorter names and without headers for the whole tar."
            )
        self._left -= size
        data = self._file.read(size)
        if self._is_pax:
            _check_pax(data)
        self._is_pax = not self._is_pax and size == BLOCK and data[156:157] in _PAX
        return data

    def pass_member(self, tar: tarfile.TarFile) -> None:
        """A member's headers are read. Of headers for the whole tar the few fields stay that change what is read.

        `tarfile` goes over all of them with each member.
        """
        self._left = min(self._left + MEAN_HEADERS, MOST_HEADERS)
        if tar.pax_headers:
            self.has_global = True
            tar.pax_headers = {name: tar.pax_headers[name] for name in _OF_ALL if name in tar.pax_headers}

    def content(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        """A member's bytes, which are no header."""
        if not member.issparse():
            self.seek(member.offset_data)
            return self._file.read(member.size)
        stream, left, self._left = tar.extractfile(member), self._left, float("inf")
        assert stream is not None
        try:
            return stream.read()
        finally:
            self._left = left


def _check_pax(data: bytes) -> None:
    """Refuse what is no row of records `length keyword=value`: on some such, `tarfile` of Python 3.11 spends hours."""
    place = 0
    while place < len(data) and data[place]:
        length = data[place : place + 10].partition(b" ")[0]
        end = place + int(length) if length.isdigit() else 0
        if end <= place or data[end - 1 : end] != b"\n" or data.find(b"=", place, end) < 0:
            raise ValueError(f"a pax header whose record at its byte {place} is none")
        place = end
    if _DIGITS.search(data):
        raise ValueError("a pax header with more than 256 digits in a row")


def _begins_with_header(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), encoding="utf-8", errors="backslashreplace")
    except tarfile.HeaderError:
        return False
    return True


def _members(tar: tarfile.TarFile, headers: _Headers, end: int | None) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # a tar of a million members need not be remembered
        headers.pass_member(tar)
        if member.size < 0:  # tarfile would go back by it, and on for ever
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        yield member
        if tar.offset == end:
            return


def _split_name(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _add_field(
    sample: Sample, tar: tarfile.TarFile, headers: _Headers, member: tarfile.TarInfo, extension: str, layout: Layout
) -> None:
    """The first image member is the sample's image; JSON keys and text members are fields that may be carried."""
    names = {name for name, _ in layout.carry}
    is_image = f".{extension}" in IMAGES and sample.data is None and not sample.excess
    if not is_image and extension != "json" and extension not in names:
        return
    if member.size > (layout.max_bytes if is_image else MOST_FIELD):  # also of a sparse member, which is short in the file
        sample.excess = member.size if is_image else sample.excess
        return
    data = headers.content(tar, member)
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    if is_image:
        sample.data = data
    elif extension in names:
        sample.fields[extension] = data.decode("utf-8", "replace").strip()
    elif names:
        sample.fields.update(_json_fields(data, names))


def _json_fields(data: bytes, names: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return {name: values[name] for name in names & set(values)} if isinstance(values, dict) else {}


def _prove_end(file: BinaryIO, end: int, size: int, where: str) -> None:
    """`tarfile` ends silently on a cut archive; a whole one ends in two blocks of zeros and zeros up to its size."""
    file.seek(end)
    rest = 0
    while data := file.read(1 << 20):
        if data.count(0) != len(data):
            raise ShardError(
                f"{where}: incomplete or damaged tar: its members end at byte {end} of {size} without the closing blocks of "
                "a tar. Upload it again; none of it is published."
            )
        rest += len(data)
    if rest > MOST_PADDING:
        raise ShardError(
            f"{where}: incomplete or damaged tar: its members end at byte {end} of {size}, and zeros follow, as where space "
            "was reserved and never filled. Upload it again; none of it is published."
        )
    if rest < 2 * BLOCK or end + rest != size:
        raise ShardError(_cut_short(where, size, f"members end at byte {end} without the two closing blocks of a tar"))


def _cut_short(where: str, size: int, detail: str) -> str:
    return f"{where}: incomplete tar, cut short at {size} bytes ({detail}). Upload it again; none of it is published."
