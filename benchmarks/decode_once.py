"""Eight encoders on the same photographs: what one pass costs, beside one decoding and eight forwards, and eight passes.

One process, one thread, no Ray: the actor of `lora-embed evaluate` itself. Each figure is the shortest of three, in turns.
Prints JSON; seconds.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_embed.chain.actors import EmbedShards, VectorChunk
from lora_embed.chain.chunks import decode_blocks
from lora_embed.chain.items import Block, EncoderSource, Pass, WorkItem
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.demo import parts
from lora_embed.demo.tour import ADAPTERS
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.monitor.progress import say
from lora_embed.schema import Layout
from lora_embed.shards.listing import list_shards
from lora_embed.store.fetch import cache_root
from lora_embed.store.store import Store
from pictures import fetch_jpegs

SIZE = (1024, 768)
REPEATS = 3


def build_encoders(count: int, folder: Path) -> list[Path]:
    """Merges of the demo's adapters at different weights, all with the same preprocessing."""
    base = parts.fetch_base_model(cache_root(), say)
    folders = []
    for number in range(count):
        weights = {"category10": (number + 1) / (count + 1), "group27": 1 - (number + 1) / (count + 1)}
        adapters = tuple(AdapterSpec(path=str(ADAPTERS / name), weight=weight) for name, weight in weights.items())
        folders.append(folder / f"encoder-{number}")
        build_encoder(gather(Recipe(base_model=str(base), adapters=adapters, image_size=56)), folders[-1], lambda line: None)
    return folders


def write_shard(images: int, folder: Path) -> dict[str, Any]:
    """One tar of photographs, as a block of work."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for path in fetch_jpegs(SIZE, images):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    (shard,) = list_shards((str(folder / "a.tar"),), {})
    return {"block": np.array([Block(items=(WorkItem(shard=shard),))], dtype=object)}


def shortest(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each, the shortest of a few, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - started)
    return {name: min(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", type=int, default=8)
    parser.add_argument("--images", type=int, default=192)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = build_encoders(arguments.encoders, Path(scratch))
        block = write_shard(arguments.images, Path(scratch))
        sources = tuple(EncoderSource(uri=str(folder), description=read_description(folder)) for folder in folders)
        layout = Layout(precision="float32", batch_size=16, chunk_size=64)
        each = Pass(encoders=sources, store=Store(scratch), input_options={}, layout=layout)
        together = EmbedShards(each, "cpu", lambda: False)
        alone = [EmbedShards(replace(each, encoders=(source,)), "cpu", lambda: False) for source in sources]
        encoders = [load_encoder(folder) for folder in folders]
        decoding = (layout, each.prepare, {}, lambda: False)
        rows = list(decode_blocks(block, *decoding))
        pixels = [np.asarray(row["pixels"][0])[: json.loads(row["head"][0])["good"]] for row in rows]
        works: dict[str, Callable[[], Any]] = {
            "decode": lambda: list(decode_blocks(block, *decoding)),
            "forwards": lambda: [encoder.embed_pixels(some) for encoder in encoders for some in pixels],
            "one pass": lambda: list(together(block)),
            "passes": lambda: [list(one(block)) for one in alone],
        }
        seconds = shortest(works)
        chunks = [VectorChunk.from_row({name: values[0] for name, values in row.items()}) for row in together(block)]
    parts_s = seconds["decode"] + seconds["forwards"]
    found = {"encoders": len(sources), "images": arguments.images, "decoded": sum(chunk.head.decoded for chunk in chunks)}
    found |= {name: round(value, 3) for name, value in seconds.items()}
    found |= {"one pass / (decode + forwards)": round(seconds["one pass"] / parts_s, 3)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
