"""What a night costs when little is stale: one shard of a thousand, and planning for a hundred thousand."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, read_rows, run_here, tiny_recipe, write_tars
from lora_embed import work
from lora_embed.compact import Reuse, Source, make_manifest, plan_compactions, plan_reuse
from lora_embed.disk import create
from lora_embed.manifest import FileEntry, Manifest, ShardCounts
from lora_embed.model.description import Description
from lora_embed.model.preprocess import Preprocessing
from lora_embed.run import run_job
from lora_embed.schema import Shard
from lora_embed.storage import Entry, Store
from lora_embed.versions import commit_version
from samples import layout, png, tar_of

SPACE = "5ace5ace5ace"
LAYOUT = layout()


class Counter:
    """Reads and writes of stores, by root and path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[str] = []
        self.written: dict[str, int] = {}
        for name in ("open", "read"):
            monkeypatch.setattr(Store, name, self._noting_reads(getattr(Store, name)))
        for name in ("create", "replace"):
            monkeypatch.setattr(Store, name, self._noting_writes(getattr(Store, name)))

    def _noting_reads(self, right: Any) -> Any:
        def read(store: Store, path: str) -> Any:
            self.read.append(f"{store.uri}/{path}")
            return right(store, path)

        return read

    def _noting_writes(self, right: Any) -> Any:
        def write(store: Store, path: str, data: bytes) -> Any:
            self.written[path] = self.written.get(path, 0) + len(data)
            return right(store, path, data)

        return write


@pytest.mark.long
@pytest.mark.parametrize("drift", [0, 64])
def test_one_changed_shard_of_a_thousand_is_all_that_is_read_and_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: int
) -> None:
    """Beside it, 64 unchanged images that show whether vectors drift: 32 shards of two."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=1000, images=2)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, reembed={"drift": drift})
    assert run_job(job, replaces=True).embedded == 2000
    changed = source / "0500.tar"
    changed.write_bytes(tar_of([(f"{number}.png", png(10**6 + number)) for number in range(3)]))

    counter = Counter(monkeypatch)
    started = time.monotonic()
    result = run_job(job, replaces=True)
    seconds = time.monotonic() - started
    shards_read = {path for path in counter.read if path.startswith(str(source))}
    published = {path: size for path, size in counter.written.items() if path.startswith(("data/", "rejects/"))}
    touched = sum(path.stat().st_size for path in (tmp_path / "table" / "data").rglob("*.parquet"))
    written = sum(counter.written.values())
    print(f"\n1 of 1,000 shards changed: {seconds:.1f} s, {written:,} bytes written, {len(shards_read)} shards read")
    assert (result.embedded, result.version) == (3, 2)
    assert str(changed) in shards_read
    assert len(shards_read) == 1 + drift / 2
    assert sum(published.values()) <= touched
    assert len(read_rows(tmp_path / "table")) == 2001


def described() -> Description:
    geometry = Preprocessing(resize=8, resample=3, crop=None, multiply=(1.0,) * 3, add=(0.0,) * 3)
    return Description(
        space_id=SPACE, recipe_id="0" * 12, dimension=384, pooling="mean", normalize=False, tap="", prefix_tokens=1,
        preprocessing=geometry,
    )  # fmt: skip


def seconds_to_find(job: Any, store: Store, shards: list[Shard]) -> float:
    started = time.monotonic()
    assert work.find_work(job, store, described(), LAYOUT, shards) == []
    return time.monotonic() - started


def seconds_to_plan(folder: Path, shards: list[Shard], staged: list[ShardCounts]) -> float:
    started = time.monotonic()
    current = Manifest.from_json((folder / "versions" / "00000001.json").read_bytes(), "")
    kept = plan_reuse(current, {shard.id for shard in shards})
    sources = [Source(shards=(shard,), parts=("p",)) for shard in staged]
    assert len(plan_compactions([*kept.sources, *sources], LAYOUT, SPACE, 384)) == -(-len(sources) // 171)
    return time.monotonic() - started


def planned(folder: Path, count: int) -> dict[str, float]:
    """Seconds and bytes of a night's plan: half of the shards published, half staged, none stale."""
    shards = [
        Shard(
            id=f"{n:016x}", name=f"{n:08d}.tar", prefix=f"{n:08d}.tar", kind="tar", root="/input", files=(Entry("x", 1, "e"),)
        )
        for n in range(count)
    ]
    counts = [ShardCounts(id=s.id, name=s.name, samples=512, vectors=512, rejects=0) for s in shards]
    store = Store(str(folder))
    create(folder, folder / "table.json", b'{"format": 1}\n')
    staging = folder / "staging" / SPACE / LAYOUT.layout_id
    staging.mkdir(parents=True)
    for shard in shards[count // 2 :]:
        os.close(os.open(staging / f"{shard.id}-00000000-last.parquet", os.O_CREAT))
    half = counts[: count // 2]
    files = tuple(
        FileEntry(path=f"data/{n}", rows=1, bytes=2**27, sha256="0" * 64, shards=tuple(half[n : n + 170]))
        for n in range(0, len(half), 170)
    )
    reuse = Reuse(files=files, rejects=(), sources=())
    manifest = make_manifest(1, SPACE, 384, [], reuse, gates={}, pins=LAYOUT.pins, lineage={})
    assert commit_version(store, manifest)
    job: Any = type("Job", (), {"limit": None, "input_storage_options": {}})
    finding = min(seconds_to_find(job, store, shards) for _ in range(3))
    # The least: collecting garbage takes longer than planning, and falls into one or another.
    planning = min(seconds_to_plan(folder, shards, counts[count // 2 :]) for _ in range(3))
    return {"find": finding, "plan": planning, "bytes": len(manifest.to_json())}


@pytest.mark.long
def test_planning_grows_no_faster_than_the_table(tmp_path: Path) -> None:
    sizes = (100, 10_000, 100_000)
    found = {count: planned(tmp_path / str(count), count) for count in sizes}
    for count, costs in found.items():
        seconds = f"finding work {costs['find']:.2f} s, plan {costs['plan']:.2f} s"
        print(f"\n{count:,} shards: {seconds}, manifest {costs['bytes']:,} bytes")
    for what in ("find", "plan", "bytes"):
        assert found[100_000][what] <= 10 * 2.5 * max(found[10_000][what], 0.02)  # what is in no cache any more costs double
