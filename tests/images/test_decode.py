"""Decoding: hostile bytes become rejects, every honest kind of image one row of pixels, chunks repeat byte for byte."""

import io
import json
import pickle
import resource
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lora_embed.chain.chunks import DecodedChunk, decode_items, decode_shard
from lora_embed.chain.items import Block, WorkItem
from lora_embed.errors import ShardError
from lora_embed.images import decode
from lora_embed.images.decode import BadImage, decode_image
from lora_embed.images.preprocess import Preprocessing, decoding
from lora_embed.schema import REASONS, ChunkHead, Shard, from_ipc, to_ipc
from samples import PREPROCESSING, encoded, layout, noise, parquet_of, png, shard_at, tar_of, tar_shard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")  # Pillow's

ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6  # to be turned by 90 degrees clockwise


def chunks_of(shard: Shard, done: frozenset[int] = frozenset(), limit: int | None = None, **changes: Any) -> list[DecodedChunk]:
    return list(decode_shard(WorkItem(shard=shard, done=done, limit=limit), layout(**changes), PREPROCESSING, {}))


def numbered(count: int) -> list[tuple[str, bytes]]:
    return [(f"{number:03d}.png", png(number)) for number in range(count)]


def png_of(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif_of(width: int, height: int) -> bytes:
    """A frame of that size that is to be cleared afterwards, for which Pillow takes memory when it opens the file."""
    control = b"\x21\xf9\x04\x08\0\0\0\0\x2c"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0" * 6 + control + struct.pack(
        "<HHHHB", 0, 0, width, height, 0
    ) + b"\x02\x02\x4c\x01\0\x3b"  # fmt: skip


class Unpickled:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty", "0 bytes"),
        (b"just text", "not_an_image", "9 bytes of text, not an image: 'just text'"),
        (pickle.dumps(Unpickled()), "not_an_image", "bytes of a pickle, not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image", ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image", ""),
        (b"P6 0 0 255\n", "not_an_image", ""),
        (encoded(noise(64, 64), "JPEG")[:-400], "corrupt_image", "OSError: image file is truncated"),
        (png()[:-40], "corrupt_image", ""),
        (png_of(4, 4, b"not zlib"), "corrupt_image", ""),
        (png_of(60_000, 60_000), "too_many_pixels", "has more than twice the 1000000 pixels"),
        (png_of(1001, 1000), "too_many_pixels", "has 1001×1000 pixels, max_pixels allows 1000000"),
        (gif_of(65_535, 65_535), "too_many_pixels", "has more than twice"),
        (encoded(Image.new("L", (1, 60_000))), "too_many_pixels", "would be resized to 10×600000 pixels"),
        (encoded(Image.new("L", (60_000, 1))), "too_many_pixels", "would be resized to 600000×10 pixels"),
    ],
)
def test_hostile_images_are_rejected(data: bytes, reason: str, detail: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with pytest.raises(BadImage) as caught:
        decode_image(data, PREPROCESSING, 1_000_000)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == reason
    assert reason in REASONS
    assert detail in str(caught.value)
    assert "0x" not in str(caught.value)
    assert taken < 5e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; Pillow's own are not traced


def test_a_tall_image_does_not_explode_on_its_way_to_a_small_square() -> None:
    """Pillow resizes the rows of all lines first: 1×900,000 pixels would pass through 224×900,000."""
    square = Preprocessing(resize=(224, 224), resample=2, crop=None, multiply=(1, 1, 1), add=(0, 0, 0))
    rows = zlib.compress(b"\0\0" * 900_000)
    with pytest.raises(BadImage, match="would be resized through 224×900000 pixels") as caught:
        decode_image(png_of(1, 900_000, rows), square, 1_000_000)
    assert caught.value.reason == "too_many_pixels"
    assert decode_image(png_of(1, 4000, rows), square, 1_000_000).height == 4000


GREY = np.linspace(0, 65535, 12 * 9).reshape(9, 12).astype(np.uint16)
GOOD = {
    "grey": encoded(noise().convert("L")),
    "1 bit": encoded(noise().convert("1")),
    "LA": encoded(noise().convert("LA")),
    "RGBA": encoded(noise().convert("RGBA")),
    "palette, transparent": encoded(noise().convert("P"), transparency=3),
    "palette, transparent bytes": encoded(noise().convert("P"), transparency=bytes(range(256))),
    "CMYK JPEG": encoded(noise().convert("CMYK"), "JPEG"),
    "progressive JPEG": encoded(noise(), "JPEG", progressive=True),
    "JPEG, corrupt EXIF": encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40),
    "PNG, EXIF that is none": encoded(noise(), exif=b"Exif\0\0garbagegarbage"),
    "WebP, EXIF that is none": encoded(noise(), "WEBP", exif=b"Exif\0\0garbagegarbage"),
    "16-bit grey PNG": encoded(Image.fromarray(GREY)),
    "16-bit grey TIFF": encoded(Image.fromarray(GREY), "TIFF"),
    "16-bit RGB PNG": png_of(12, 9, zlib.compress((b"\0" + bytes(range(72))) * 9), 16, 2),
    "WebP": encoded(noise(), "WEBP"),
    "WebP, alpha": encoded(noise().convert("RGBA"), "WEBP", lossless=True),
    "GIF": encoded(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]),
    "TIFF": encoded(noise(), "TIFF", compression="tiff_lzw", save_all=True, append_images=[noise(seed=1)]),
    "BMP": encoded(noise(), "BMP"),
    "PPM": encoded(noise(), "PPM"),
}


