"""What a large cluster would do: what saturates first and how long a job takes, from the measured cost of each stage.

Assumptions, none of them tested on more than one machine:
- Stages overlap: the tightest resource alone sets the rate inside a wave. Equal nodes, shards and images; no failures.
- A GPU takes 1/forward CPU seconds per image from its node for the thread that feeds it, as a core that is the device does.
- A decoder waits for each byte of its shard at `stream_bandwidth`; a writer waits `commit_s` for each part. A part is as
  large as its float32 vectors, and chunks of a shard are equal.
- `crossing` of the chunks are embedded on another node than they were decoded on: Ray looks for an actor on the chunk's own
  node first, and how often one is free was not measured. A node's network carries storage too, both ways at once.
- Ray Data fills at most half of the object store; each decoder has two chunks in it: one coming out, one waiting.
- Blocks go in waves (`pipeline.embed_items`), one decoder each; a wave starts its actors anew and ends with half a block's
  time idle.
- Planning is serial in the driver; verification and compaction run on all CPUs; compaction reads and writes all vectors.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data.block import BlockAccessor

from lora_embed import cluster, compact, decode, pipeline, plan, read, run, staging
from lora_embed.config import JobConfig
from lora_embed.manifest import FileEntry, ShardCounts
from lora_embed.model.description import read_description
from lora_embed.pipeline import BLOCK_BYTES, BLOCK_ITEMS, BLOCKS_IN_WAVE, BLOCKS_PER_READER, WAVE
from lora_embed.schema import Block, Layout, WorkItem
from lora_embed.storage import Store
from lora_embed.write import WriteParts
from workloads import Workload, build_model, write_shards

STORE_SHARE, CHUNKS_PER_DECODER = 0.5, 2
MANIFEST_MOST = 5 * 2**30  # bytes: the largest object that S3 takes in one PUT


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A cluster and its job; bytes, bytes/s, seconds and images."""

    nodes: int = 8
    gpus_per_node: int = 8  # 0: cores embed
    cpus_per_node: float = 96
    cpus_per_decode: float = 1.0
    forward: float = 2000.0  # images/s of a GPU, or of a core
    node_bandwidth: float = 3e9
    storage_bandwidth: float = 40e9  # of all nodes together
    stream_bandwidth: float = 80e6  # of one decoder that reads
    commit_s: float = 0.1
    object_store: float = 200e9  # of a node
    crossing: float = 0.5
    images: int = 100_000_000
    image_bytes: float = 100e3
    images_per_shard: int = 1000
    chunk_size: int = 512
    side: int = 224  # pixels
    dimension: int = 384


