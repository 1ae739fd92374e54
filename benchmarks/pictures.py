"""Mosaics of the demo's real images as JPEGs, of a photograph's size and detail; made on all cores and kept in the cache.

Run as a command, which loads no torch: `pictures.py WIDTH HEIGHT COUNT FOLDER` makes those that the folder lacks.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from lora_embed.demo import parts
from lora_embed.store.fetch import cache_root

TILE = 64  # pixels, a side of the demo's images
TILES = 480  # different ones


def fetch_jpegs(size: tuple[int, int], count: int) -> list[Path]:
    """Files of `count` different mosaics of (width, height) pixels, the same at every call."""
    folder = cache_root() / "pictures" / f"{size[0]}x{size[1]}"
    subprocess.run([sys.executable, __file__, str(size[0]), str(size[1]), str(count), str(folder)], check=True)
    return [folder / f"{number:05d}.jpg" for number in range(count)]


def make_missing(size: tuple[int, int], count: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing = [path for number in range(count) if not (path := folder / f"{number:05d}.jpg").exists()]
    if missing:
        _tiles()  # before the processes are forked
        with ProcessPoolExecutor() as pool:
            list(pool.map(make_jpeg, [size] * len(missing), missing, chunksize=8))


def make_jpeg(size: tuple[int, int], path: Path) -> None:
    """Quality 90; the file's number is the seed."""
    tiles, rng = _tiles(), np.random.default_rng([3, int(path.stem)])
    mosaic = Image.new("RGB", size)
    for top in range(0, size[1], TILE):
        for left in range(0, size[0], TILE):
            mosaic.paste(tiles[rng.integers(len(tiles))], (left, top))
    aside = path.with_suffix(f".{os.getpid()}")
    mosaic.save(aside, "JPEG", quality=90)
    aside.rename(path)


@cache
def _tiles() -> list[Image.Image]:
    images = parts.fetch_images(cache_root(), print)[:TILES]
    return [Image.open(image.path).convert("RGBA").convert("RGB") for image in images]


if __name__ == "__main__":
    width, height, wanted, where = sys.argv[1:]
    make_missing((int(width), int(height)), int(wanted), Path(where))