def test_every_honest_image_is_one_row_of_pixels(tmp_path: Path) -> None:
    members = [(f"{number:02d}.{'JPG' if number % 2 else 'png'}", data) for number, data in enumerate(GOOD.values())]
    (chunk,) = chunks_of(tar_shard(tmp_path, members), chunk_size=64)
    rows = chunk.samples.to_pylist()
    assert [row["reason"] for row in rows] == [None] * len(GOOD), rows
    assert [(row["width"], row["height"]) for row in rows] == [(12, 9)] * len(GOOD)
    assert chunk.head.good == len(GOOD)
    assert chunk.pixels.shape == (len(GOOD), 8, 8, 3)


WHOLE = Preprocessing(resize=None, resample=2, crop=(9, 12), multiply=(1, 1, 1), add=(0, 0, 0))


def test_pixels_are_those_that_are_shown() -> None:
    exact = np.asarray(noise())
    for name in ("BMP", "PPM", "TIFF", "RGBA", "WebP, alpha"):
        np.testing.assert_array_equal(decode_image(GOOD[name], WHOLE).pixels, exact)
    np.testing.assert_array_equal(decode_image(GOOD["grey"], WHOLE).pixels[..., 1], np.asarray(noise().convert("L")))
    first = np.asarray(noise().quantize(256).convert("RGB"))
    assert np.abs(decode_image(GOOD["GIF"], WHOLE).pixels.astype(int) - first).mean() < 10  # the second frame: about 85
    for name in ("16-bit grey PNG", "16-bit grey TIFF"):  # scaled; Pillow's conversion clips nearly all to 255
        np.testing.assert_array_equal(decode_image(GOOD[name], WHOLE).pixels[..., 0], GREY >> 8)
    np.testing.assert_array_equal(decode_image(GOOD["16-bit RGB PNG"], WHOLE).pixels[0].reshape(-1), np.arange(0, 72, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new("RGBA", (12, 9), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 12, 4))
    if mode == "P":
        image, options = Image.new("P", (12, 9), 1), {"transparency": 0}
        image.putpalette([0] * 768)
        image.paste(0, (0, 0, 12, 4))
    elif mode == "RGB":
        image, options = Image.new("RGB", (12, 9), (1, 1, 1)), {"transparency": (0, 0, 0)}
        image.paste((0, 0, 0), (0, 0, 12, 4))
    else:
        image, options = image.convert(mode), {}
    pixels = decode_image(encoded(image, **options), WHOLE).pixels
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] <= 1).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))  # left, to be shown at the top
    shown = Preprocessing(resize=None, resample=2, crop=(40, 20), multiply=(1, 1, 1), add=(0, 0, 0))
    decoded = decode_image(encoded(image, kind, exif=ORIENTED), shown)
    assert (decoded.width, decoded.height) == (20, 40)
    assert decoded.pixels[5, 10].argmax() == 0
    assert decoded.pixels[35, 10].argmax() == 2


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_pillow_s(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(noise(), exif=exif))))
    shown = Preprocessing(resize=None, resample=2, crop=expected.size[::-1], multiply=(1, 1, 1), add=(0, 0, 0))
    np.testing.assert_array_equal(decode_image(encoded(noise(), exif=exif), shown).pixels, np.asarray(expected))


def test_damaged_exif_does_not_cost_the_image() -> None:
    odd = Image.Exif()
    odd[0x0112], odd[0x011A], odd[0x0132] = 6, (72, 1), "2024:01:01 00:00:00"
    raw = bytearray(odd.tobytes())
    lost = kept = 0
    for place in range(6, len(raw)):
        for value in (0, 3, 7, 255):
            changed = bytes(raw[:place]) + bytes([value]) + bytes(raw[place + 1 :])
            decoded = decode_image(encoded(noise(), "JPEG", exif=changed), PREPROCESSING)
            kept, lost = kept + (decoded.width == 9), lost + (decoded.width == 12)
    assert lost + kept == 4 * (len(raw) - 6)
    assert kept > lost > 0  # the turn stands where its own bytes do


