"""Encoded bytes of an image → uint8 RGB of the encoder's size, or BadImage with the reason of the reject."""

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import AvifImagePlugin, ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from lora_embed.errors import LoraEmbedError
from lora_embed.images import deep
from lora_embed.images.preprocess import Box, Joint, Pixels, Preprocessing
from lora_embed.images.recognise import is_targa, name_of
from lora_embed.text import in_one_line

if TYPE_CHECKING:
    from lora_embed.schema import Reason

# None of them runs a program, reads another file, or decodes in Python.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 100_000_000  # of an image, by default
MOST_SCANS = 24  # of an image of `max_pixels`, which take 4 s; a smaller image may have more
_SCAN = b"\xff\xda"  # a scan begins with these bytes; within its data, 0 follows each 255

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Turns that swap width and height, those that swap left and right, and those that swap top and bottom.
_SWAPS, _MIRRORS, _FLIPS = ({_TURNS[n] for n in numbers} for numbers in ((5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)))

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there is a process for each core
# Pillow's own limit only warns, and raises at twice its value; the limit here is checked as soon as the size is known.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):
    """An image that cannot be embedded; `reason` is one of `schema.Reason`."""

    def __init__(self, reason: "Reason", detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple["Reason", str]]:  # otherwise pickle would pass the detail alone
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Decoded:
    """Pixels (H, W, 3) for the model, or those of a `Joint`, and the size of the image, turned as EXIF says."""

    pixels: Pixels
    width: int
    height: int


Prepare = Preprocessing | Joint  # for one encoder, or for several
Decode = Callable[[bytes, Prepare, int], Decoded]  # `decode_image`, or the same in another process


def decode_image(data: bytes, preprocessing: Prepare, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode and prepare one image; of an animated image, the first frame. Raises BadImage."""
    if not data:
        raise BadImage("empty", "0 bytes")
    try:
        return _decode(data, preprocessing, max_pixels)
    except MemoryError:  # the same reason as where the machine kills the process
        raise BadImage("decoder_crashed", "the decoder ran out of memory") from None


def _decode(data: bytes, preprocessing: Prepare, max_pixels: int) -> Decoded:
    Image.MAX_IMAGE_PIXELS = max_pixels  # without it, `open` alone takes 4 GB for a GIF of 43 bytes
    image: Image.Image
    try:
        image = Image.open(io.BytesIO(data), formats=("TGA",) if is_targa(data) else FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("too_many_pixels", f"has more than twice the {max_pixels} pixels that max_pixels allows") from None
    except (LoraEmbedError, MemoryError):
        raise
    except Exception:  # noqa: BLE001  # Pillow's decoders have no list of the errors that they raise
        raise BadImage("not_an_image", name_of(data)) from None
    try:
        _check_area(image.width, image.height, max_pixels, "has")
        _check_passes(data, image, max_pixels)
        image, size, part = _load(image, preprocessing)
        for encoder_preprocessing in preprocessing.parts:
            for width, height in encoder_preprocessing.resized_sizes(*size):
                _check_area(width, height, max_pixels, "would be resized to")
                _check_area(width, image.height, max_pixels, "would be resized through")  # Pillow resizes the rows first
        return Decoded(preprocessing.apply(image, size, part), *size)
    except (LoraEmbedError, BadImage, MemoryError):
        raise
    except deep.NotPixels as error:
        raise BadImage("not_an_image", f"{error}. Save it with 8 or 16 bits") from None
    except Exception as error:  # noqa: BLE001
        raise BadImage("corrupt_image", f"{type(error).__name__}: {in_one_line(error, 120)}") from None


def _load(image: Image.Image, preprocessing: Prepare) -> tuple[Image.Image, tuple[int, int], Box | None]:
    """An opened image → RGB, its whole (width, height), and, where it was decoded smaller, the box that the image fills.

    For example, 2,051 pixels decoded at an eighth give 257 pixels, of which the image fills 256 3/8.
    """
    full_size, drafted = image.size, None
    if preprocessing.decode == "fast":
        drafted = image.draft(None, preprocessing.least_size(*full_size))  # None for formats other than JPEG
    rgb = to_rgb(image)
    if drafted is None or image.size == full_size:
        return rgb, rgb.size, None
    _, (_, _, width, height) = drafted
    turn = _turn_of(image)
    if turn in _SWAPS:
        full_size, width, height = full_size[::-1], height, width
    left = rgb.width - width if turn in _MIRRORS else 0
    top = rgb.height - height if turn in _FLIPS else 0
    return rgb, full_size, (left, top, left + width, top + height)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: turned as EXIF says, transparency on white as in the Hugging Face processors.

    Samples of 16 and 32 bits are scaled to 8 bits; Pillow's own conversion would clip them to white. Raises NotPixels.
    """
    loaded = deep.load(image)
    turn = _turn_of(image)
    image = loaded
    if turn is not None:  # not by ImageOps.exif_transpose, which also rewrites EXIF, fails on damaged EXIF, and always copies
        image = image.transpose(turn)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """How to turn a loaded image, by its EXIF orientation; None for not at all."""
    with contextlib.suppress(Exception):  # an image with damaged EXIF data is still embedded
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _check_area(width: int, height: int, most: int, verb: str) -> None:
    if width * height > most:
        raise BadImage("too_many_pixels", f"{verb} {width}×{height} pixels, max_pixels allows {most}")


def _check_passes(data: bytes, image: Image.Image, max_pixels: int) -> None:
    """Refuse images that cost more than their area: JPEGs of many scans, and TIFFs with tiles larger than the image.

    Ten scans are usual; 6,000 scans in 1 MB would take minutes. A tile is unpacked as a whole.
    """
    if isinstance(image, JpegImageFile) and (scans := data.count(_SCAN)) * image.width * image.height > MOST_SCANS * max_pixels:
        raise BadImage(
            "too_many_pixels",
            f"has {scans} scans of {image.width}×{image.height}, max_pixels allows {MOST_SCANS} times {max_pixels} in all",
        )
    if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2:
        width, height = (image.tag_v2.get(tag) for tag in (TILEWIDTH, TILELENGTH))
        if not isinstance(width, int) or not isinstance(height, int):
            raise BadImage("corrupt_image", "its tiles have no size")
        _check_area(width, height, max_pixels, "has tiles of")
