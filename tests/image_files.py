"""Small image files of seven formats, and how each is split into the pieces that its format knows and joined again."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from samples import encoded, noise

Pieces = list[bytes]
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")


@dataclass(frozen=True)
class Format:
    """How files of a format are made, split and put together. `extras` are pieces to be put in anywhere."""

    seeds: Callable[[], list[bytes]]
    split: Callable[[bytes], Pieces]
    join: Callable[[Pieces], bytes]
    fields: Callable[[bytes], list[tuple[int, int]]]  # a piece's sizes, counts and offsets: (where, bytes)
    big_endian: bool
    extras: Callable[[], Pieces] = list
    alike: Callable[[bytes, bytes], bool] = lambda piece, extra: False  # may the extra take the piece's place


def pictures() -> dict[str, Image.Image]:
    """By mode: half smooth, half noise, so that no codec has it easy."""
    smooth = noise(6, 5, 1).resize((48, 40), Image.Resampling.BICUBIC)
    smooth.paste(noise(20, 40, 2), (28, 0))
    deep = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    return {mode: deep if mode == "I;16" else smooth.convert(mode) for mode in MODES}


def saved(kind: str, modes: str, **options: object) -> list[bytes]:
    found = pictures()
    return [encoded(found[mode], kind, **options) for mode in modes.split()]


def everywhere(piece: bytes, *, size: int = 2, most: int = 200) -> list[tuple[int, int]]:
    """Any place of a piece may be a number."""
    return [(start, size) for start in range(min(len(piece) - size + 1, most))]


# PNG: a piece is a chunk's kind and body; length and check sum are made anew.
PNG_MARK = b"\x89PNG\r\n\x1a\n"


@cache
def png_seeds() -> list[bytes]:
    one, other = noise(48, 40, 3), noise(48, 40, 4)
    return [
        *saved("PNG", "1 L LA P RGB RGBA I;16", exif=oriented(), icc_profile=bytes(200)),
        encoded(one, save_all=True, append_images=[other, one], duration=5),
        encoded(one.convert("P"), transparency=bytes(range(256))),
        encoded(one, pnginfo=None, compress_level=0),
    ]


def oriented() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "of a camera"
    return exif


def png_split(data: bytes) -> Pieces:
    pieces, place = [PNG_MARK], len(PNG_MARK)
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        pieces.append(data[place + 4 : place + 8 + length])
        place += 12 + length
    return pieces


def png_join(pieces: Pieces) -> bytes:
    return b"".join(piece if piece == PNG_MARK else png_chunk(piece) for piece in pieces)


def png_chunk(piece: bytes) -> bytes:
    return struct.pack(">I", max(len(piece) - 4, 0)) + piece + struct.pack(">I", zlib.crc32(piece))


def png_fields(piece: bytes) -> list[tuple[int, int]]:
    if piece[:4] == b"IHDR":
        return [(4, 4), (8, 4), *((start, 1) for start in range(12, 17))]
    if piece[:4] in (b"fcTL", b"acTL", b"fdAT"):
        return [(start, 4) for start in range(4, len(piece) - 3, 4)][:8]
    return [] if piece[:4] in (b"IDAT", b"IEND") or piece == PNG_MARK else everywhere(piece[:40], size=1)


@cache
def png_extras() -> Pieces:
    bomb = zlib.compress(bytes(2**26), 9)  # 64 MB in 65 kB
    return [
        b"zTXtComment\0\0" + bomb,
        b"iCCPnested\0\0" + bomb,
        b"iCCPnested\0\0" + zlib.compress(b"iCCPnested\0\0" + bomb),
        b"iTXtXML:com.adobe.xmp\0\1\0\0\0" + bomb,
        b"tEXtSoftware\0" + bytes(100_000),
        b"eXIf" + exif_of(40_000),
        b"eXIf" + looped_ifd(),
        b"acTL" + struct.pack(">II", 2**31 - 1, 0),
        b"fcTL" + struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 2**31 - 1, 0, 0, 1, 1, 2, 1),
        b"PLTE" + bytes(3 * 300),
        b"tRNS" + bytes(600),
        b"gAMA" + bytes(4),
        b"sRGB",
        b"IDAT" + bomb,
        b"IDAT",
    ]


def exif_of(entries: int) -> bytes:
    """A directory with that many entries, all of the most there can be."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", entries) + struct.pack(">HHII", 0x0112, 4, 2**31, 8) * entries


def looped_ifd() -> bytes:
    """A directory whose EXIF, GPS and next directory are itself."""
    entries = [struct.pack(">HHII", tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005, 0x014A)]
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + struct.pack(">I", 8)


# JPEG: a piece is a marker with its segment, or the entropy-coded data behind a scan's header.


