"""Whole jobs for tests: recipes and shards on disk, runs in this process or in one that can be killed, tables read back."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lora_embed.chain import cluster, pipeline
from lora_embed.chain.actors import EmbedShards
from lora_embed.chain.items import Pass, WorkItem
from lora_embed.config.models import JobConfig, load_job
from lora_embed.monitor.stages import Workers
from lora_embed.schema import ChunkHead
from models import save_adapter, save_base
from samples import png, tar_of

ROOT = Path(__file__).resolve().parents[1]
DECLARED_GPUS = """
import sys
from lora_embed.cli import main
from lora_embed.chain import cluster
cluster.connect(num_cpus=2, num_gpus={gpus})
sys.exit(main.embed_job(sys.argv[1:]))
"""


def write_recipe(folder: Path, base: Path, adapters: dict[Path, float], **options: Any) -> Path:
    specs = [{"path": str(path), "weight": weight} for path, weight in adapters.items()]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": str(base), "adapters": specs} | options))
    return path


def tiny_recipe(folder: Path, family: str = "vit") -> Path:
    """A tiny random model with two random adapters of 10 and 27 classes."""
    base = save_base(folder / "base", family)
    adapters = {save_adapter(folder / "ten", base, 10, seed=1): 0.5, save_adapter(folder / "more", base, 27, seed=2): 0.5}
    return write_recipe(folder, base, adapters)


def write_tars(folder: Path, shards: int, images: int, seed: int = 0) -> Path:
    """Tars of distinct tiny PNGs, with a label each."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for image in range(images):
            number = shard * images + image
            members += [(f"{number:06d}.png", png(seed + number)), (f"{number:06d}.json", b'{"label": %d}' % (number % 7))]
        (folder / f"{shard:04d}.tar").write_bytes(tar_of(members))
    return folder


def write_job(folder: Path, recipe: Path, source: Path | list[Path], **options: Any) -> Path:
    """A job file whose table is `folder/table` unless told otherwise."""
    inputs = [str(source)] if isinstance(source, Path) else [str(path) for path in source]
    settings = {"recipe": str(recipe), "input": inputs, "table": "table", "precision": "float32", "batch_size": 16}
    settings |= {"resources": {"actors": {"max": 1}}}  # an actor's start is most of a tiny run
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings | options))
    return path


def job_of(folder: Path, recipe: Path, source: Path | list[Path], **options: Any) -> JobConfig:
    return load_job(write_job(folder, recipe, source, **options))


def embed_here(items: list[WorkItem], shared: Pass, topology: cluster.Topology) -> Iterator[ChunkHead]:
    """The chain in this process: the actor without its cluster."""
    actor = EmbedShards(shared, "cpu", lambda: False)
    for block in pipeline.plan_blocks(items, 1):
        for row in actor({"block": np.array([block], dtype=object)}):
            yield ChunkHead.from_json(row["head"][0])


def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs run in this process, without a cluster, where Ray would add nothing but seconds."""
    topology = cluster.Topology(decode=None, embed={}, write={}, device={}, workers=Workers(actors=1))
    monkeypatch.setattr(pipeline, "embed_items", embed_here)
    monkeypatch.setattr(pipeline, "map_tasks", lambda task, shared, items, **_: [task(*shared, item) for item in items])
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "choose_topology", lambda resources: topology)
    monkeypatch.setattr(cluster, "count_nodes", lambda: 1)
    monkeypatch.setattr(cluster, "say_where_metrics_are", lambda: None)  # asks Ray, which a forked process waits for in vain


def start_job(
    job: Path, log: Path, *arguments: str, gpus: int = 0, through: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[bytes]:
    """`jobs/embed.py` in a session of its own, which can be killed; `gpus` are declared, not there.

    `through`: a command that becomes the one that is given to it, such as nsenter.
    """
    command = [sys.executable, str(ROOT / "jobs" / "embed.py")]
    if gpus:
        command = [sys.executable, "-c", DECLARED_GPUS.format(gpus=gpus)]
    command = [*through, *command, "--config", str(job), "--json", *arguments]
    with log.open("wb") as file:
        variables = os.environ | environment
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=variables)


def kill_all(driver: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the driver and every process that it started."""
    process = psutil.Process(driver.pid)
    process.suspend()  # else it may come to its end while its children are being listed
    started = process.children(recursive=True)
    for one in [process, *started]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(started, timeout=20)
    driver.wait(20)  # by its own means, else it could not say how it ended


def read_rows(table: Path) -> pa.Table:
    """The current version by plain pyarrow, as a reader in any language would, sorted by id."""
    version = int((table / "CURRENT").read_text())
    manifest = json.loads((table / f"versions/{version:08d}.json").read_text())
    rows = pa.concat_tables([pq.read_table(table / entry["path"]) for entry in manifest["files"]])
    return rows.sort_by("id")


def read_rejects(table: Path) -> dict[str, str]:
    """Reasons by id."""
    manifest = json.loads(max((table / "versions").iterdir()).read_text())
    rows = [row for entry in manifest["rejects"] for row in pq.read_table(table / entry["path"]).to_pylist()]
    return {row["id"]: row["reason"] for row in rows}


def vectors_by_id(rows: pa.Table) -> dict[str, bytes]:
    """Exact bits of each vector."""
    return {row["id"]: np.array(row["embedding"], np.float32).tobytes() for row in rows.select(["id", "embedding"]).to_pylist()}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and mtime of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
