"""Small published tables for tests, made by the real parts, compaction and manifests, without a cluster."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_embed.config.models import Retain
from lora_embed.schema import ChunkHead, Part, Shard, sample_schema
from lora_embed.store.store import Store
from lora_embed.table.compact import Source, compact, make_manifest, plan_compactions, plan_reuse
from lora_embed.table.manifest import ShardCounts
from lora_embed.table.parts import make_part, write_part
from lora_embed.table.read import Table, open_table
from lora_embed.table.retention import DAY_S, Needs, collect
from lora_embed.table.staging import part_paths
from lora_embed.table.versions import commit_version, read_manifest
from samples import layout

SPACE = "5ace5ace5ace"
CARRY = (("label", "int64"),)
Rows = tuple[list[str], NDArray[np.float32]]  # keys (n), vectors (n, d)


def publish_vectors(
    folder: Path,
    shards: dict[str, Rows],
    *,
    space_id: str = SPACE,
    vector_type: str = "float32",
    shards_per_file: int = 1,
    inputs: tuple[str, ...] = (),
    listed: tuple[Shard, ...] = (),
) -> Table:
    """The next version of a table: these shards by name, each row with a `label`; `listed` are the shards they come from."""
    store = Store(str(folder))
    how = layout(chunk_size=1_000_000, vector_type=vector_type, carry=CARRY)
    current = read_manifest(store)
    known = {shard.name: shard for shard in listed}
    sources = []
    for number, (name, (keys, vectors)) in enumerate(shards.items()):
        shard_id = known[name].id if name in known else f"{number:016x}"
        prefix = known[name].prefix if name in known else name
        rows = [{"key": key, "label": row} for row, key in enumerate(keys)]
        head = ChunkHead(shard_id=shard_id, shard_name=name, prefix=prefix, last=True, good=len(keys))
        batch = pa.RecordBatch.from_pylist(rows, schema=sample_schema(CARRY))
        write_part(store, space_id, how, head, make_part(head, batch, vectors, how))
        counts = ShardCounts(id=shard_id, name=name, samples=len(keys), vectors=len(keys), rejects=0)
        part = Part(shard_id=shard_id, chunk=0, last=True)
        sources.append(Source(shards=(counts,), parts=part_paths(space_id, how, [part])))
    dimension = next(iter(shards.values()))[1].shape[1]
    groups = [sources[start : start + shards_per_file] for start in range(0, len(sources), shards_per_file)]
    tasks = [task for group in groups for task in plan_compactions(group, how, space_id, dimension)]
    about: dict[str, Any] = {"gates": {}, "pins": how.pins, "lineage": {"input": list(inputs), "layout": asdict(how)}}
    version = current.version + 1 if current else 1
    written = [compact(store, task) for task in tasks]
    assert commit_version(store, make_manifest(version, space_id, dimension, written, plan_reuse(None, set()), **about))
    return open_table(str(folder))


def spread(vectors: NDArray[np.float32], shards: int) -> dict[str, Rows]:
    """Vectors (n, d) dealt to this many shards of about equal size, keys being their numbers."""
    parts = np.array_split(np.arange(len(vectors)), shards)
    return {f"{shard:04d}.tar": ([f"{n:06d}" for n in part], vectors[part]) for shard, part in enumerate(parts)}


def noise_vectors(count: int, dimension: int = 16, seed: int = 0) -> NDArray[np.float32]:
    """Gaussian vectors (count, dimension) of lengths that differ."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dimension)) * rng.uniform(0.5, 20, (count, 1))).astype(np.float32)


def retire(store: Store, keep: int, grace_s: float, wanted: frozenset[str] = frozenset()) -> int:
    """Retention as a run enforces it whose input holds these shards; how many objects were removed."""
    return collect(store, Retain.model_construct(versions=keep, grace_days=grace_s / DAY_S), Needs(shards=wanted)).objects
