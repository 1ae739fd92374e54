"""Check that a tar was read to its end: `tarfile` ends silently on a cut archive."""

import tarfile
from typing import BinaryIO

from lora_embed.errors import MAKE_AGAIN, ShardError
from lora_embed.images.recognise import name_of
from lora_embed.shards.tar_headers import BLOCK

_ENDINGS = {"gzip data": ".tar.gz", "bzip2 data": ".tar.bz2", "xz data": ".tar.xz", "Zstandard data": ".tar.zst"}
MOST_PADDING = 2**20 + 2 * BLOCK  # tar pads with zeros to a record of 10 KiB, or by an option of up to 1 MiB


def prove_end(file: BinaryIO, end: int, size: int | None, where: str) -> None:
    """Raises ShardError unless zeros alone follow the members, which end at this byte: two blocks or more, up to the size.

    Without a size, up to the file's end. One block is enough where the file ends with it, as some programs write it: no
    member begins with zeros.
    """
    file.seek(end)
    rest = 0
    while data := file.read(1 << 20):
        if data.count(0) != len(data):
            raise ShardError(_says_what_follows(file, end, size, where))
        rest += len(data)
    size = end + rest if size is None else size
    if rest > MOST_PADDING:
        raise ShardError(
            f"{where}: incomplete or damaged tar: its members end at byte {end} of {size}, and only zeros follow, as if the "
            f"file was never written to its end. {MAKE_AGAIN}; nothing of it is published."
        )
    is_lone = rest == BLOCK and end > 0
    if (rest < 2 * BLOCK and not is_lone) or end + rest != size:
        raise ShardError(cut_short(where, size, f"members end at byte {end} without the two closing blocks of a tar"))


def _says_what_follows(file: BinaryIO, end: int, size: int | None, where: str) -> str:
    """The message for a tar after whose members there is something else than zeros."""
    begin, of = end, "" if size is None else f" of {size}"
    file.seek(end)
    while (block := file.read(BLOCK)) and block.count(0) == len(block):
        begin += BLOCK
    if begin > end and is_header(block):
        return (
            f"{where}: holds two tars, one after the other: the second begins at byte {begin}{of}, and readers of tars "
            "stop before it. Unpack it with `tar --ignore-zeros -xf`, pack the files into one tar, and use that in its place."
        )
    return (
        f"{where}: incomplete or damaged tar: its members end at byte {end}{of} without the closing blocks of a tar. "
        f"{MAKE_AGAIN}; nothing of it is published."
    )


def is_header(block: bytes) -> bool:
    """Is this block the header of a member?"""
    try:
        tarfile.TarInfo.frombuf(block, encoding="utf-8", errors="backslashreplace")
    except tarfile.HeaderError:
        return False
    return True


def is_no_tar(file: BinaryIO, where: str) -> str | None:
    """The message for a file that does not begin like a tar; None for one that does."""
    file.seek(0)
    head = file.read(4096)
    if len(head) < BLOCK or is_header(head[:BLOCK]):
        return None
    what = name_of(head).split(" of ", 1)[-1].removesuffix(", not an image")
    return f"{where}: is not a tar, although its name says so: it begins with {what}. {_help_with(what)}."


def _help_with(what: str) -> str:
    """What to do with a file that is named like a tar and begins with something else."""
    if what in _ENDINGS:
        return f"If it is a compressed tar, give its name the ending {_ENDINGS[what]}, or else remove it"
    if "archive" in what:
        return "Unpack it, and pack its files into a tar"
    return "Give it the name of what it is, or remove it"


def cut_short(where: str, size: int, detail: str) -> str:
    """The message for a tar that ends too early."""
    return f"{where}: incomplete tar, cut short at {size} bytes ({detail}). {MAKE_AGAIN}; nothing of it is published."
