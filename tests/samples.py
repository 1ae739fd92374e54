"""Tiny real data for tests: images, tars, Parquet files, and the shards and layouts to read them with."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_embed.images.preprocess import Preprocessing
from lora_embed.model.description import Description
from lora_embed.schema import Layout, Sample, Shard
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples

POISON = Path(__file__).parent / "poison"
PREPROCESSING = Preprocessing(resize=10, resample=3, crop=(8, 8), multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))


def noise(width: int = 12, height: int = 9, seed: int = 0) -> Image.Image:
    """An RGB image no two of which are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int = 0) -> bytes:
    return encoded(noise(seed=seed))


def tar_of(members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT, **options: Any) -> bytes:
    """A tar with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(columns: dict[str, Any], row_group_size: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def described(**changes: Any) -> Description:
    """An encoder that is nowhere."""
    known: dict[str, Any] = {"space_id": "0" * 12, "recipe_id": "1" * 12, "dimension": 4, "pooling": "mean", "tap": ""}
    return Description(**known | {"normalize": False, "prefix_tokens": 0, "preprocessing": PREPROCESSING} | changes)


def layout(**changes: Any) -> Layout:
    fields: dict[str, Any] = {
        "chunk_size": 4, "precision": "float32", "batch_size": 16, "vector_type": "float32", "carry": (),
        "max_pixels": 1_000_000, "image_column": None, "key_column": None, "limit": None,
    }  # fmt: skip
    return Layout(**fields | changes)


def shard_at(path: Path, data: bytes | None = None) -> Shard:
    """The one shard of a file, written first when data is given."""
    if data is not None:
        path.write_bytes(data)
    (shard,) = list_shards((str(path),), {})
    return shard


def tar_shard(folder: Path, members: list[tuple[str, bytes]], **options: Any) -> Shard:
    return shard_at(folder / "a.tar", tar_of(members, **options))


def touch_files(folder: Path, *names: str) -> None:
    """Files of one byte, all with the same time."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (1_700_000_000, 1_700_000_000))


def samples_of(shard: Shard, **changes: Any) -> list[Sample]:
    return list(read_samples(shard, layout(**changes), {}, lambda number: True))


def poisoned(monkeypatch: pytest.MonkeyPatch, **kinds: bytes | list[bytes]) -> None:
    """Make these images do harm (`segfault`, `memory` or `hang`), in every process that is started from now on."""
    images = [(kind, data) for kind, some in kinds.items() for data in (some if isinstance(some, list) else [some])]
    entries = [f"{hashlib.sha256(data).hexdigest()}:{kind}" for kind, data in images]
    monkeypatch.setenv("POISONED_IMAGES", ",".join(entries))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(POISON), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.syspath_prepend(POISON)  # a decoder's child gets the path of its parent


def all_of_them(number: int) -> bool:
    """Each sample is wanted. Here, where little is imported: a reader's child imports the module that it stands in."""
    return True