@dataclass(frozen=True, kw_only=True)
class Costs:
    """CPU seconds per image of a stage, and what a chunk, a shard and a wave cost.

    The defaults: `--calibrate` on 2026-11-25, 2 virtual cores of an AMD EPYC shared with others (load 9), twice, in the
    middle; decode was 3.3 and 3.4 ms, driver 0.7 and 1.3 ms, wave 23 and 56 s, of which the quieter is taken.
    """

    read_s: float = 1.5e-4
    decode_s: float = 3.3e-3  # 500×375 JPEGs
    transfer_s: float = 2.3e-4
    write_s: float = 2.5e-5
    driver_s: float = 1.0e-3  # CPU of the driver per chunk
    plan_s: float = 2.0e-5  # per shard, on a local disk
    verify_s: float = 3.6e-4  # per shard, on a local disk
    manifest_bytes: float = 135.0  # per shard
    wave_s: float = 23.0  # from its start to its first part


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A job at its bound."""

    rate: float  # images/s inside a wave
    allows: dict[str, float]  # images/s by resource, the tightest first
    seconds: dict[str, float]  # by phase
    store_bytes: float  # of a node's object store, wanted by all its decoders
    manifest_bytes: float
    blocks: int  # at a time

    @property
    def bound(self) -> str:
        """What takes the time: the tightest resource, unless it waits for waves to start."""
        return "starts of waves" if self.seconds["waves"] > self.seconds["embed"] else next(iter(self.allows))


ADD = {  # resource → what there is of it (a field of Setting, else its blocks at a time), and its unit
    "decode CPUs": ("cpus_per_node", "CPUs per node"),
    "decoders": ("cpus_per_node", "CPUs per node, or as many times fewer cpus_per_decode"),
    "GPUs": ("gpus_per_node", "GPUs per node"),
    "writers": ("gpus_per_node", "GPUs per node: each has a writer"),
    "storage": ("storage_bandwidth", "bytes/s of storage"),
    "node network": ("node_bandwidth", "bytes/s of each node"),
    "object store": ("object_store", "bytes of object store on each node"),
    "driver": ("chunk_size", "images per chunk, in shards as large; or several jobs"),
    "blocks": ("", "blocks at a time, of shards that are smaller and more"),
}


def predict(s: Setting, c: Costs) -> Prediction:
    """The tightest resource, and the time of a whole job."""
    cpus, devices = s.nodes * s.cpus_per_node, s.nodes * s.gpus_per_node
    chunk = s.images_per_shard / math.ceil(s.images_per_shard / s.chunk_size)  # images
    pixels, part = 3 * s.side**2, 4 * s.dimension  # bytes per image
    shards = math.ceil(s.images / s.images_per_shard)
    decoders = cpus / s.cpus_per_decode
    per_block = shards_per_block(shards, int(decoders), s.images_per_shard * s.image_bytes)
    blocks, wave = math.ceil(shards / per_block), max(WAVE, BLOCKS_IN_WAVE * int(decoders))
    feed_s = c.read_s + c.decode_s + (c.transfer_s if devices else 0.0)
    all_s = feed_s + c.write_s + 1 / s.forward
    holds_s = (feed_s if devices else all_s + s.commit_s / chunk) + s.image_bytes / s.stream_bandwidth  # of a decoder
    crossing = s.crossing * pixels if devices and s.nodes > 1 else 0.0
    wanted = CHUNKS_PER_DECODER * chunk * pixels * s.cpus_per_node / s.cpus_per_decode if devices else 0.0
    allows = {
        "decode CPUs": cpus / all_s,
        "decoders": decoders / holds_s,
        "storage": s.storage_bandwidth / (s.image_bytes + part),
        "node network": s.nodes * s.node_bandwidth / (max(s.image_bytes, part) + crossing),
        "driver": chunk / c.driver_s,
        "blocks": min(blocks, wave) / holds_s,
    }
    if devices:
        allows["GPUs"] = devices * s.forward
        allows["writers"] = devices * chunk / (s.commit_s + chunk * c.write_s)
        allows["object store"] = decoders * STORE_SHARE * s.object_store / wanted / holds_s
    rate = min(allows.values())
    moving_s = 2 * s.images * part / min(s.storage_bandwidth, s.nodes * s.node_bandwidth)
    seconds = {
        "plan": shards * c.plan_s,
        "embed": s.images / rate,
        "waves": math.ceil(blocks / wave) * (c.wave_s + per_block * s.images_per_shard * holds_s / 2),
        "publish": shards * c.verify_s / cpus + max(moving_s, s.images * c.write_s / cpus),
    }
    allows = dict(sorted(allows.items(), key=lambda item: item[1]))
    return Prediction(
        rate=rate,
        allows=allows,
        seconds=seconds,
        store_bytes=wanted,
        manifest_bytes=shards * c.manifest_bytes,
        blocks=min(blocks, wave),
    )


def shards_per_block(shards: int, readers: int, shard_bytes: float) -> int:
    """As `pipeline.plan_blocks` puts equal shards together."""
    return max(1, min(BLOCK_ITEMS, shards // (readers * BLOCKS_PER_READER), int(BLOCK_BYTES // shard_bytes)))


def describe(s: Setting, found: Prediction) -> str:
    """Each resource's utilisation at the bound, the time by phase, and what to add."""
    (first, now), (second, then) = itertools.islice(found.allows.items(), 2)
    lines = [f"{s.nodes:,} nodes, {s.images:,} images: {found.rate:,.0f} images/s inside a wave, bound by {found.bound}"]
    lines += [f"  {name:<13}{found.rate / most:>6.1%}  allows {most:>13,.0f} images/s" for name, most in found.allows.items()]
    lines += [
        f"  object store  {found.store_bytes / 1e9:,.1f} GB a node wanted of {STORE_SHARE * s.object_store / 1e9:,.0f} GB"
    ]
    lines += [f"  manifest     {found.manifest_bytes / MANIFEST_MOST:>6.1%}  {found.manifest_bytes / 1e6:,.0f} MB"]
    lines += ["  " + ", ".join(f"{phase} {seconds / 3600:,.3f} h" for phase, seconds in found.seconds.items())]
    amount = float(getattr(s, ADD[first][0], found.blocks))
    if found.bound != first:
        lines.append("  most of it is its start: fewer nodes do it nearly as fast")
    return "\n".join([*lines, f"  to add: {amount:,.4g} → {amount * then / now:,.4g} {ADD[first][1]}; then {second} bounds"])


