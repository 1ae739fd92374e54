"""What every peer is given, as a JSON file: the same shards, model and batch size, and where its vectors go."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """One peer's task: a Parquet table of `id` (shard's name/key) and `embedding` of all images in the shards."""

    shards: list[str]  # tars of JPEGs: paths, or keys `bucket/…` of the S3 store
    model: str  # directory with a model and its image processor
    out: str  # directory of the table, or a key
    progress: str  # file that gets a line for each batch of vectors
    batch_size: int
    cores: int
    store: dict[str, str] | None  # of S3: endpoint, key, secret; None for the local disk
    variant: str = ""

    def filesystem(self) -> Any:
        """pyarrow's file system that holds shards and table."""
        from pyarrow import fs

        if self.store is None:
            return fs.LocalFileSystem()
        place, keys = self.store["endpoint"], (self.store["key"], self.store["secret"])
        return fs.S3FileSystem(access_key=keys[0], secret_key=keys[1], endpoint_override=place, region="us-east-1")


def read_task(path: str) -> Task:
    return Task(**json.loads(Path(path).read_text()))


def image_id(shard: str, key: str) -> str:
    """As lora-embed names images: the shard's file name, then the key in it."""
    return f"{os.path.basename(shard.partition('?')[0])}/{key}"


def record(progress: str, images: int) -> None:
    """Note that so many more vectors are there now: what start-up and steady rate are taken from."""
    with open(progress, "a", encoding="ascii") as file:
        file.write(f"{time.time():.6f} {images}\n")