FAST = replace(PREPROCESSING, decode="fast")


def soft(width: int, height: int) -> Image.Image:
    """As a photograph is: no two neighbouring pixels far apart."""
    return noise(12, 9).resize((width, height), Image.Resampling.BICUBIC)


def moved(data: bytes) -> float:
    """How far fast pixels are from exact ones, of 255 on average; what is said of the image must be the same."""
    exact, fast = decode_image(data, PREPROCESSING), decode_image(data, FAST)
    assert (fast.width, fast.height) == (exact.width, exact.height)
    return float(np.abs(fast.pixels.astype(int) - exact.pixels).mean())


def test_fast_is_exact_for_all_but_large_jpegs() -> None:
    large = [encoded(soft(400, 300), kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    for data in [*GOOD.values(), *large, encoded(noise(39, 41), "JPEG"), encoded(noise(400, 39), "JPEG")]:
        assert moved(data) == 0


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from((None, (10, 10), (6, 13))), st.integers(1, 8))
def test_fast_never_decodes_below_twice_the_size_after_the_resize(
    width: int, height: int, resize: tuple[int, int] | None, turn: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    how = replace(FAST, resize=resize or 10)
    image, whole, part = decode._load(Image.open(io.BytesIO(encoded(noise(width, height), "JPEG", exif=exif))), how)
    assert whole == ((height, width) if turn > 4 else (width, height))
    if part is None:
        assert image.size == whole
        return
    lengths = np.array([part[2] - part[0], part[3] - part[1]])
    assert (lengths >= 2 * np.array(how.resized_sizes(*whole)[0])).all()
    factors = np.array(whole) / lengths
    assert factors[0] in (2, 4, 8)
    assert factors[0] == factors[1]
    assert (lengths <= image.size).all()
    assert (lengths > np.array(image.size) - 1).all()


@pytest.mark.parametrize(
    "geometry",
    [
        {"fit": "longest", "resize": 20, "pad": (20, 20)},
        {"fit": "within", "resize": (16, 40), "pad": (40, 40)},
        {"fit": "rounded", "resize": 12, "multiple": 4, "crop": (8, 8)},
        {"fit": "thumbnail", "resize": (20, 16), "crop": None},
        {"fit": "aligned_thumbnail", "resize": (20, 16), "crop": None, "channels": "BGR"},
    ],
    ids=lambda geometry: geometry["fit"],
)
@pytest.mark.parametrize("turn", [1, 4, 6, 7])
@pytest.mark.parametrize("size", [(320, 240), (203, 331), (411, 163)])
def test_fast_is_near_exact_pixels_with_every_geometry(geometry: dict[str, Any], turn: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(soft(*size), "JPEG", quality=95, exif=exif)
    fast = replace(FAST, **{"crop": None} | geometry)
    _, whole, part = decode._load(Image.open(io.BytesIO(data)), fast)
    assert part is not None, "decoded smaller"
    least = fast.resized_sizes(*whole)[0][:: -1 if fast.is_turned(*whole) else 1]
    assert (np.array([part[2] - part[0], part[3] - part[1]]) >= 2 * np.array(least)).all()
    exact = decode_image(data, replace(fast, decode="exact")).pixels.astype(int)
    found = decode_image(data, fast).pixels.astype(int)
    assert found.shape == fast.shape
    assert 0 < np.abs(found - exact).mean() < 2
    if fast.pad:
        assert np.array_equal(found[:, :, 3], exact[:, :, 3])
    assert decoding(fast) != decoding(FAST), "they decode to other sizes"


def test_an_image_that_becomes_too_large_on_its_way_is_rejected() -> None:
    """A thumbnail's first resize makes a long image far longer."""
    for fit in ("thumbnail", "aligned_thumbnail"):
        how = replace(FAST, decode="exact", fit=fit, resize=(40, 30), crop=None)
        assert decode_image(encoded(noise(3, 90)), how, 100_000).pixels.shape == (40, 30, 3)
        with pytest.raises(BadImage, match="would be resized to 30×9000 pixels, max_pixels allows 100000"):
            decode_image(encoded(noise(1, 300)), how, 100_000)
    with pytest.raises(BadImage, match="would be resized to 30×9000 pixels"):
        decode_image(encoded(noise(300, 1)), how, 100_000)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(320, 240), (203, 331), (161, 161)])
def test_fast_pixels_are_near_exact_ones_however_the_image_is_turned(turn: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(soft(*size), "JPEG", quality=95, exif=exif)
    assert 0 < moved(data) < 2
    image, whole, _ = decode._load(Image.open(io.BytesIO(data)), FAST)
    assert image.width < whole[0] / 3


def test_fast_takes_every_kind_of_jpeg() -> None:
    image = soft(320, 240)
    for data in (
        encoded(image.convert("L"), "JPEG"),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "JPEG", progressive=True),
        encoded(image, "JPEG", subsampling=0),
        encoded(image, "MPO", save_all=True, append_images=[image]),  # two images in one file, as telephones make
    ):
        assert 0 < moved(data) < 2


def test_fast_rejects_what_exact_rejects() -> None:
    data = encoded(soft(1001, 1000), "JPEG")
    assert decode_image(data, FAST, 1_001_000).width == 1001
    with pytest.raises(BadImage, match="has 1001×1000 pixels, max_pixels allows 1000000"):  # though 126×125 would be decoded
        decode_image(data, FAST, 1_000_000)
    with pytest.raises(BadImage, match="OSError: image file is truncated"):
        decode_image(data[:-4000], FAST)


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(GOOD)), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=5), st.floats(0.1, 1)
)
def test_damaged_images_are_pixels_or_rejects(name: str, changes: list[tuple[float, int]], kept: float) -> None:
    data = bytearray(GOOD[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        assert decode_image(bytes(data[: int(kept * len(data))]), PREPROCESSING, 10_000).pixels.shape == (8, 8, 3)
    except BadImage as bad:
        assert bad.reason in REASONS  # noqa: PT017
        assert "0x" not in str(bad)  # noqa: PT017


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8])
def test_chunks_tile_a_shard_and_only_the_last_is_last(tmp_path: Path, count: int) -> None:
    shard = tar_shard(tmp_path, numbered(count))
    chunks = chunks_of(shard)
    assert [len(chunk.samples) for chunk in chunks] == {0: [0], 1: [1], 3: [3], 4: [4], 5: [4, 1], 8: [4, 4]}[count]
    assert [chunk.head.chunk for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.head.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    keys = [key for chunk in chunks for key in chunk.samples.column("key").to_pylist()]
    assert keys == [name.removesuffix(".png") for name, _ in numbered(count)]
    for done in range(len(chunks)):
        rest = chunks_of(shard, done=frozenset([done]))
        expected = [chunk for chunk in chunks if chunk.head.chunk != done]
        assert [chunk.head for chunk in rest] == [chunk.head for chunk in expected]
        assert [to_ipc(chunk.samples) for chunk in rest] == [to_ipc(chunk.samples) for chunk in expected]
    limited = chunks_of(shard, limit=4)
    assert sum(len(chunk.samples) for chunk in limited) == min(count, 4)
    assert [chunk.head.last for chunk in limited] == [True]


def test_chunks_repeat_byte_for_byte(tmp_path: Path) -> None:
    broken = [("x.jpg", b"text"), ("y.png", png()[:-40]), ("z.json", b"{}"), ("000.png", png(0)), ("w.gif", gif_of(2, 2))]
    shard = tar_shard(tmp_path, [*numbered(6), *broken])
    one, two = (chunks_of(shard, carry=(("label", "int64"),)) for _ in range(2))
    assert [chunk.head for chunk in one] == [chunk.head for chunk in two]
    assert [to_ipc(chunk.samples) for chunk in one] == [to_ipc(chunk.samples) for chunk in two]
    assert [chunk.pixels.tobytes() for chunk in one] == [chunk.pixels.tobytes() for chunk in two]
    rows = [row for chunk in one for row in chunk.samples.to_pylist()]
    assert [row["reason"] for row in rows] == [None] * 6 + [
        "not_an_image", "corrupt_image", "no_image", "duplicate_id", "corrupt_image",
    ]  # fmt: skip
    assert [row["sha256"] is None for row in rows] == [False] * 8 + [True, False, False]
    assert not any("0x" in (row["detail"] or "") for row in rows)
    assert sum(chunk.head.good for chunk in one) == 6


def test_duplicates_are_known_across_chunks_that_are_done(tmp_path: Path) -> None:
    shard = tar_shard(tmp_path, [*numbered(4), ("001.png", png(9)), ("e.png", png(8))])
    (chunk,) = chunks_of(shard, done=frozenset([0]))
    assert chunk.samples.column("reason").to_pylist() == ["duplicate_id", None]
    np.testing.assert_array_equal(chunk.pixels, [decode_image(png(8), PREPROCESSING).pixels])


def test_a_cut_shard_yields_its_full_chunks_and_then_raises(tmp_path: Path) -> None:
    data = tar_of(numbered(10))
    shard = shard_at(tmp_path / "a.tar", data[: 9 * 1024 + 700])
    found: list[DecodedChunk] = []
    with pytest.raises(ShardError, match="incomplete"):
        found.extend(decode_shard(WorkItem(shard=shard), layout(), PREPROCESSING, {}))
    assert [(chunk.head.chunk, chunk.head.last, chunk.head.good) for chunk in found] == [(0, False, 4), (1, False, 4)]
    whole = shard_at(tmp_path / "whole.tar", tar_of(numbered(1)))
    batch = {"block": [Block(items=(WorkItem(shard=shard), WorkItem(shard=whole)))]}
    rows = list(decode_items(batch, layout(), PREPROCESSING, {}))
    heads = [ChunkHead.from_json(row["head"][0]) for row in rows]
    assert [(head.shard_name, bool(head.error), head.last) for head in heads] == [
        ("a.tar", False, False), ("a.tar", False, False), ("a.tar", True, False), ("whole.tar", False, True),
    ]  # fmt: skip
    assert [row["pixels"].shape for row in rows] == [(1, 4, 8, 8, 3), (1, 4, 8, 8, 3), (1, 1, 8, 8, 3), (1, 1, 8, 8, 3)]
    assert from_ipc(rows[2]["samples"][0]).num_rows == 0


CARRY = (("text", "string"), ("number", "int64"), ("share", "float64"), ("flag", "bool"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "é", "number": 7, "share": 0.5, "flag": True}, ("é", 7, 0.5, True)),
        ({"text": 7, "number": "7", "share": "1e3", "flag": "false"}, ("7", 7, 1000.0, False)),
        ({"text": {"a": [1]}, "number": 3.0, "share": 2, "flag": 0}, ('{"a": [1]}', 3, 2.0, False)),
        ({"text": None, "number": None, "share": None, "flag": None}, (None, None, None, None)),
        ({}, (None, None, None, None)),
        ({"text": "\ud800", "number": 2**63, "share": [], "flag": "maybe"}, ("\\ud800", None, None, None)),
        ({"text": "", "number": 1.5, "share": "x", "flag": 2}, ("", None, None, None)),
        ({"text": "-", "number": -(2**63), "share": 10**400, "flag": {}}, ("-", -(2**63), None, None)),
        ({"text": "-", "number": float("inf"), "share": float("inf"), "flag": 1}, ("-", None, float("inf"), True)),
        ({"text": "-", "number": "9" * 5000, "share": {}, "flag": []}, ("-", None, None, None)),
    ],
)
def test_carried_fields_have_their_column_s_type_or_are_null(tmp_path: Path, fields: Any, expected: Any) -> None:
    data = tar_of([("a.png", png()), ("a.json", json.dumps(fields).encode())])
    (chunk,) = chunks_of(shard_at(tmp_path / "a.tar", data), carry=CARRY)
    (row,) = chunk.samples.to_pylist()
    assert tuple(row[name] for name, _ in CARRY) == expected


