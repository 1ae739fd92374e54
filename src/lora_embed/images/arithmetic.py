"""Which pixels this process makes of an image, shown on test images; one that makes others than an encoder's does no work.

Pillow 13 resizes tall images in another order than Pillow 12, so one encoder would make two spaces. What decodes and
resizes is therefore named in an encoder's description, as part of its space id, and hashed path by path.
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

IMAGES = Path(__file__).parent / "known"  # one file for each way of decoding; scripts/draw_decoding_images.py drew them
KNOWN = IMAGES / "known.json"  # arithmetic → path → hash, as `known_paths` gives them
FILTERS = range(6)  # Pillow's numbers
AS_DECODED = Preprocessing(resize=None, resample=0, crop=None, multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))
SQUEEZED = (40, 56)  # (height, width) after the resize that has a name; an encoder's own is hashed when it is built
FAST = {"jpeg-large.jpg": (18, 72), "jpeg-large-progressive.jpg": (36,)}  # edges that are decoded at 1/8, 1/2 and 1/4
_GOLDEN = "golden "  # the path of an image that lies with the encoder begins so
_MODULUS = 10_007  # bytes of noise, a prime: no two rows of an image are alike


def name_arithmetic(preprocessing: Preprocessing) -> Preprocessing:
    """The same with the arithmetic of this process: its name, its libraries and what it makes of each test image.

    The name is that of Pillow 13's where all of them come out so, and else a hash of what they are.
    """
    here = _named_paths(preprocessing)
    name = PILLOW_13
    if here != {path: known_pixels(PILLOW_13).get(path) for path in here}:
        name = f"pixels-{hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]}"
    found = Arithmetic(name=name, pixels=tuple(_own_paths(preprocessing).items()), libraries=tuple(libraries().items()))
    return replace(preprocessing, arithmetic=found)


def check_arithmetic(preprocessing: Preprocessing | Joint) -> None:
    """Raises EncoderError when this process makes other pixels of any test image than where the encoder was built.

    An encoder that was built before these were recorded is held against what its arithmetic is known to give.
    """
    for part in preprocessing.parts:
        expected = {path: pixels for path, pixels in part.arithmetic.pixels if not path.startswith(_GOLDEN)}
        if expected:
            _compare(expected, _own_paths(part), part.arithmetic)
        else:
            here = _named_paths(part)
            known = known_pixels(part.arithmetic.name)
            _compare({path: known.get(path, "unknown") for path in here}, here, part.arithmetic)


check_once = functools.cache(check_arithmetic)  # for decode workers, which get block after block


def with_golden(preprocessing: Preprocessing, pixels: dict[str, Pixels]) -> Preprocessing:
    """The same, which also says what became of the golden images: file name → uint8 (H, W, 3)."""
    arithmetic = preprocessing.arithmetic
    return replace(
        preprocessing, arithmetic=replace(arithmetic, pixels=arithmetic.pixels + tuple(_golden_paths(pixels).items()))
    )


def check_golden_pixels(preprocessing: Preprocessing, pixels: dict[str, Pixels]) -> None:
    """Raises EncoderError when golden images come out otherwise than `with_golden` said, where it did."""
    expected = {path: found for path, found in preprocessing.arithmetic.pixels if path.startswith(_GOLDEN)}
    _compare(expected, _golden_paths(pixels), preprocessing.arithmetic)


def _golden_paths(pixels: dict[str, Pixels]) -> dict[str, str]:
    return {f"{_GOLDEN}{name}": _hash(image) for name, image in pixels.items()}


def _compare(expected: Mapping[str, str], here: Mapping[str, str], built: Arithmetic) -> None:
    """Raises EncoderError for hashes of pixels that differ, naming their paths and the libraries of both places."""
    differing = [path for path, pixels in expected.items() if here.get(path) != pixels]
    if not differing:
        return
    then, now = dict(built.libraries) or {"Pillow": "13.0.0"}, libraries()
    telling = [name for name in now if name == "Pillow" or (name in then and then[name] != now[name])]
    shown = ", ".join(differing[:6]) + (f" and {len(differing) - 6} more" if len(differing) > 6 else "")
    raise EncoderError(
        f"pixels: on {platform.node()}, {len(differing)} of {len(expected)} test images come out otherwise than where the "
        f"encoder was built ({shown}), so its vectors would be of another space. It was built with {_listed(then, telling)}; "
        f"here are {_listed(now, telling)}. Install Pillow {then.get('Pillow')} here, as on all nodes, or build the encoder "
        "again with what is here and embed all images anew."
    )


def _hash(pixels: Pixels) -> str:
    """16 hex digits over shape and values."""
    return hashlib.sha256(f"{pixels.shape} ".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def libraries() -> dict[str, str]:
    """What takes part in making pixels, by name and version. transformers: its processor is what geometry is proven by."""
    found: dict[str, str | None] = {
        "Pillow": PIL.__version__,
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version_module("webp"),
        "libtiff": features.version_codec("libtiff"),
        "zlib": features.version_codec("zlib"),
    }
    for name in ("numpy", "transformers"):
        found[name] = metadata.version(name)
    return {name: version for name, version in found.items() if version}


@functools.cache
def known_pixels(name: str) -> Mapping[str, str]:
    """Path → hash of an arithmetic by name; nothing for one that this release does not know."""
    known: dict[str, dict[str, str]] = json.loads(KNOWN.read_text(encoding="utf-8"))
    return known.get(name, {})


def known_paths() -> dict[str, str]:
    """Every path that can be checked without an encoder → hash of what this process makes."""
    found = _decoded_paths() | _fast_paths()
    for number in FILTERS:
        found |= _squeezed_paths(number)
    return found


def _named_paths(preprocessing: Preprocessing) -> dict[str, str]:
    """Of those, the ones that take part in this preprocessing."""
    resized = {} if preprocessing.resize is None else _squeezed_paths(preprocessing.resample)
    return _decoding_paths(preprocessing) | resized


def _own_paths(preprocessing: Preprocessing) -> dict[str, str]:
    """Decoding, and an encoder's own geometry on images to which it does different things."""
    return _decoding_paths(preprocessing) | _resized_paths(preprocessing, "resize {}")


