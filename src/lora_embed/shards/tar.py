"""A tar → its samples, up to its checked end. The size of headers is limited, for each member and in total."""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from lora_embed.errors import ShardError
from lora_embed.schema import WHOLE, Layout, Sample, Shard, Span, Wanted
from lora_embed.shards.compressed import Unpacked
from lora_embed.shards.fields import MOST_FIELD
from lora_embed.shards.listing import IMAGES

BLOCK = tarfile.BLOCKSIZE
MOST_HEADERS = 2**20 + 16 * BLOCK  # bytes of headers before one member: its own, and those with its long name or attributes
MEAN_HEADERS = 2**13  # bytes of headers for each member on average, in addition: two of the longest paths on Linux
MOST_PADDING = 2**20 + 2 * BLOCK  # tar pads with zeros to a record of 10 KiB, or by an option of up to 1 MiB
_DIGITS = re.compile(rb"[0-9]{257}")  # so many digits in a row: the time of `tarfile` grows with the square of their number
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_GLOBAL_FIELDS = ("path", "size")  # fields of a header for the whole tar that change what is read


def read_tar(file: BinaryIO, shard: Shard, layout: Layout, wanted: Wanted, span: Span = WHOLE) -> Iterator[Sample]:
    """Read WebDataset: consecutive members whose file names are equal up to the first dot are one sample.

    A second member with the same extension begins a new sample of the same key, so that every image is counted. Raises
    ShardError for a tar that is cut short or has too many headers, and any error of `tarfile` for a damaged one.
    """
    where, size = f"{shard.root}/{shard.name}", shard.files[0].size
    is_unpacked = isinstance(file, Unpacked)  # then the size is that of the compressed file, and no reader can begin within
    if size == 0:
        raise ShardError(f"{where}: has 0 bytes, but even an empty tar has at least 1,024. Upload it again, or remove it.")
    current: Sample | None = None
    taken: set[str] = set()  # extensions of the current sample
    number = span.first
    file.seek(span.begin)
    headers = _Headers(file, where)
    try:
        # Names that are not UTF-8 are escaped, since an id must be UTF-8 and equal on every machine.
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:  # type: ignore[call-overload]
            for member in _members(tar, headers, span.end):
                key, extension = _split_name(member.name)
                if not member.isreg() or posixpath.basename(member.name).startswith("."):  # macOS adds ._name to each
                    continue
                if current is None or key != current.key or extension in taken:
                    begin = (
                        None if headers.has_global or is_unpacked else member.offset
                    )  # a reader from here on would miss global headers
                    if current is not None:
                        current.end = begin
                        yield current
                        number += 1
                    current, taken = Sample(key, begin=begin), set()
                taken.add(extension)
                is_whole = is_unpacked or member.issparse() or member.offset_data + member.size <= size
                if not is_whole:  # before memory is allocated for it
                    raise tarfile.ReadError("unexpected end of data")
                if wanted(number):
                    _add_field(current, tar, headers, member, extension, layout)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        if size >= BLOCK and current is None and not span.begin and not _begins_with_header(file):
            raise ShardError(f"{where}: is not a tar, although its name says so. Rename it or remove it.") from None
        raise ShardError(_cut_short(where, size, str(error))) from None
    if span.end is None:
        _prove_end(file, end, None if is_unpacked else size, where)
    elif end != span.end:
        raise ShardError(f"{where}: damaged tar: its members end at byte {end}, expected {span.end}. Upload it again.")
    if current is not None:
        current.end = None if is_unpacked else end
        yield current


class _Headers:
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


def _begins_with_header(file: BinaryIO) -> bool:
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), encoding="utf-8", errors="backslashreplace")
    except tarfile.HeaderError:
        return False
    return True


def _members(tar: tarfile.TarFile, headers: _Headers, end: int | None) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # to save memory: a tar may have a million members
        headers.pass_member(tar)
        if member.size < 0:  # tarfile would go back by so many bytes, and never end
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
    """Read a member: the first image is the sample's image; keys of JSON and text members are fields that may be carried."""
    names = {name for name, _ in layout.carry}
    is_image = f".{extension}" in IMAGES and sample.data is None and not sample.excess
    if not is_image and extension != "json" and extension not in names:
        return
    if member.size > (layout.max_bytes if is_image else MOST_FIELD):  # also for a sparse member, which is small in the file
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


def _prove_end(file: BinaryIO, end: int, size: int | None, where: str) -> None:
    """Check the end, since `tarfile` ends silently on a cut archive: a whole tar ends with two or more blocks of zeros."""
    file.seek(end)
    rest = 0
    while data := file.read(1 << 20):
        if data.count(0) != len(data):
            raise ShardError(
                f"{where}: incomplete or damaged tar: its members end at byte {end} of {size} without the closing blocks of "
                "a tar. Upload it again; nothing of it is published."
            )
        rest += len(data)
    if rest > MOST_PADDING:
        raise ShardError(
            f"{where}: incomplete or damaged tar: its members end at byte {end} of {size}, and only zeros follow, as if the "
            "file was never written to its end. Upload it again; nothing of it is published."
        )
    size = end + rest if size is None else size
    if rest < 2 * BLOCK or end + rest != size:
        raise ShardError(_cut_short(where, size, f"members end at byte {end} without the two closing blocks of a tar"))


def _cut_short(where: str, size: int, detail: str) -> str:
    return f"{where}: incomplete tar, cut short at {size} bytes ({detail}). Upload it again; nothing of it is published."
