"""Draws `src/lora_embed/images/known/` again: a small image for each way in which image files are decoded.

Encoders hold hashes of what these files decode to, so a file is never changed: another way is another file.
`python scripts/draw_decoding_images.py` writes those that are missing. `known.json` beside them holds what decoding and
resizing give with Pillow 13; `--known` writes it from what is installed.
"""

import io
import json
import struct
import sys
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_embed.images.arithmetic import IMAGES, KNOWN, PILLOW_13, known_paths

LARGE, SMALL, TINY = (403, 301), (61, 47), (21, 15)  # width, height: odd, so that chroma ends within a block
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # of Adam7


def picture(size: tuple[int, int], seed: int = 1) -> Image.Image:
    """Half smooth, half noise, with edges in colour."""
    width, height = size
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    image.paste(Image.fromarray(noise).resize((width // 2, height // 2), Image.Resampling.NEAREST), (width // 2, height // 2))
    return image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(values: NDArray[np.generic], *, interlaced: bool = False, key: bytes = b"") -> bytes:
    """What Pillow cannot write: RGB of 16 bits, interlaced images, and 16-bit images with a transparent colour."""
    height, width, colours = values.shape
    rows = [values]
    if interlaced:
        rows = [values[top::down, left::right] for top, left, down, right in PASSES]
    data = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for part in rows for row in part)
    return png_file(width, height, 8 * values.dtype.itemsize, 2 if colours == 3 else 0, data, interlaced=interlaced, key=key)


def png_file(
    width: int, height: int, depth: int, colour: int, data: bytes, *, interlaced: bool = False, key: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    keys = [(b"tRNS", key)] if key else []
    chunks = ((b"IHDR", header), *keys, (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def draw() -> dict[str, bytes]:
    """File name → file."""
    image, tiny, large = picture(SMALL), picture(TINY), picture(LARGE)
    clear, palette = image.convert("RGBA"), image.quantize(64)
    clear.putalpha(Image.linear_gradient("L").resize(SMALL))
    deep = (np.asarray(tiny).astype(np.uint16) << 8) + np.asarray(tiny)[::-1]
    other = picture(SMALL, seed=2).quantize(64)
    four_greys = b"".join(b"\0" + bytes((27 * (row + column)) % 256 for column in range(5)) for row in range(9))
    return {
        "avif-alpha.avif": saved(clear, "AVIF", quality=100, subsampling="4:4:4"),
        "avif-lossy.avif": saved(image, "AVIF", quality=80, subsampling="4:2:0"),
        "bmp.bmp": saved(tiny, "BMP"),
        "gif-animated.gif": saved(palette, "GIF", save_all=True, append_images=[other], transparency=3),
        "jpeg-420.jpg": saved(image, "JPEG", quality=90, subsampling="4:2:0"),
        "jpeg-422.jpg": saved(image, "JPEG", quality=90, subsampling="4:2:2"),
        "jpeg-444.jpg": saved(image, "JPEG", quality=90, subsampling="4:4:4"),
        "jpeg-cmyk.jpg": saved(image.convert("CMYK"), "JPEG", quality=90),
        "jpeg-coarse.jpg": saved(image, "JPEG", quality=10),
        "jpeg-grey.jpg": saved(image.convert("L"), "JPEG", quality=90),
        "jpeg-large.jpg": saved(large, "JPEG", quality=50),
        "jpeg-large-progressive.jpg": saved(large, "JPEG", quality=40, progressive=True, subsampling="4:2:2", exif=turned(6)),
        "jpeg-progressive.jpg": saved(image, "JPEG", quality=90, progressive=True),
        "jpeg-turned.jpg": saved(image, "JPEG", quality=90, exif=turned(7)),
        "jpeg2000-lossless.j2k": saved(image, "JPEG2000", no_jp2=True),
        "jpeg2000-lossy.jp2": saved(clear, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[8]),
        "png-alpha.png": saved(clear, "PNG"),
        "png-deep.png": png(deep),
        "png-grey.png": saved(image.convert("L"), "PNG"),
        "png-grey-alpha.png": saved(clear.convert("LA"), "PNG"),
        "png-grey-deep.png": saved(Image.fromarray(deep[:, :, 0]), "PNG"),
        "png-grey-deep-key.png": png(deep[:, :, :1], key=struct.pack(">H", deep[3, 4, 0])),
        "png-grey-few-key.png": png_file(20, 9, 2, 0, four_greys, key=b"\0\1"),
        "png-interlaced.png": png(np.asarray(tiny), interlaced=True),
        "png-deep-key.png": png(deep, key=struct.pack(">3H", *deep[3, 4])),
        "png-key.png": saved(image, "PNG", transparency=image.getpixel((0, 0))),
        "png-one-bit.png": saved(image.convert("1"), "PNG"),
        "png-palette.png": saved(palette, "PNG"),
        "png-palette-alpha.png": saved(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "png-rgb.png": saved(image, "PNG", exif=turned(8)),
        "ppm.ppm": saved(tiny, "PPM"),
        "tga.tga": saved(tiny, "TGA", compression="tga_rle"),
        "tiff-float.tif": saved(Image.fromarray(deep[:, :, 0].astype(np.float32) / 65535), "TIFF"),
        "tiff-integers.tif": saved(Image.fromarray(deep[:, :, 0].astype(np.int32)), "TIFF"),
        "tiff-jpeg.tif": saved(image, "TIFF", compression="jpeg"),
        "tiff-lzw.tif": saved(tiny.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "webp-alpha.webp": saved(clear, "WEBP", quality=80),
        "webp-lossless.webp": saved(clear, "WEBP", lossless=True, exact=True),
        "webp-lossy.webp": saved(image, "WEBP", quality=80),
    }


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, data in draw().items():
        if not (IMAGES / name).exists():
            (IMAGES / name).write_bytes(data)
    if "--known" in sys.argv:
        KNOWN.write_text(json.dumps({PILLOW_13: known_paths()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