def _decoding_paths(preprocessing: Preprocessing) -> dict[str, str]:
    return _decoded_paths() | (_fast_paths() if preprocessing.decode == "fast" else {})


def _decoded_paths() -> dict[str, str]:
    files = sorted(file for file in IMAGES.iterdir() if file.suffix != KNOWN.suffix)
    return {f"decode {file.name}": _hash_decoded(file, AS_DECODED) for file in files}


def _fast_paths() -> dict[str, str]:
    found = {}
    for name, edges in FAST.items():
        for edge in edges:
            prepare = replace(AS_DECODED, resize=(edge, edge), resample=2, decode="fast")
            found[f"decode {name} fast to {edge} pixels"] = _hash_decoded(IMAGES / name, prepare)
    return found


def _hash_decoded(file: Path, prepare: Preprocessing) -> str:
    try:
        return _hash(decode_image(file.read_bytes(), prepare).pixels)
    except BadImage as bad:  # as a Pillow without WebP says
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
    """(width, height) of images to reduce, to enlarge, or one in each direction: Pillow 13 resizes their rows first or last."""
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
    """The same RGB image at every call, whatever numpy's generators become."""
    values = np.arange(_MODULUS, dtype=np.uint32) * np.uint32(2654435761)
    values = (values ^ (values >> np.uint32(15))) * np.uint32(2246822519)
    return Image.fromarray(np.resize((values >> np.uint32(16)).astype(np.uint8), (height, width, 3)))


def _listed(versions: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'unknown')}" for name in names)
