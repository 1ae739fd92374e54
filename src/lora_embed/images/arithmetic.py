"""Check on test images that this process makes the same pixels as the one that built the encoder; otherwise it must not work.

Pillow 13 resizes tall images in another order than Pillow 12, so one encoder would make two spaces. Therefore an encoder's
description names the arithmetic that makes its pixels, as a part of the space id, with a hash for each way through the code.
"""

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

from lora_embed.errors import EncoderError
from lora_embed.images.decode import BadImage, decode_image
from lora_embed.images.preprocess import PILLOW_13, Arithmetic, Joint, Pixels, Preprocessing

IMAGES = Path(__file__).parent / "known"  # a file for each way of decoding, from scripts/draw_decoding_images.py
KNOWN = IMAGES / "known.json"  # name of the arithmetic → path → hash, from `known_paths`
FILTERS = range(6)  # Pillow's numbers
AS_DECODED = Preprocessing(resize=None, resample=0, crop=None, multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))
SQUEEZED = (40, 56)  # (height, width) of the known resize; an encoder's own resize is hashed when it is built
FAST = {"jpeg-large.jpg": (18, 72), "jpeg-large-progressive.jpg": (36,)}  # edges that are decoded at 1/8, 1/2 and 1/4
_GOLDEN = "golden "  # the first word of the path of an encoder's golden image
_MODULUS = 10_007  # bytes of noise; a prime, so that no two rows of an image are equal