def test_carried_fields_from_text_members_and_parquet(tmp_path: Path) -> None:
    members = [("a.png", png()), ("a.number", b" 12\n"), ("a.text", b"caf\xe9"), ("a.flag", b"1"), ("a.share", b"")]
    (chunk,) = chunks_of(tar_shard(tmp_path, members), carry=CARRY)
    (row,) = chunk.samples.to_pylist()
    assert tuple(row[name] for name, _ in CARRY) == ("caf\ufffd", 12, None, True)
    columns = {"image": [png()] * 2, "number": pa.array([5, None], pa.uint8()), "flag": [True, None], "share": ["1", "x"]}
    (chunk,) = chunks_of(shard_at(tmp_path / "a.parquet", parquet_of(columns)), carry=CARRY)
    rows = [tuple(row[name] for name, _ in CARRY) for row in chunk.samples.to_pylist()]
    assert rows == [(None, 5, 1.0, True), (None, None, None, None)]


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b'"text"', b"[" * 100_000, b"null"])
def test_json_that_is_no_object_carries_nothing(tmp_path: Path, data: bytes) -> None:
    (chunk,) = chunks_of(tar_shard(tmp_path, [("a.png", png()), ("a.json", data)]), carry=CARRY)
    assert chunk.samples.column("number").to_pylist() == [None]
    assert chunk.head.good == 1