def tabulate(s: Setting, c: Costs) -> str:
    """A line for each number of nodes, 1 to 256; devices busy and time in the starts of waves over the whole job."""
    lines = [f"{'nodes':>5}{'images/s':>14}{'hours':>10}{'devices busy':>14}{'in starts':>11}  bound by"]
    for nodes in (2**power for power in range(9)):
        found = predict(replace(s, nodes=nodes), c)
        whole_s, devices = sum(found.seconds.values()), nodes * (s.gpus_per_node or s.cpus_per_node)
        shares = f"{s.images / s.forward / devices / whole_s:>14.0%}{found.seconds['waves'] / whole_s:>11.0%}"
        lines.append(f"{nodes:>5}{found.rate:>14,.0f}{whole_s / 3600:>10.2f}{shares}  {found.bound}")
    return "\n".join(lines)


def calibrate(folder: Path, dimension: int, count: int = 128) -> Costs:
    """Measure all costs here, on 500×375 JPEGs in one shard, then in a shard each, with a tiny model and the local disk."""
    encoder, layout = build_model("tiny", folder), Layout(precision="float32", batch_size=1)
    description = read_description(encoder)
    photos = Workload(name="", about="", model="", shards=1, per_shard=count, chunk_size=0)
    write_shards(photos, folder / "one")
    write_shards(replace(photos, shards=count, per_shard=1), folder / "many")
    (large,) = plan.list_shards((str(folder / "one"),), {})
    decoding: Any = {"block": [Block(items=(WorkItem(shard=large),))]}, layout, description.preprocessing, {}
    row = next(decode.decode_items(*decoding))
    embedded = row | {"vectors": np.random.default_rng(0).standard_normal((1, count, dimension), np.float32)}
    write = WriteParts(Store(str(folder / "parts")), description.space_id, layout)
    read_s = _cpu_s(lambda: list(read.read_samples(large, layout, {}, lambda number: True)))
    decode_s = _cpu_s(lambda: list(decode.decode_items(*decoding))) - read_s
    write_s = _cpu_s(lambda: write(embedded))
    cluster.connect(num_cpus=2, num_gpus=1)
    transfer_s = _cpu_s(lambda: BlockAccessor.for_block(ray.get(ray.put(BlockAccessor.batch_to_block(row)))).to_numpy())

    small, store = plan.list_shards((str(folder / "many"),), {}), Store(str(folder / "table"))
    run.store_encoder(encoder, store)
    config = JobConfig(recipe=str(encoder), input=(str(folder / "many"),), table=store.uri)
    job, topology = pipeline.Job.of(config, store, description, layout), cluster.choose_topology(config.resources)
    marks = [(time.perf_counter(), 0.0)]
    for _ in pipeline.embed_items([WorkItem(shard=shard) for shard in small], job, topology):
        marks.append((time.perf_counter(), time.process_time()))
    plan_s = _cpu_s(lambda: plan.list_shards((str(folder / "many"),), {}))
    staged = staging.staged_parts(store, description.space_id, layout.layout_id).values()
    verify_s = _cpu_s(lambda: [staging.verify_parts(store, description.space_id, layout, parts) for parts in staged])
    counts = tuple(ShardCounts(id=shard.id, name=shard.name, samples=1000, vectors=1000, rejects=0) for shard in small)
    file = FileEntry(path="", rows=0, bytes=0, sha256="", shards=counts)
    manifest = compact.make_manifest(1, "", 0, [(file, None)], compact.plan_reuse(None, set()), gates={}, pins={}, lineage={})
    return Costs(
        read_s=read_s / count,
        decode_s=decode_s / count,
        transfer_s=transfer_s / count,
        write_s=write_s / count,
        driver_s=(marks[-1][1] - marks[1][1]) / (count - 1),
        plan_s=plan_s / count,
        verify_s=verify_s / count,
        manifest_bytes=len(manifest.to_json()) / count,
        wave_s=marks[1][0] - marks[0][0],
    )


def _cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process, which neighbours on its cores hardly change; the median of three."""
    times = [time.process_time()]
    for _ in range(3):
        work()
        times.append(time.process_time())
    return sorted(end - start for start, end in itertools.pairwise(times))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for field in fields(Setting):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--costs", type=Path, help="JSON of --calibrate, instead of the defaults")
    parser.add_argument("--calibrate", action="store_true", help="measure the costs here, print and use them")
    given = vars(parser.parse_args())
    path, measures = given.pop("costs"), given.pop("calibrate")
    setting, costs = Setting(**given), Costs(**json.loads(path.read_text())) if path else Costs()
    if measures:
        with tempfile.TemporaryDirectory() as folder:
            costs = calibrate(Path(folder), setting.dimension)
        print(json.dumps(asdict(costs), indent=1))
    print(describe(setting, predict(setting, costs)), tabulate(setting, costs), sep="\n\n")


if __name__ == "__main__":
    main()