def name_arithmetic(preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing with this process's arithmetic: name, libraries, and a hash of its pixels for each test image.

    The name is Pillow 13's if all known test images equal Pillow 13's; otherwise it is a hash of their hashes.
    """
    hashes = _named_paths(preprocessing)
    name = PILLOW_13
    if hashes != {path: known_pixels(PILLOW_13).get(path) for path in hashes}:
        name = f"pixels-{hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:12]}"
    arithmetic = Arithmetic(name=name, pixels=tuple(_own_paths(preprocessing).items()), libraries=tuple(libraries().items()))
    return replace(preprocessing, arithmetic=arithmetic)


def check_arithmetic(preprocessing: Preprocessing | Joint) -> None:
    """Raises EncoderError if this process makes other pixels of a test image than the process that built the encoder.

    An encoder that was built before such hashes were recorded is compared with the known hashes of its arithmetic.
    """
    for part in preprocessing.parts:
        expected = {path: pixels for path, pixels in part.arithmetic.pixels if not path.startswith(_GOLDEN)}
        if expected:
            _compare(expected, _own_paths(part), part.arithmetic)
        else:
            hashes = _named_paths(part)
            known_hashes = known_pixels(part.arithmetic.name)
            _compare({path: known_hashes.get(path, "unknown") for path in hashes}, hashes, part.arithmetic)


check_once = functools.cache(check_arithmetic)  # for decode workers, which process many blocks


def with_golden(preprocessing: Preprocessing, pixels: dict[str, Pixels]) -> Preprocessing:
    """The preprocessing with hashes of the golden images' pixels added; `pixels`: file name → uint8 (H, W, 3)."""
    arithmetic = preprocessing.arithmetic
    return replace(
        preprocessing, arithmetic=replace(arithmetic, pixels=arithmetic.pixels + tuple(_golden_paths(pixels).items()))
    )


def check_golden_pixels(preprocessing: Preprocessing, pixels: dict[str, Pixels]) -> None:
    """Raises EncoderError if the golden images' pixels differ from the hashes of `with_golden`, where there are any."""
    expected = {path: pixels_hash for path, pixels_hash in preprocessing.arithmetic.pixels if path.startswith(_GOLDEN)}
    _compare(expected, _golden_paths(pixels), preprocessing.arithmetic)


def _golden_paths(pixels: dict[str, Pixels]) -> dict[str, str]:
    return {f"{_GOLDEN}{name}": _hash(image) for name, image in pixels.items()}


def _compare(expected: Mapping[str, str], hashes: Mapping[str, str], built: Arithmetic) -> None:
    """Raises EncoderError for hashes that differ, with their paths and the versions of the libraries then and now."""
    differing = [path for path, pixels in expected.items() if hashes.get(path) != pixels]
    if not differing:
        return
    built_with, installed = dict(built.libraries) or {"Pillow": "13.0.0"}, libraries()
    changed = [name for name in installed if name == "Pillow" or (name in built_with and built_with[name] != installed[name])]
    first_paths = ", ".join(differing[:6]) + (f" and {len(differing) - 6} more" if len(differing) > 6 else "")
    raise EncoderError(
        f"pixels: on {platform.node()}, the pixels of {len(differing)} of {len(expected)} test images differ from those of the "
        f"machine that built the encoder ({first_paths}), so vectors would be of another space. The encoder was built with "
        f"{_listed(built_with, changed)}; this machine has {_listed(installed, changed)}. Install Pillow "
        f"{built_with.get('Pillow')} on all nodes, or build the encoder again with the present libraries and embed all images "
        "again."
    )


def _hash(pixels: Pixels) -> str:
    """16 hex digits: a hash of shape and values."""
    return hashlib.sha256(f"{pixels.shape} ".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def libraries() -> dict[str, str]:
    """Name → version of the libraries that make pixels, and of transformers, whose processor the geometry is checked with."""
    versions: dict[str, str | None] = {
        "Pillow": PIL.__version__,
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version_module("webp"),
        "libtiff": features.version_codec("libtiff"),
        "zlib": features.version_codec("zlib"),
    }
    for name in ("numpy", "transformers"):
        versions[name] = metadata.version(name)
    return {name: version for name, version in versions.items() if version}


@functools.cache
def known_pixels(name: str) -> Mapping[str, str]:
    """Path → hash of the pixels of the arithmetic with this name; empty if this release does not know it."""
    known: dict[str, dict[str, str]] = json.loads(KNOWN.read_text(encoding="utf-8"))
    return known.get(name, {})


def known_paths() -> dict[str, str]:
    """Every path that can be checked without an encoder → hash of the pixels that this process makes."""
    hashes = _decoded_paths() | _fast_paths()
    for number in FILTERS:
        hashes |= _squeezed_paths(number)
    return hashes


def _named_paths(preprocessing: Preprocessing) -> dict[str, str]:
    """The known paths that this preprocessing uses → hash of the pixels that this process makes."""
    resized = {} if preprocessing.resize is None else _squeezed_paths(preprocessing.resample)
    return _decoding_paths(preprocessing) | resized


def _own_paths(preprocessing: Preprocessing) -> dict[str, str]:
    """Paths of decoding, and of the encoder's own resize and crop on images of several shapes."""
    return _decoding_paths(preprocessing) | _resized_paths(preprocessing, "resize {}")


def _decoding_paths(preprocessing: Preprocessing) -> dict[str, str]:
    return _decoded_paths() | (_fast_paths() if preprocessing.decode == "fast" else {})


def _decoded_paths() -> dict[str, str]:
    files = sorted(file for file in IMAGES.iterdir() if file.suffix != KNOWN.suffix)
    return {f"decode {file.name}": _hash_decoded(file, AS_DECODED) for file in files}


def _fast_paths() -> dict[str, str]:
    hashes = {}
    for name, edges in FAST.items():
        for edge in edges:
            prepare = replace(AS_DECODED, resize=(edge, edge), resample=2, decode="fast")
            hashes[f"decode {name} fast to {edge} pixels"] = _hash_decoded(IMAGES / name, prepare)
    return hashes


def _hash_decoded(file: Path, prepare: Preprocessing) -> str:
    try:
        return _hash(decode_image(file.read_bytes(), prepare).pixels)
    except BadImage as bad:  # for example, a Pillow without WebP
        return bad.reason


def _squeezed_paths(number: int) -> dict[str, str]:
    prepare = replace(AS_DECODED, resize=SQUEEZED, resample=number)
    return _resized_paths(prepare, f"resize {{}} by filter {number}")


def _resized_paths(preprocessing: Preprocessing, name: str) -> dict[str, str]:
    if preprocessing.resize is None:
        return {}
    images = _shapes(preprocessing.resize)
    return {name.format(kind): _hash(preprocessing.apply(_noise(*size))) for kind, size in images.items()}


def _shapes(resize: tuple[int, int] | int) -> dict[str, tuple[int, int]]:
    """(width, height) of images that are reduced, enlarged, or both: Pillow 13 resizes rows first or last, by the shape."""
    height, width = resize if isinstance(resize, tuple) else (resize, resize)
    wider, higher = width + width // 8 + 1, height + height // 8 + 1
    return {
        "tall": (wider, 5 * higher // 2),
        "narrow": (width // 2 + 1, 5 * height // 4),
        "wide": (2 * wider, higher),
        "large": (3 * width // 2, 4 * height // 3),
        "small": (width // 3 + 1, height // 4 + 1),
    }


def _noise(width: int, height: int) -> Image.Image:
    """An RGB image that is the same with every version of numpy, whose random generators may change."""
    values = np.arange(_MODULUS, dtype=np.uint32) * np.uint32(2654435761)
    values = (values ^ (values >> np.uint32(15))) * np.uint32(2246822519)
    return Image.fromarray(np.resize((values >> np.uint32(16)).astype(np.uint8), (height, width, 3)))


def _listed(versions: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'unknown')}" for name in names)
