"""How many images shards hold, without reading the images: exactly where a listing or a footer says it, else estimated."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_embed.errors import ShardError, StorageError, StoreUnavailable
from lora_embed.schema import Layout, Shard, from_ipc
from lora_embed.shards.read import read_samples
from lora_embed.text import number_of
from lora_embed.vectors.health import seeded_sample

FILES, SECONDS = 64, 5.0  # tars and Parquet files that are opened to count their images, at most


@dataclass(frozen=True, kw_only=True)
class Images:
    """A number of images."""

    number: int
    estimated_from: int = 0  # files that were counted; 0 if all images were

    def describe(self) -> str:
        """`1,234 images`, or `about 1,200,000 images (3 files counted)`."""
        if not self.estimated_from:
            return number_of(self.number, "image")
        return f"about {number_of(self.number, 'image')} ({number_of(self.estimated_from, 'file')} counted)"


def count_images(shards: Sequence[Shard], layout: Layout, options: dict[str, Any]) -> Images:
    """Count the images of shards. Of many or large tars and Parquet files, some are counted, and the bytes tell the rest.

    A file that cannot be read is estimated like those that were not opened.
    """
    known, files = 0, []
    for shard in shards:
        if shard.kind == "images":
            known += len(shard.files)
        elif shard.rows is not None:
            known += from_ipc(shard.rows.packed).num_rows
        else:
            files.append(shard)
    by_name = {shard.name: shard for shard in files}
    until, number, size, opened = time.monotonic() + SECONDS, 0, 0.0, 0
    for name in seeded_sample(by_name, FILES):
        if opened and time.monotonic() > until:
            break
        of_file, share = _count(by_name[name], layout, options, until)
        number, size, opened = number + of_file, size + share * by_name[name].size, opened + (share > 0)
    total = sum(shard.size for shard in files)
    if size >= total:
        return Images(number=known + number)
    return Images(number=known + round(number * total / size) if size else known, estimated_from=max(1, opened))


def _count(shard: Shard, layout: Layout, options: dict[str, Any], until: float) -> tuple[int, float]:
    """The number of samples counted in a file, and the share of its bytes that hold them; 0 if that is not known."""
    number, end = 0, None
    try:
        for sample in read_samples(shard, layout, options, wanted=lambda _: False):
            number, end = number + 1, sample.end
            if time.monotonic() > until:
                return (number, end / max(shard.size, 1)) if end is not None else (0, 0.0)
    except (ShardError, StorageError, StoreUnavailable, OSError):
        return 0, 0.0
    return number, 1.0
