"""Golden vectors: the vectors of a few generated images, stored with an encoder; every device must reproduce them first."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lora_embed.errors import EncoderError
from lora_embed.model.files import own_file, own_files

FOLDER = "golden"
VECTORS = "vectors.npy"
NAMES = ("grey.png", "large.jpg", "noise.png", "ramp.jpg", "shapes.jpg")  # from `make_images` and `make_large`
# The largest relative L2 difference of a row from the float32 vectors that counts as the same computation. Another
# instruction set changes float32 by about 1e-6; bfloat16 was measured at 7e-3 and float16 at 7.5e-4 on ViT-S.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def make_images() -> dict[str, bytes]:
    """File name → encoded image, sorted by name: gradients, noise and shapes of several sizes; the same in each call."""
    rng = np.random.default_rng(7)
    ramp = np.stack([*np.meshgrid(np.linspace(0, 255, 320), np.linspace(0, 255, 240)), np.full((240, 320), 90.0)], axis=-1)
    shapes = Image.new("RGB", (500, 375), (230, 220, 200))
    pen = ImageDraw.Draw(shapes)
    for _ in range(40):
        x, y, r = (int(value) for value in rng.integers([0, 0, 8], [500, 375, 80]))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    noise = Image.fromarray(rng.integers(0, 256, (131, 97, 3), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (12, 20), dtype=np.uint8)).resize((200, 260), Image.Resampling.BICUBIC)
    return {
        "grey.png": _encoded(grey, "PNG"),
        "noise.png": _encoded(noise, "PNG"),
        "ramp.jpg": _encoded(Image.fromarray(ramp.astype(np.uint8)), "JPEG"),
        "shapes.jpg": _encoded(shapes, "JPEG"),
    }


def make_large(edge: int) -> dict[str, bytes]:
    """A JPEG with details like a large photograph, for encoders that decode such images at a smaller size."""
    rng = np.random.default_rng(11)
    coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    return {"large.jpg": _encoded(coarse.resize((edge, edge), Image.Resampling.BICUBIC), "JPEG")}


def save(folder: Path, images: dict[str, bytes], vectors: NDArray[np.float32]) -> None:
    """Write images and their vectors, (images, d) in the order of the names, below an encoder's directory."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / FOLDER / name).write_bytes(data)
    np.save(folder / FOLDER / VECTORS, vectors, allow_pickle=False)


def load(folder: Path) -> tuple[dict[str, bytes], NDArray[np.float32]]:
    """The images and vectors of `save`, sorted by name. Raises EncoderError if they are missing or damaged."""
    path = own_file(folder, f"{FOLDER}/{VECTORS}")
    if path is None:
        raise EncoderError(f"{folder}: has no golden vectors, so it cannot be checked on this device. Build it again.")
    images = {file.name: file.read_bytes() for file in own_files(folder, tuple(f"{FOLDER}/{name}" for name in NAMES))}
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")  # opens no pickle, and refuses a shape larger than the file
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(images):
            raise ValueError(f"{vectors.dtype} of shape {vectors.shape} for {len(images)} images")
        return images, np.array(vectors)
    except (ValueError, EOFError, OSError, OverflowError, RecursionError, MemoryError) as error:
        raise EncoderError(f"{path}: is damaged ({error}). Build the encoder again.") from None


def check(vectors: NDArray[np.float32], expected: NDArray[np.float32], precision: str, device: str) -> float:
    """The largest relative L2 difference of a row. Raises EncoderError if it exceeds the precision's bound."""
    difference = relative_difference(vectors, expected) if vectors.shape == expected.shape else float("inf")
    if not difference <= BOUNDS[precision]:
        raise EncoderError(
            f"golden vectors: {device} in {precision} differs by {difference:.2e} (relative L2) from the vectors stored "
            f"with the encoder; at most {BOUNDS[precision]:.0e} is allowed. This device, or a library here, computes "
            "differently: install the versions of constraints.txt, or use another device."
        )
    return difference


def relative_difference(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest ‖vector − expected‖ / ‖expected‖ over the rows of two (n, d) arrays; ‖vector‖ where ‖expected‖ is 0."""
    distance = np.linalg.norm(vectors.astype(np.float64) - expected, axis=1)
    length = np.linalg.norm(expected.astype(np.float64), axis=1)
    return float(np.max(distance / np.where(length > 0, length, 1.0)))


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=92)
    return buffer.getvalue()
