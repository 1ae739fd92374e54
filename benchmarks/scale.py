"""What a job of many shards costs beside embedding: finding work, resuming, verifying and publishing; prints JSON.

Shards are synthetic, their parts real: one row each, staged as a run stages them, on a local disk. Each size runs in a
process of its own, so that its peak memory is that of the driver at that size. Workers are a local Ray cluster's.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from lora_embed.chain import cluster, pipeline
from lora_embed.chain.items import Pass
from lora_embed.config.models import JobConfig
from lora_embed.entries import Entry
from lora_embed.images.preprocess import Preprocessing
from lora_embed.model.description import Description
from lora_embed.run import publish, work
from lora_embed.schema import ChunkHead, Layout, Shard, sample_schema
from lora_embed.shards.listing import Listing
from lora_embed.store.local import create
from lora_embed.store.store import Store
from lora_embed.table import staging, versions
from lora_embed.table.parquet import read_rows
from lora_embed.table.parts import make_part, part_path, to_parquet, write_part
from lora_embed.table.read import Table, open_table

SPACE, DIMENSION = "5ca1e5ca1e00", 384
LAYOUT = Layout(precision="float32", batch_size=16)
ENCODER = Description(
    space_id=SPACE,
    recipe_id="0" * 12,
    dimension=DIMENSION,
    pooling="mean",
    normalize=False,
    tap="",
    prefix_tokens=1,
    preprocessing=Preprocessing(resize=8, resample=3, crop=(8, 8), multiply=(1.0,) * 3, add=(0.0,) * 3),
)
R = TypeVar("R")


def shard_of(number: int) -> Shard:
    """The listing's entry of a tar that is not there."""
    name = f"{number:08d}.tar"
    entry = Entry(path=name, size=100_000, etag=f"{number:x}")
    return Shard(id=f"{number:016x}", name=name, prefix=name, kind="tar", root="/input", files=(entry,))


def stage(folder: str, numbers: range) -> None:
    """Parts of these shards, one row each, committed as `WriteParts` commits them, but that nothing waits for the disk."""
    os.fsync = lambda file: None  # of this process, which does nothing else: what is staged need not survive a power cut
    store, rng = Store(folder), np.random.default_rng(numbers.start)
    row = {"key": "image", "width": 8, "height": 8, "reason": None, "detail": None}
    for number in numbers:
        shard = shard_of(number)
        head = ChunkHead(shard_id=shard.id, shard_name=shard.name, prefix=shard.prefix, last=True, good=1)
        batch = pa.RecordBatch.from_pylist([row | {"sha256": rng.bytes(32)}], schema=sample_schema(()))
        vector = rng.standard_normal((1, DIMENSION)).astype(np.float32)
        write_part(store, SPACE, LAYOUT, head, make_part(head, batch, vector, LAYOUT))


def stage_all(folder: Path, count: int) -> None:
    """All parts but one in a hundred, which a resumed run has yet to find."""
    create(folder, folder / "read.json", b"{}")
    (folder / part_path(SPACE, LAYOUT.layout_id)).mkdir(parents=True)
    each = -(-count // 64)
    pieces = [(str(folder), range(start, min(start + each, count))) for start in range(0, count, each)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(stage, pieces)


def timed(found: dict[str, float], what: str, does: Callable[[], R]) -> R:
    """Add the seconds that it takes to `found`."""
    started = time.perf_counter()
    result = does()
    found[what] = round(time.perf_counter() - started, 3)
    return result


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Seconds of each step for a table whose `count` shards are all staged, and the driver's peak memory."""
    found: dict[str, float] = {}
    store = Store(str(folder))
    shards = [shard_of(number) for number in range(count)]
    job = JobConfig(recipe="none", input=("/input",), table=str(folder), precision="float32", batch_size=16)
    shared = Pass.of(job, store, ENCODER, LAYOUT)
    cluster.connect()
    before_mb = peak_mb()
    missing = timed(found, "resume: find work", lambda: work.find_work(job, store, ENCODER, LAYOUT, [*shards, shard_of(count)]))
    assert [item.shard.id for item in missing] == [shard_of(count).id]
    parts = list(staging.staged_parts(store, SPACE, LAYOUT.layout_id).values())
    where = (store, SPACE, LAYOUT)
    each_has = publish.SHARDS_PER_TASK
    timed(found, "verify parts", lambda: pipeline.map_tasks(staging.verify_parts, where, parts, each_has=each_has))
    manifest, _ = timed(found, "publish", lambda: publish.publish(job, shared, Listing(shards=shards)))
    assert manifest.counts["vectors"] == count
    timed(found, "open", lambda: open_table(str(folder)))
    again = timed(found, "nothing stale", lambda: work.find_work(job, store, ENCODER, LAYOUT, shards))
    assert again == []
    current = versions.read_manifest(store)
    assert current is not None
    return {
        "shards": count,
        "seconds": found,
        "ms_a_shard": {what: round(1000 * seconds / count, 4) for what, seconds in found.items()},
        "driver_peak_mb": peak_mb(),
        "driver_before_mb": before_mb,
        "manifest_bytes": len(current.to_json()),
        "part_bytes": len(to_parquet(read_rows(store, current.files[0].path, Table(store, current).schema).slice(0, 1))),
    }


def peak_mb() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # this process is the driver of one size
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.shards[0])))
        return
    results = []
    for count in arguments.shards:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "table"
            folder.mkdir()
            stage_all(folder, count)
            command = [sys.executable, __file__, "--shards", str(count), "--measure", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), file=sys.stderr)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
