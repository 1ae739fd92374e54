"""A compressed tar as the file that `tar.read_tar` reads: unpacked while it is read, forwards only, up to a limit."""

import io
import lzma
from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa

from lora_embed.errors import ShardError
from lora_embed.images.recognise import name_of

KINDS = {
    ".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd", ".tzst": "zstd", ".tar.bz2": "bz2", ".tbz2": "bz2",
    ".tar.xz": "xz", ".txz": "xz", ".tar.lz4": "lz4",
}  # fmt: skip
_BEGINNINGS: dict[str, bytes | tuple[bytes, ...]] = {
    "gzip": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\0",
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))),  # or a skippable frame
    "lz4": (b"\x04\x22\x4d\x18", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))),
}  # fmt: skip
COMPRESSED_TAR = tuple(KINDS)
PIECE = 2**20  # bytes that are unpacked at once
KEPT = 2**21  # bytes before the newest piece that are kept, since `tarfile` goes back by some
MOST_DICTIONARY = 2**27  # bytes of memory that unpacking xz may take: its highest level needs 65 MiB. That of zstd is the same


class Unpacked(io.RawIOBase):
    """The unpacked content of a file. It is read from begin to end; `seek` leads forwards, or back by `KEPT` bytes.

    Raises ShardError once more than `most` bytes are unpacked. For damaged data, `read` raises OSError or LZMAError.
    """

    def __init__(self, file: BinaryIO, name: str, most: int, where: str) -> None:
        kind = next(kind for ending, kind in KINDS.items() if name.lower().endswith(ending))
        _check_begin(file, kind, where)
        self._next: Callable[[int], bytes]
        self._next = _Xz(file).read if kind == "xz" else pa.CompressedInputStream(pa.PythonFile(file, mode="r"), kind).read
        self._most, self._where = most, where
        self._held, self._begin = b"", 0  # bytes, and the position of the first of them
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        pieces, left = list[bytes](), size if size >= 0 else self._most
        while left:
            offset = self._place - self._begin
            piece = self._held[offset : offset + left]
            if not piece and not self._unpack():
                break
            pieces.append(piece)
            self._place += len(piece)
            left -= len(piece)
        return b"".join(pieces)

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or place < self._begin:
            raise ShardError(f"{self._where}: cannot be read in order, which a compressed tar must be. Unpack it to .tar.")
        while place > self._begin + len(self._held) and self._unpack():
            pass
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _unpack(self) -> bool:
        """Unpack one more piece. False at the end."""
        piece = self._next(PIECE)
        kept = self._held[-KEPT:]
        self._begin += len(self._held) - len(kept)
        self._held = kept + piece
        if self._begin + len(self._held) > self._most:
            raise ShardError(
                f"{self._where}: unpacks to more than {self._most >> 20} MiB, more than 100 times its size. Unpack it to "
                ".tar, if that is right."
            )
        return bool(piece)


def _check_begin(file: BinaryIO, kind: str, where: str) -> None:
    """Raises ShardError for a file that is not compressed as its name says, such as a plain tar."""
    head = file.read(4096)
    file.seek(0)
    if head.startswith(_BEGINNINGS[kind]) or not head:
        return
    found = name_of(head).split(" of ", 1)[-1].removesuffix(", not an image")
    help_ = "Give its name the ending .tar" if found == "a tar" else "Give it the name of what it is, or remove it"
    raise ShardError(f"{where}: is not {kind} data, although its name says so: it begins with {found}. {help_}.")


class _Xz:
    """The unpacked content of xz files that follow each other. `lzma.open` has no limit for memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""
        self._unpacking = lzma.LZMADecompressor(memlimit=MOST_DICTIONARY)

    def read(self, size: int) -> bytes:
        while True:
            if self._unpacking.eof:
                self._rest = self._unpacking.unused_data or self._file.read(PIECE)
                if not self._rest.strip(b"\0"):  # padding, or the end
                    return b""
                self._unpacking = lzma.LZMADecompressor(memlimit=MOST_DICTIONARY)
            elif self._unpacking.needs_input and not self._rest:
                self._rest = self._file.read(PIECE)
                if not self._rest:
                    raise EOFError("the compressed data end before their end mark")
            piece = self._unpacking.decompress(self._rest, size)
            self._rest = b""
            if piece:
                return piece