@cache
def jpeg_seeds() -> list[bytes]:
    return [
        *saved("JPEG", "L RGB CMYK", exif=oriented(), icc_profile=bytes(70_000)),
        *saved("JPEG", "L RGB CMYK", progressive=True),
        *saved("JPEG", "RGB", subsampling=0, restart_marker_blocks=2),
        *saved("MPO", "RGB", save_all=True, append_images=[noise(48, 40)]),
    ]


def jpeg_split(data: bytes) -> Pieces:
    pieces, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        length = 2 + (int.from_bytes(data[place + 2 : place + 4], "big") if marker not in (0xD8, 0xD9) else 0)
        pieces.append(data[place : place + length])
        place += length
        if marker == 0xDA:
            end = place
            while end + 1 < len(data) and (data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8))):
                end += 1
            pieces.append(data[place:end])
            place = end
    return [*pieces, data[place:]]


def jpeg_join(pieces: Pieces) -> bytes:
    return b"".join(map(jpeg_segment, pieces))


def jpeg_segment(piece: bytes) -> bytes:
    if len(piece) < 4 or piece[0] != 0xFF or piece[1] < 0xC0 or 0xD0 <= piece[1] <= 0xD9 or len(piece) > 65_000:
        return piece
    return piece[:2] + struct.pack(">H", len(piece) - 2) + piece[4:]


def jpeg_fields(piece: bytes) -> list[tuple[int, int]]:
    if piece[:1] != b"\xff" or len(piece) < 4:
        return []
    if piece[1] in (0xC0, 0xC1, 0xC2):
        return [(4, 1), (5, 2), (7, 2), (9, 1), *((start, 1) for start in range(10, len(piece)))]
    return [(start, 1) for start in range(4, min(len(piece), 60))]


@cache
def jpeg_extras() -> Pieces:
    def app(number: int, body: bytes) -> bytes:
        return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(body) + 2) + body

    return [
        app(1, b"Exif\0\0" + exif_of(5000)),
        app(1, b"Exif\0\0" + looped_ifd()),
        app(2, b"ICC_PROFILE\0\1\xff" + bytes(60_000)),
        app(2, b"ICC_PROFILE\0\0\0"),
        app(2, b"MPF\0" + b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 0xB001, 4, 1, 2**31)),
        app(2, b"MPF\0" + looped_ifd()),
        app(13, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\xff\xff\xff\xff" * 100),
        app(14, b"Adobe\0\x64\0\0\0\0\x09"),
        app(14, b"Adobe"),
        b"\xff\xfe\xff\xff" + bytes(65_533),
        b"\xff\xdd\0\x04\0\x01",
        b"\xff\xdc\0\x04\xff\xff",
        b"\xff\xcc\0\x04\0\x10",
        b"\xff\xd8",
    ]


# WebP: a piece is a chunk's name and body; sizes are made anew.


@cache
def webp_seeds() -> list[bytes]:
    one, other = noise(48, 40, 5), noise(48, 40, 6).convert("RGBA")
    return [
        *saved("WEBP", "L RGB RGBA", exif=oriented(), icc_profile=bytes(300)),
        *saved("WEBP", "RGB RGBA P", lossless=True),
        *saved("WEBP", "RGB", quality=20),
        encoded(one, "WEBP", save_all=True, append_images=[other, one], duration=5),
    ]


def webp_split(data: bytes) -> Pieces:
    pieces, place = [b"RIFF"], 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        pieces.append(data[place : place + 4] + data[place + 8 : place + 8 + size])
        place += 8 + size + size % 2
    return pieces


def webp_join(pieces: Pieces) -> bytes:
    body = b"".join(webp_chunk(piece) for piece in pieces if piece != b"RIFF")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_chunk(piece: bytes) -> bytes:
    size = max(len(piece) - 4, 0)
    return piece[:4].ljust(4) + struct.pack("<I", size) + piece[4:] + b"\0" * (size % 2)


def webp_fields(piece: bytes) -> list[tuple[int, int]]:
    kind = piece[:4]
    if kind == b"VP8X":
        return [(4, 1), (8, 3), (11, 3)]
    if kind == b"ANMF":
        return [(4, 3), (7, 3), (10, 3), (13, 3), (16, 3), (19, 1), (24, 4), *((start, 2) for start in range(28, 40))]
    if kind == b"VP8 ":
        return [(4, 3), (7, 3), (10, 2), (12, 2), *((start, 1) for start in range(14, 30))]
    if kind == b"VP8L":
        return [(4, 1), (5, 4), *((start, 1) for start in range(9, 25))]
    return [] if kind == b"RIFF" else everywhere(piece[:40], size=1)


