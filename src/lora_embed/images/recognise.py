"""Name what some bytes are by their beginning: an image, or what was stored in the place of one, and what helps then."""

import re

_HEAD = 4096  # bytes that are looked at
_SHOWN = 40  # characters of a text that a detail shows
_BOXES = {  # brand of a file of ISO boxes → what it is
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
    b"crx ": "CR3",
    b"jxl ": "JPEG XL",
}
_READ = {  # beginning → name of an image format that is read
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
}  # fmt: skip
_PNM = re.compile(rb"P[1-6fF]\s")
_IMAGES = {  # beginning → name of an image format that is not read
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL", b"8BPS": "Photoshop", b"qoif": "QOI", b"DDS ": "DDS",
    b"icns": "ICNS",
    b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"\0\0\1\0": "ICO", b"\0\0\2\0": "CUR", b"SIMPLE  =": "FITS",
    b"\x76\x2f\x31\x01": "OpenEXR", b"#?RADIANCE": "Radiance HDR", b"FUJIFILMCCD-RAW": "RAF", b"II\xbc\1": "JPEG XR",
    b"gimp xcf": "XCF", b"/* XPM": "XPM", b"\x0a\5\1\x08": "PCX", b"\1\xda": "SGI", b"\xd7\xcd\xc6\x9a": "WMF",
}  # fmt: skip
_OTHERS = {  # beginning → what it is
    b"\x1f\x8b": "gzip data", b"PK\3\4": "a zip archive", b"PK\5\6": "an empty zip archive", b"%PDF": "a PDF document",
    b"BZh": "bzip2 data", b"\xfd7zXZ\0": "xz data", b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive", b"PAR1": "a Parquet file",
    b"\x93NUMPY": "a NumPy array", b"\x89HDF\r\n": "an HDF5 file",
    b"\x1a\x45\xdf\xa3": "a WebM or Matroska video", b"OggS": "an Ogg file", b"ID3": "an MP3 file", b"fLaC": "a FLAC file",
    b"ARROW1": "an Arrow file", b"SQLite format 3": "an SQLite database", b"\x7fELF": "a program",
    b"\x80\2": "a pickle", b"\x80\3": "a pickle", b"\x80\4": "a pickle", b"\x80\5": "a pickle",
}  # fmt: skip
_RIFF = {b"AVI ": "an AVI video", b"WAVE": "a WAV file"}
_LFS = b"version https://git-lfs.github.com/spec/"
_CODE = re.compile(r"<Code>([^<]{1,60})</Code>")
_CONVERT = "which is not read. Convert it to JPEG, PNG or WebP"


def is_image(data: bytes) -> bool:
    """Do the bytes begin like an image that is read?"""
    return _read_format_of(data) is not None


def is_targa(data: bytes) -> bool:
    """Is it a TGA image? The format has no mark at its beginning, so all that its header has of fixed values is compared."""
    if len(data) < 19 or data[1] > 1 or data[2] not in (1, 2, 3, 9, 10, 11) or data[16] not in (8, 15, 16, 24, 32):
        return False
    has_size = bool(data[12] or data[13]) and bool(data[14] or data[15])
    return has_size and (data.endswith(b"TRUEVISION-XFILE.\0") or (data[1] == 0 and data[3:12] == bytes(9)))


def name_of(data: bytes) -> str:
    """What bytes that are no image may be, for the detail of a reject; their beginning in hex if that cannot be told."""
    size = f"{len(data)} bytes"
    if format_name := _read_format_of(data):
        return (
            f"{size} that begin like a {format_name} image ({data[:8].hex()}), but its header is damaged or of a kind that is "
            "not read"
        )
    image = _brand_of(data) or _named(_IMAGES, data)
    if image and image != "a video":
        return f"{size} of a {image} image, {_CONVERT}"
    kind = image or _RIFF.get(_riff_of(data)) or _named(_OTHERS, data) or ("a tar" if data[257:262] == b"ustar" else None)
    if kind:
        return f"{size} of {kind}, not an image"
    if (text := _text_of(data)) is not None:
        return f"{size} of {_name_of_text(text)}"
    return f"{size} that start with {data[:8].hex()}" + (", all of them zeros" if data.count(0) == len(data) else "")


def _read_format_of(data: bytes) -> str | None:
    """The format that is read and that the bytes begin like; None for others."""
    if _brand_of(data) == "AVIF":
        return "AVIF"
    if _riff_of(data) == b"WEBP":
        return "WebP"
    return "PNM" if _PNM.match(data) else _named(_READ, data)


def _named(names: dict[bytes, str], data: bytes) -> str | None:
    return next((name for beginning, name in names.items() if data.startswith(beginning)), None)


def _brand_of(data: bytes) -> str | None:
    """The format of a file of ISO boxes, such as AVIF, HEIC and MP4; None for other files."""
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), _HEAD)
    brands = [data[8:12], *(data[place : place + 4] for place in range(16, end, 4))]
    return next((_BOXES[brand] for brand in brands if brand in _BOXES and brand not in (b"mif1", b"msf1")), None) or next(
        (_BOXES[brand] for brand in brands if brand in _BOXES), "a video"
    )


def _riff_of(data: bytes) -> bytes:
    return data[8:12] if data.startswith(b"RIFF") else b""


def _text_of(data: bytes) -> str | None:
    """The beginning of a text; None for bytes that are not text."""
    head = data[:_HEAD]
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head.decode(encoding, "ignore")
    if len(text.encode(encoding, "ignore")) < len(head) - 4 or not text.strip():
        return None
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else None


def _name_of_text(text: str) -> str:
    beginning = text.lstrip().lower()
    if text.encode().startswith(_LFS):
        return "a Git LFS pointer, not an image. Fetch the file itself with `git lfs pull`"
    if "<svg" in beginning:
        return f"an SVG image, {_CONVERT}"
    if beginning.startswith(("<!doctype html", "<html")) or "<html" in beginning or "<head>" in beginning:
        return "an HTML page, not an image: perhaps a server's answer to a failed download. Download it again"
    if code := _CODE.search(text):
        return f"an object store's error page ({code[1]}), not an image. Download it again"
    if beginning.startswith(("<?xml", "<error")):
        return "an XML document, not an image"
    if beginning.startswith(("{", "[")):
        return "JSON, not an image"
    return f"text, not an image: {' '.join(text.split())[:_SHOWN]!r}"
