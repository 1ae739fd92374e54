"""What a file of an input is: by its name, and by its first bytes where a user named a file whose name does not tell."""

import posixpath
import tarfile
from typing import Literal

from lora_embed.images.recognise import is_image
from lora_embed.shards.compressed import COMPRESSED_TAR

Kind = Literal["tar", "parquet", "images"]

TAR, PARQUET = (".tar",), (".parquet", ".pq")
USUAL_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# An image by its name. Whether it can be decoded is found when it is read; otherwise it is a reject that says what it is.
OTHER_IMAGES = (
    ".jfif", ".jif", ".jfi", ".jpe", ".pjpeg", ".pjp", ".apng", ".dib", ".pnm", ".pbm", ".pfm",
    ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".wdp",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpm", ".jpx", ".bpg", ".flif", ".qoi",
    ".tga", ".icb", ".vda", ".ico", ".cur", ".icns", ".pcx", ".sgi", ".xbm", ".xpm", ".dds", ".exr",
    ".svg", ".svgz", ".eps", ".wmf", ".emf", ".psd", ".psb", ".xcf", ".djvu", ".dcm",
    ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".rwl", ".raf", ".pef",
    ".srw", ".x3f", ".3fr", ".fff", ".iiq", ".erf", ".mef", ".mos", ".mrw", ".kdc", ".dcr",
)  # fmt: skip
# Kinds of files that are passed over.
HIDDEN, MACOS, BROKEN, FOLDER, LEFT_OUT = "hidden ", "macOS ._", "broken link", "linked folder", "left out"
# What holds other files, or one: a kind of input, or what has to be unpacked first.
PACKED = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma", ".z", ".cpio", ".zipx")
ARCHIVES = TAR + COMPRESSED_TAR + PARQUET + PACKED
IMAGES = USUAL_IMAGES + OTHER_IMAGES

HEAD_BYTES = 4096  # of a file that is looked at to find its kind
MOST_ENDING = 12  # characters of a file name's ending that is counted as one


def kind_by_name(path: str) -> Kind | None:
    """What a file is by the end of its name, in any case; None for other names."""
    name = path.lower()
    if name.endswith(TAR + COMPRESSED_TAR):
        return "tar"
    if name.endswith(PARQUET):
        return "parquet"
    return "images" if name.endswith(IMAGES) else None


def kind_by_content(head: bytes) -> Kind | None:
    """What a file is by its first `HEAD_BYTES`; None for what cannot be read."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if is_image(head):
        return "images"
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], encoding="utf-8", errors="backslashreplace")
    except tarfile.HeaderError:
        return None
    return "tar"


def is_hidden(path: str) -> bool:
    """Is a file hidden by its name, as on Linux, or as Hadoop and Spark hide files?"""
    return path.rpartition("/")[2].startswith((".", "_"))


def counted_as(path: str, *, is_hidden: bool = False) -> str:
    """The kind under which a file that is passed over is counted: by the ending of its name, in small letters."""
    if posixpath.basename(path).startswith("._"):
        return MACOS
    ending = posixpath.splitext(path.lower())[1]
    kind = ending if 1 < len(ending) <= MOST_ENDING and ending.isprintable() else "none"
    return f"{HIDDEN}{kind}" if is_hidden and kind_by_name(path) is not None else kind