@cache
def webp_extras() -> Pieces:
    frame = webp_split(webp_seeds()[-1])[3]
    return [
        b"VP8X\x3e\0\0\0" + b"\xff\xff\xff" * 2,
        b"ANIM" + b"\0" * 4 + b"\0\0",
        frame,
        b"ANMF" + b"\xff" * 16,
        b"ICCP" + bytes(200_000),
        b"EXIF" + exif_of(40_000),
        b"EXIF" + looped_ifd(),
        b"XMP " + b"<x>" * 30_000,
        b"ALPH\xff" + bytes(50),
        b"JUNK" + bytes(70_001),
    ]


# GIF: a piece is the screen with its palette, an extension, or a frame.


@cache
def gif_seeds() -> list[bytes]:
    frames = [noise(48, 40, number) for number in range(4)]
    return [
        *saved("GIF", "1 L P RGB", comment=b"made"),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0, duration=10, disposal=2),
        encoded(frames[0].convert("P"), "GIF", transparency=3, interlace=1),
    ]


def gif_split(data: bytes) -> Pieces:
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 128 else 0)
    pieces, place = [data[:start]], start
    while place < len(data) and data[place] in (0x21, 0x2C):
        begin = place
        place += 2
        if data[begin] == 0x2C:
            flags = data[begin + 9]
            place = begin + 11 + (3 << ((flags & 7) + 1) if flags & 128 else 0)
        while data[place]:
            place += 1 + data[place]
        place += 1
        pieces.append(data[begin:place])
    return [*pieces, data[place:]]


def gif_fields(piece: bytes) -> list[tuple[int, int]]:
    if piece[:3] == b"GIF":
        return [(6, 2), (8, 2), (10, 1), (11, 1), (12, 1)]
    if piece[:1] == b"\x2c":
        return [(1, 2), (3, 2), (5, 2), (7, 2), (9, 1), (10, 1), (11, 1), (12, 1), (13, 2)]
    return [(start, 1) for start in range(1, min(len(piece), 12))]


@cache
def gif_extras() -> Pieces:
    return [
        b"\x21\xfe" + (b"\xff" + b"c" * 255) * 800 + b"\0",
        b"\x21\xfe\x01c\0" * 500,
        b"\x21\xf9\x04\x1d\xff\xff\xff\0",
        b"\x21\xf9\x04\x08\0\0\0\0",
        b"\x21\xff\x0bNETSCAPE2.0\x03\x01\xff\xff\0",
        b"\x21\xff\x0bXMP DataXMP" + b"<" * 3000 + b"\0",
        b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x08\x02\x4c\x01\0",
        b"\x2c" + struct.pack("<HHHHB", 65_535, 65_535, 1, 1, 0x87) + bytes(768) + b"\x0c\0",
    ]


# TIFF, little-endian: one piece before the directory, one for each of its entries, one behind them. Joined, entries that
# were added move what follows: offsets then point elsewhere, as in a file that was cut and glued.


@cache
def tiff_seeds() -> list[bytes]:
    page = noise(48, 40, 7)
    return [
        *saved("TIFF", "1 L LA P RGB RGBA CMYK I;16"),
        *saved("TIFF", "RGB L", compression="tiff_lzw"),
        *saved("TIFF", "RGB L", compression="tiff_adobe_deflate"),
        *saved("TIFF", "RGB", compression="jpeg"),
        *saved("TIFF", "1", compression="group4"),
        *saved("TIFF", "RGBA", compression="packbits"),
        *saved("TIFF", "RGB", big_tiff=True),
        *saved("TIFF", "RGB", compression="tiff_lzw", tiffinfo={278: 8}),
        encoded(page, "TIFF", save_all=True, append_images=[page, page]),
    ]


def tiff_split(data: bytes) -> Pieces:
    is_big = data[2] == 43
    (start,) = struct.unpack_from("<Q" if is_big else "<I", data, 8 if is_big else 4)
    (count,) = struct.unpack_from("<Q" if is_big else "<H", data, start)
    begin, size = start + (8 if is_big else 2), 20 if is_big else 12
    entries = [data[begin + size * number : begin + size * (number + 1)] for number in range(count)]
    return [data[:begin], *entries, data[begin + size * count :]]


def tiff_join(pieces: Pieces) -> bytes:
    """With the number of entries that there are, unless it was made another by far."""
    head, size = pieces[0], 20 if pieces[0][2:3] == b"\x2b" else 12
    wide = 8 if size == 20 else 2
    entries = sum(len(piece) == size for piece in pieces[1:])
    if head[:2] == b"II" and len(head) >= 8 + wide and int.from_bytes(head[-wide:], "little") < 500:
        head = head[:-wide] + entries.to_bytes(wide, "little")
    return glued([head, *pieces[1:]])


