"""Small files that unpack to something huge, real ones: rejected before pixels are allocated, or decoded at a bounded cost."""

import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_hostile import LIMIT_S, Watched, outcome_of

from image_files import FORMATS, png_chunk
from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.config.models import JobConfig
from lora_embed.images.decode import BadImage, Decoded
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.schema import MAX_BYTES
from samples import PREPROCESSING, encoded, layout, noise, parquet_of, png, shard_at, tar_of, tar_shard

MIB = 2**20
MANY = 20_000  # frames


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with IsolatedDecoder(timeout_s=4 * LIMIT_S) as decode:
        yield Watched(decode, 100_000_000)


def grey_png(width: int, height: int, *pieces: bytes, rows: int | None = None) -> bytes:
    """A real PNG of 1 bit a pixel, all black, with `pieces` before its pixels."""
    lines = zlib.compressobj(9)
    line = bytes(1 + -(-width // 8))
    data = b"".join(lines.compress(line * 64) for _ in range(-(-(height if rows is None else rows) // 64))) + lines.flush()
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, (head, *pieces, b"IDAT" + data, b"IEND")))


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG that goes over its pixels again and again, for 10 to 100 bytes each time."""
    pieces = FORMATS["JPEG"].split(encoded(Image.new("L", (side, side), 7), "JPEG", progressive=True))
    return FORMATS["JPEG"].join([*pieces[:-1], *pieces[-3:-1] * count, pieces[-1]])


def large_webp(side: int) -> bytes:
    """A lossless WebP whose header says another size, 14 bits each."""
    data = bytearray(encoded(noise(), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9
    kept = struct.unpack_from("<I", data, place)[0] >> 28 << 28
    struct.pack_into("<I", data, place, kept | (side - 1) << 14 | side - 1)
    return bytes(data)


def tiff(entries: dict[int, int], data: bytes = b"") -> bytes:
    """A TIFF of one directory; its data begin behind it."""
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + data


def tiff_of(**more: int) -> bytes:
    """16×16 grey pixels by Deflate in one strip or tile that unpacks to 256 MB, whose numbers can be others."""
    tags = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "offset": 273, "samples": 277}
    tags |= {"rows": 278, "bytes": 279, "tile_width": 322, "tile_height": 323, "tile_offset": 324, "tile_bytes": 325}
    data = zlib.compress(bytes(2**28), 1)
    values = {"width": 16, "height": 16, "bits": 8, "compression": 8, "photometric": 1, "samples": 1} | more
    start = 8 + 2 + 12 * (len(values) + 2) + 4
    where = ("tile_offset", "tile_bytes") if "tile_width" in more else ("offset", "bytes")
    values |= {where[0]: start, where[1]: len(data)}
    return tiff({tags[name]: value for name, value in values.items()}, data)


def animation(name: str, frames: int) -> bytes:
    """An animation of that many frames of 48×40 pixels, or a document of as many pages."""
    how = FORMATS[name]
    if name == "TIFF":
        one = encoded(noise(48, 40), "TIFF")
        return (
            how.join(how.split(one))
            if frames == 1
            else encoded(noise(48, 40), "TIFF", save_all=True, append_images=[noise(8, 8)] * (frames - 1))
        )
    options = {"save_all": True, "append_images": [noise(48, 40, 1), noise(48, 40, 2)], "duration": 5}
    pieces = how.split(encoded(noise(48, 40), name, **options))
    size = 2 if name == "PNG" else 1  # a frame's control and its data
    end = -1 if name in ("GIF", "PNG") else len(pieces)
    return how.join([*pieces[:end], *pieces[end - size if end < 0 else -size : end] * frames, *pieces[end:]])


BOMB = zlib.compress(bytes(64 * MIB), 9)
TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "PNG of 400 megapixels in 50 kB": lambda: grey_png(20_000, 20_000),
    "GIF of 4 gigapixels": lambda: FORMATS["GIF"].join([b"GIF89a\xff\xff\xff\xff\0\0\0", FORMATS["GIF"].extras()[-2], b";"]),
    "WebP of 268 megapixels": lambda: large_webp(16_383),
    "progressive JPEG of 6,000 scans": lambda: scans(6_000, 5_000),
    "TIFF whose tile is a million pixels wide": lambda: tiff_of(tile_width=2**20, tile_height=2**10),
    "TIFF whose tile has 256 megapixels": lambda: tiff_of(tile_width=2**14, tile_height=2**14),
    "TIFF whose tile has 2^40 pixels": lambda: tiff_of(tile_width=2**20, tile_height=2**20),
}
BOUNDED: dict[str, Callable[[], bytes]] = {
    "PNG with 100 texts of 64 MB": lambda: grey_png(100, 100, *[b"zTXtComment\0\0" + BOMB] * 100),
    "PNG with a profile of 64 MB": lambda: grey_png(100, 100, b"iCCPnested\0\0" + BOMB),
    "PNG with a thousand times its pixels": lambda: grey_png(300, 300, rows=300_000),
    "JPEG with 6 MB of EXIF": lambda: FORMATS["JPEG"].join(
        [
            b"\xff\xd8",
            *[b"\xff\xe1\xff\xf0Exif\0\0" + bytes(65_510)] * 100,
            *FORMATS["JPEG"].split(encoded(noise(), "JPEG"))[1:],
        ]
    ),
    "progressive JPEG of 100 scans": lambda: scans(100, 2_400),
    "TIFF whose strip unpacks to 256 MB": lambda: tiff_of(rows=16),
    "TIFF whose strip has 4 billion rows": lambda: tiff_of(rows=2**32 - 1),
}


def said(answer: Decoded | BadImage) -> str:
    return f"{answer.reason}, {answer}"[:120] if isinstance(answer, BadImage) else "pixels"


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_bomb_of_pixels_is_rejected_before_they_are_allocated(watched: Watched, name: str) -> None:
    data = TOO_LARGE[name]()
    assert len(data) < 3e6
    started = time.monotonic()
    answer = watched(data)
    seconds = time.monotonic() - started
    print(f"\n{name}: {said(answer)}, {seconds:.2f} s, {watched.peak / MIB:.0f} MiB")
    assert outcome_of(answer, 100_000_000) == "too_many_pixels"
    assert seconds < 1
    assert watched.peak < 16 * MIB


@pytest.mark.parametrize("name", BOUNDED)
def test_what_unpacks_to_much_is_cut_off(watched: Watched, name: str) -> None:
    """It is an image or a reject; what counts is what it costs."""
    data = BOUNDED[name]()
    started = time.monotonic()
    answer = watched(data)
    seconds = time.monotonic() - started
    print(f"\n{name}, {len(data):,} bytes: {said(answer)}, {seconds:.2f} s, {watched.peak / MIB:.0f} MiB")
    assert outcome_of(answer, 100_000_000) in ("pixels", "corrupt_image", "not_an_image")
    assert seconds < LIMIT_S
    assert watched.peak < 300 * MIB


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_frames_cost_nothing_but_their_bytes(watched: Watched, name: str) -> None:
    """The first one is taken and the others are never looked at, so their number needs no limit."""
    few, many = animation(name, 2), animation(name, MANY if name != "TIFF" else 300)
    one, other = watched(few), None
    started = time.monotonic()
    other = watched(many)
    seconds = time.monotonic() - started
    print(f"\n{name}: {len(many):,} bytes, {seconds:.2f} s, {watched.peak / MIB:.0f} MiB")
    assert isinstance(one, Decoded)
    assert isinstance(other, Decoded)
    np.testing.assert_array_equal(other.pixels, one.pixels)
    assert seconds < 3  # by the wall clock of a machine that has other work; to look at all frames takes far longer
    assert watched.peak < 3 * len(many) + 16 * MIB


def test_an_encoded_image_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    """Of a tar also where it is sparse: a hundred bytes that say that they are a petabyte."""
    members = [("a.png", png(1)), ("b.png", png(2) + bytes(3000)), ("c.png", png(3)), ("c.json", b"[" * 20_000_000)]
    columns = {"image": [png(1), png(2) + bytes(3000), png(3)], "key": ["a", "b", "c"]}
    loose = tmp_path / "loose"
    loose.mkdir()
    for key, data in zip("abc", columns["image"], strict=True):
        (loose / f"{key}.png").write_bytes(data)
    for shard in (
        tar_shard(tmp_path, members),
        shard_at(tmp_path / "a.parquet", parquet_of(columns)),
        shard_at(loose),
    ):
        how = layout(max_bytes=2000, carry=(("x", "string"),))
        (chunk,) = decode_shard(WorkItem(shard=shard), how, PREPROCESSING, {})
        assert chunk.samples.column("reason").to_pylist() == [None, "too_many_bytes", None]
        assert chunk.samples.column("detail").to_pylist()[1] == f"{len(columns['image'][1])} bytes, max_bytes allows 2000"
        assert chunk.head.good == 2


def test_a_sparse_member_is_as_large_as_it_says(tmp_path: Path) -> None:
    raw = bytearray(tar_of([("a.png", png(1)), ("b.png", b"12345")]))
    place = 512 + -(-len(png(1)) // 512) * 512
    header = raw[place : place + 512]
    header[156:157] = b"S"
    header[386:410] = b"00000000000\0" + b"00000000005\0"  # where its one piece stands, and how long it is
    header[483:495] = b"\x80" + (10**15).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw[place : place + 512] = header
    (chunk,) = decode_shard(WorkItem(shard=shard_at(tmp_path / "a.tar", bytes(raw))), layout(), PREPROCESSING, {})
    assert chunk.samples.column("reason").to_pylist() == [None, "too_many_bytes"]
    assert chunk.samples.column("detail").to_pylist()[1] == f"{10**15} bytes, max_bytes allows {MAX_BYTES}"


def test_max_bytes_has_its_own_parts_only_where_it_is_set() -> None:
    """A table that was made before there was this key goes on with its parts."""
    assert layout().layout_id == layout(max_bytes=MAX_BYTES).layout_id != layout(max_bytes=2**20).layout_id
    assert JobConfig.model_fields["max_bytes"].default == MAX_BYTES
