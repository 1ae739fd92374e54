"""Formats beside the usual ones, samples of other depths, and what is said of bytes that are no image."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from bent_images import try_all
from lora_embed.images.arithmetic import AS_DECODED
from lora_embed.images.decode import BadImage, decode_image, to_rgb
from lora_embed.images.recognise import name_of
from mutants import Mutant
from samples import encoded, noise, png, tar_of

SMOOTH = noise(6, 5, 1).resize((64, 48), Image.Resampling.BICUBIC)


def decoded(data: bytes) -> np.ndarray:
    pixels = decode_image(data, AS_DECODED).pixels
    assert isinstance(pixels, np.ndarray)
    return pixels


def rejected(data: bytes) -> tuple[str, str]:
    with pytest.raises(BadImage) as bad:
        decode_image(data, AS_DECODED)
    return bad.value.reason, str(bad.value)


@pytest.mark.parametrize(
    ("kind", "options", "off"),
    [
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 6), ("JPEG2000", {}, 0), ("JPEG2000", {"no_jp2": True}, 0),
        ("JPEG2000", {"irreversible": True}, 3), ("TGA", {}, 0), ("TGA", {"compression": "tga_rle"}, 0),
    ],
)  # fmt: skip
def test_more_formats_are_read_by_their_content(kind: str, options: dict[str, object], off: int) -> None:
    assert np.abs(decoded(encoded(SMOOTH, kind, **options)).astype(int) - np.asarray(SMOOTH)).max() <= off
    clear = SMOOTH.convert("RGBA")
    clear.putalpha(0)
    assert decoded(encoded(clear, kind, **options)).min() >= 255 - off, "what is transparent is white"
    assert decoded(encoded(SMOOTH.convert("L"), kind, **options)).shape == (48, 64, 3)


def test_avif_is_turned_and_of_an_animation_the_first_frame_is_taken() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"quality": 95, "subsampling": "4:4:4"}
    assert decoded(encoded(SMOOTH, "AVIF", exif=exif, **options)).shape == (64, 48, 3)
    animated = encoded(SMOOTH, "AVIF", save_all=True, append_images=[Image.new("RGB", SMOOTH.size)], **options)
    assert np.abs(decoded(animated).astype(int) - np.asarray(SMOOTH)).max() <= 12


def test_a_jpeg_2000_of_16_bits_is_scaled() -> None:
    deep = Image.fromarray(np.asarray(SMOOTH.convert("L")).astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(encoded(deep, "JPEG2000"))[..., 0], np.asarray(SMOOTH.convert("L")))


def test_a_tga_without_a_footer_is_known_by_its_header_and_others_are_not() -> None:
    data = encoded(SMOOTH, "TGA").removesuffix(b"TRUEVISION-XFILE.\0")
    np.testing.assert_array_equal(decoded(data), np.asarray(SMOOTH))
    assert rejected(bytes(1000))[0] == "not_an_image"
    assert rejected(b"\0\1\2" + data[3:])[0] == "not_an_image"
    found = random.Random(0)
    assert {rejected(found.randbytes(200))[0] for _ in range(2000)} == {"not_an_image"}


def png_of(depth: int, colour: int, rows: list[bytes], width: int, key: bytes = b"") -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))]
    chunks += [(b"tRNS", key)] if key else []
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png_of(16, 0, [struct.pack(">4H", 0, 1000, 1001, 65535)], 4, struct.pack(">H", 1000)), [0, 255, 3, 255]),
        (png_of(16, 0, [struct.pack(">3H", 0, 1000, 65535)], 3, struct.pack(">H", 0)), [255, 3, 255]),
        (
            png_of(
                16,
                2,
                [struct.pack(">12H", *[0] * 3, *[1000] * 3, *[1001] * 3, *[9000] * 3)],
                4,
                struct.pack(">3H", *[1000] * 3),
            ),
            [0, 255, 3, 35],
        ),
        (png_of(16, 4, [struct.pack(">6H", 5000, 0, 5000, 65535, 0, 32768)], 3), [255, 19, 127]),
        (png_of(16, 6, [struct.pack(">8H", 0, 0, 0, 0, 0, 0, 0, 65535)], 2), [255, 0]),
        (png_of(8, 0, [bytes([0, 3, 4])], 3, struct.pack(">H", 3)), [0, 255, 4]),
        (png_of(4, 0, [bytes([0x3F])], 2, struct.pack(">H", 3)), [255, 255]),
        (png_of(4, 0, [bytes([0x3F])], 2, struct.pack(">H", 15)), [51, 255]),
        (png_of(2, 0, [bytes([0b00011011])], 4, struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png_of(1, 0, [bytes([0b01000000])], 2, struct.pack(">H", 0)), [255, 255]),
        (png_of(1, 0, [bytes([0b01000000])], 2, struct.pack(">H", 1)), [0, 255]),
    ],
)
def test_the_transparent_colour_of_any_depth_is_white(data: bytes, expected: list[int]) -> None:
    assert decoded(data)[0, :, 0].tolist() == expected
    opened = Image.open(io.BytesIO(data))
    first = np.asarray(to_rgb(opened))
    np.testing.assert_array_equal(np.asarray(to_rgb(opened)), first)  # an image that a caller holds is not changed


def tiff(values: object, kind: type) -> bytes:
    return encoded(Image.fromarray(np.array([values], kind)), "TIFF")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff([0, 0.5, 1], np.float32), [0, 128, 255]), (tiff([0, 0.1, 0.2], np.float32), [0, 26, 51]),
        (tiff([-0.0005, 0.5, 1.0005], np.float32), [0, 128, 255]), (tiff([0, 127.9, 255], np.float32), [0, 127, 255]),
        (tiff([0, 7, 255], np.int32), [0, 7, 255]), (tiff([0, 256, 65535], np.int32), [0, 1, 255]),
        (tiff([0, 4096, 65535], np.uint16), [0, 16, 255]),
        (b"Pf\n3 1\n-1.0\n" + struct.pack("<3f", 0, 0.5, 1), [0, 128, 255]),
        (b"P5\n3 1\n65535\n" + struct.pack(">3H", 0, 200, 255), [0, 0, 0]),  # 16 bits, however dark
    ],
)  # fmt: skip
def test_samples_of_32_bits_are_scaled_by_what_they_hold(data: bytes, expected: list[int]) -> None:
    assert decoded(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (tiff([-12.5, 0, 3000], np.float32), "has numbers from -12.5 to 3000, expected 0 to 1 or 0 to 255. Save it with 8"),
        (tiff([0, float("nan"), 1], np.float32), "has numbers from nan to nan, expected 0 to 1"),
        (tiff([0, float("inf"), 1], np.float32), "has numbers from 0 to inf, expected 0 to 1"),
        (tiff([-1, 5, 2**31 - 1], np.int32), "has whole numbers from -1 to 2147483647, expected 0 to 255 or 0 to 65535"),
        (tiff([0, 70000, 5], np.int32), "has whole numbers from 0 to 70000"),
    ],
)
def test_numbers_that_are_no_brightness_are_rejects(data: bytes, detail: str) -> None:
    assert rejected(data)[0] == "not_an_image"
    assert detail in rejected(data)[1]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png())
    return buffer.getvalue()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)
NO_IMAGES = [
    (HEIC, "of a HEIC image, which is not read. Convert it to JPEG, PNG or WebP"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50), "of a HEIC image"),
    (b"\xff\x0a" + bytes(9), "of a JPEG XL image, which is not read"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "of a JPEG XL image"),
    (b"8BPS\0\1" + bytes(50), "of a Photoshop image"),
    (b"\0\0\1\0\1\0" + bytes(20), "of a ICO image"),
    (b"<svg xmlns='x'/>", "of an SVG image, which is not read"),
    (b"<?xml version='1.0'?>\n<!-- x -->\n<svg/>", "of an SVG image"),
    (b"\n<!DOCTYPE html>\n<html>", "of an HTML page, not an image: perhaps a server's answer to a failed download"),
    (
        b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>",
        "an object store's error page (AccessDenied), not an image",
    ),
    (b"<?xml version='1.0'?>\n<a/>", "of an XML document"),
    (b'{"error": 404}', "of JSON, not an image"),
    (gzip.compress(png()), "of gzip data, not an image"),
    (zipped(), "of a zip archive"),
    (tar_of([("a.png", png())]), "of a tar, not"),
    (tar_of([("a.png", png())], tarfile.USTAR_FORMAT), "of a tar, not"),
    (b"%PDF-1.7\n", "of a PDF document"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0isom", "of a video, not an image"),
    (b"RIFF\0\0\0\0AVI LIST", "of an AVI video"),
    (b"RIFF\0\0\0\0WAVEfmt ", "of a WAV file"),
    (b"\x1a\x45\xdf\xa3\1", "WebM or Matroska"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n",
        "of a Git LFS pointer, not an image. Fetch the file",
    ),
    (b"404: Not Found\n", "of text, not an image: '404: Not Found'"),
    ("наша кошка".encode(), "of text, not an image: 'наша кошка'"),
    ("\ufeffa,b\n1,2\n".encode(), "of text, not an image"),
    ("a,b".encode("utf-16"), "of text, not an image: 'a,b'"),
    (b"PAR1" + bytes(8), "of a Parquet file"),
    (b"\x80\4\x95", "of a pickle"),
    (b"\x93NUMPY\1\0", "of a NumPy array"),
    (bytes(99), "99 bytes that start with 0000000000000000, all of them zeros"),
    (b"\xde\xad\xbe\xef\1\2\3\4\5", "9 bytes that start with deadbeef01020304"),
    (png()[:12], "begin like a PNG image (89504e470d0a1a0a), but its header is damaged or of a kind that is not read"),
    (b"P5 abc", "begin like a PNM image"),
    (b"RIFF\0\0\0\0WEBPVP8 ", "begin like a WebP image"),
]


@pytest.mark.parametrize(("data", "detail"), NO_IMAGES)
def test_bytes_that_are_no_image_are_named(data: bytes, detail: str) -> None:
    reason, says = rejected(data)
    assert reason == "not_an_image"
    assert says.startswith(f"{len(data)} bytes")
    assert detail in says


def test_the_beginning_of_anything_has_a_name() -> None:
    found = random.Random(1)
    for data, _ in NO_IMAGES:
        for _ in range(50):
            changed = bytearray(data[: found.randrange(1, len(data) + 1)])
            changed[found.randrange(len(changed))] = found.randrange(256)
            says = name_of(bytes(changed))
            assert len(says) < 250
            assert says.isprintable()


def changed_files(seed: int, count: int) -> Iterator[Mutant]:
    """Files of the newer formats with bytes changed, cut out and put in."""
    clear = SMOOTH.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(SMOOTH.size))
    small = {"tile_size": (16, 16), "quality_layers": [20, 10, 1]}
    seeds = {
        "AVIF": [encoded(SMOOTH, "AVIF"), encoded(clear, "AVIF"), encoded(clear, "AVIF", save_all=True, append_images=[clear])],
        "JPEG2000": [
            encoded(SMOOTH, "JPEG2000"),
            encoded(clear, "JPEG2000", **small),
            encoded(SMOOTH, "JPEG2000", no_jp2=True),
        ],
        "TGA": [encoded(clear, "TGA", compression="tga_rle"), encoded(SMOOTH.quantize(9), "TGA")],
    }
    found = random.Random(seed)
    for _ in range(count):
        name = found.choice(sorted(seeds))
        data = bytearray(found.choice(seeds[name]))
        for _ in range(found.randrange(1, 6)):
            place = found.randrange(min(len(data), found.choice([400, 10**6])))
            how = found.randrange(3)
            some = found.choice([b"\xff", b"\0", found.randbytes(2), b"\xff\xff\xff\xff", found.randbytes(4)])
            data[place : place + (len(some) if how == 0 else how)] = some if how < 2 else b""
        yield Mutant(name, "changed bytes", bytes(data))


def test_changed_files_of_newer_formats_are_pixels_or_one_reject() -> None:
    found = try_all(changed_files(0, 600))
    print(found.describe())
    assert not found.failures
    assert {name for name, outcome in found.outcomes if outcome == "pixels"} == {"AVIF", "JPEG2000", "TGA"}


@pytest.mark.long
def test_many_changed_files_of_newer_formats_are_pixels_or_one_reject() -> None:
    assert not try_all(changed_files(1, 20_000)).failures