def tiff_fields(piece: bytes) -> list[tuple[int, int]]:
    if piece[:2] == b"II":
        return [(2, 2), (4, 4), (len(piece) - 2, 2)]
    if len(piece) == 12:
        return [(0, 2), (2, 2), (4, 4), (8, 2), *[(8, 4)] * 6]
    if len(piece) == 20:
        return [(0, 2), (2, 2), (4, 8), *[(12, 8)] * 3, *[(12, 4)] * 3]
    return [(0, 4), *everywhere(piece[:64], size=4)]


@cache
def tiff_extras() -> Pieces:
    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        return struct.pack("<HHII", tag, kind, count, value)

    values = [
        (256, 1), (256, 2**31), (257, 10**6), (258, 64), (258, 12), (259, 7), (259, 8), (259, 50_000), (259, 34_676), (262, 6),
        (262, 3), (266, 2), (273, 8), (277, 60_000), (278, 1), (278, 2**32 - 1), (279, 2**31), (284, 2), (317, 2), (317, 3),
        (320, 8), (322, 16), (322, 2**20), (323, 16), (323, 2**20), (324, 8), (325, 2**31), (330, 8), (338, 2), (339, 3),
        (347, 8), (530, 2), (34_665, 8), (34_675, 8), (700, 8),
    ]  # fmt: skip
    short = [entry(tag, 4, 1, value) for tag, value in values]
    return [*short, entry(273, 4, 2**30, 8), entry(279, 3, 10, 8), entry(34_675, 7, 2**31, 0), entry(305, 2, 500, 0)]


def tiff_alike(piece: bytes, entry: bytes) -> bool:
    """An entry in another's place leaves all offsets as they are; the one of its own tag, where there is one."""
    return len(piece) == len(entry) and (piece[:2] == entry[:2] or int.from_bytes(entry[:2], "little") > 278)


# BMP: the two headers are a piece, palette and pixels another.


@cache
def bmp_seeds() -> list[bytes]:
    plain = saved("BMP", "1 L P RGB RGBA")
    run_length = bytearray(encoded(pictures()["P"], "BMP"))
    run_length[30:34] = struct.pack("<I", 1)
    return [*plain, bytes(run_length)]


def bmp_split(data: bytes) -> Pieces:
    (start,) = struct.unpack_from("<I", data, 10)
    return [data[:54], data[54:start], data[start:]]


def bmp_fields(piece: bytes) -> list[tuple[int, int]]:
    if piece[:2] != b"BM":
        return everywhere(piece[:40], size=1)
    header = [(14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4), (50, 4)]
    return [(2, 4), (10, 4), *(place for place in header if sum(place) <= len(piece))]


# PPM: the four words of its header are a piece each, and so is the space behind them.


@cache
def ppm_seeds() -> list[bytes]:
    plain = b"P3\n4 3\n255\n" + b" ".join(b"%d" % (number * 7) for number in range(36)) + b"\n"
    return [*saved("PPM", "1 L RGB I;16"), plain, b"P2\n# said\n4 3\n15\n" + b"7 " * 12, b"Pf\n4 3\n-1.0\n" + bytes(48)]


def ppm_split(data: bytes) -> Pieces:
    words = data.split(None, 4)
    return [words[0], b"\n", words[1], b" ", words[2], b"\n", words[3] if len(words) > 3 else b"255", b"\n", words[-1]]


@cache
def ppm_extras() -> Pieces:
    numbers = ("0", "-1", "1e9", "99999999", "1" * 5000, "٣", "0x10", "65535", "65536", "nan", "inf", "1000", "# remark\n", "")
    return [number.encode() for number in numbers]


def ppm_fields(piece: bytes) -> list[tuple[int, int]]:
    return everywhere(piece, size=1) if len(piece) > 8 else []


def ppm_alike(piece: bytes, word: bytes) -> bool:
    return piece.isdigit()


def glued(pieces: Pieces) -> bytes:
    return b"".join(pieces)


FORMATS = {
    "BMP": Format(bmp_seeds, bmp_split, glued, bmp_fields, big_endian=False),
    "GIF": Format(gif_seeds, gif_split, glued, gif_fields, big_endian=False, extras=gif_extras),
    "JPEG": Format(jpeg_seeds, jpeg_split, jpeg_join, jpeg_fields, big_endian=True, extras=jpeg_extras),
    "PNG": Format(png_seeds, png_split, png_join, png_fields, big_endian=True, extras=png_extras),
    "PPM": Format(ppm_seeds, ppm_split, glued, ppm_fields, big_endian=True, extras=ppm_extras, alike=ppm_alike),
    "TIFF": Format(tiff_seeds, tiff_split, tiff_join, tiff_fields, big_endian=False, extras=tiff_extras, alike=tiff_alike),
    "WEBP": Format(webp_seeds, webp_split, webp_join, webp_fields, big_endian=False, extras=webp_extras),
}
