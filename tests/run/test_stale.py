"""What a night costs when little is stale: bytes and requests, one shard of a thousand, planning for a hundred thousand."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, read_rows, run_here, tiny_recipe, write_tars
from lora_embed.config.models import JobConfig
from lora_embed.entries import Entry
from lora_embed.run import work
from lora_embed.run.job import run_job
from lora_embed.schema import Part, Shard
from lora_embed.store.local import create
from lora_embed.store.store import Store
from lora_embed.table import staging
from lora_embed.table.compact import SMALL_FILES, Reuse, Source, make_manifest, plan_compactions, plan_reuse
from lora_embed.table.lineage import forget
from lora_embed.table.manifest import FileEntry, Manifest, ShardCounts
from lora_embed.table.parts import part_path
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import commit_version
from samples import described, layout, png, tar_of
from traffic import Traffic, counted_traffic

SPACE = "5ace5ace5ace"
LAYOUT = layout()
FOOTER_BYTES = 2**16  # that pyarrow reads first, from the end of each file


def night(folder: Path, monkeypatch: pytest.MonkeyPatch, job: JobConfig) -> tuple[Traffic, int]:
    """One more version, and the bytes of the data files that it replaced."""
    before = {entry.path: entry.bytes for entry in open_table(job.table).manifest.files}
    with counted_traffic() as traffic:
        assert run_job(job, replaces=True).published
    now = open_table(job.table)
    verify_table(now)
    return traffic, sum(before[path] for path in before.keys() - {entry.path for entry in now.manifest.files})


def reads_of_data(traffic: Traffic) -> dict[str, int]:
    return {path: times for path, times in traffic.paths_read.items() if "/data/" in path}


def test_a_night_reads_each_data_file_once_however_many_shards_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 shards one is removed: the file that holds them is read once, and the new one once to be measured."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=80, images=2)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, reembed={"drift": 0}, max_removed=1.0)
    run_job(job, replaces=True)
    (source / "0040.tar").unlink()
    traffic, touched = night(tmp_path, monkeypatch, job)
    assert set(reads_of_data(traffic).values()) == {1}
    _, read, written = traffic.below(job.table, "data")
    assert touched <= read <= 3 * touched + 2 * FOOTER_BYTES
    assert written <= touched
    with counted_traffic() as traffic:
        forget(Store(job.table), ["0003.tar/000006"], "asked")
    assert max(reads_of_data(traffic).values()) <= 3, "to find the image in two versions, and to leave it out"
    assert len(read_rows(tmp_path / "table")) == 157


def test_small_files_are_read_once_each_when_they_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=1, images=2)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, reembed={"drift": 0})
    run_job(job, replaces=True)
    traffics = []
    for number in range(1, SMALL_FILES + 1):
        (source / f"{number:04d}.tar").write_bytes(tar_of([(f"{image}.png", png(100 * number + image)) for image in range(3)]))
        traffics.append(night(tmp_path, monkeypatch, job)[0])
    assert all(set(reads_of_data(traffic).values()) == {1} for traffic in traffics)
    assert len(reads_of_data(traffics[-1])) == SMALL_FILES + 1
    assert len(open_table(job.table).manifest.files) == 1


def test_the_drift_gate_reads_no_part_that_a_kill_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run died between its commit and clearing: its 20 parts are still there, and one image is asked for."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=20, images=2)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, reembed={"drift": 1})
    with monkeypatch.context() as patch:
        patch.setattr(staging, "clear_absorbed", lambda *_: None)
        run_job(job, replaces=True)
    left = [entry.path for entry in Store(job.table).list_files("staging") if entry.path.endswith(".parquet")]
    assert len(left) == 20
    (source / "0020.tar").write_bytes(tar_of([("new.png", png(10**6))]))
    with counted_traffic() as traffic:
        assert run_job(job, replaces=True).published
    read = {path for path in traffic.paths_read if "/staging/" in path and path.endswith(".parquet")}
    assert len(read) == 2, "the new shard's, and the one that was embedded again"
    gates = open_table(job.table).manifest.gates
    assert "drift" in gates


def test_parts_that_a_version_has_absorbed_are_removed_by_the_thousand(tmp_path: Path) -> None:
    """As many requests for a thousand shards as for one."""
    store = Store(str(tmp_path / "table"))
    parts = [Part(shard_id=f"{number:016x}", chunk=0, last=True) for number in range(1000)]
    for part in parts:
        store.create(part_path(SPACE, LAYOUT.layout_id, part), b"")
    records = tuple(ShardCounts(id=part.shard_id, name=part.shard_id, samples=1, vectors=1, rejects=0) for part in parts)
    entry = FileEntry(path="data/0", rows=1000, bytes=1, sha256="", shards=records)
    manifest = make_manifest(1, SPACE, 8, [(entry, None)], plan_reuse(None, set()), gates={}, pins=LAYOUT.pins, lineage={})
    with counted_traffic() as traffic:
        staging.clear_absorbed(store, manifest, LAYOUT)
    assert traffic.below(store.uri, "staging")[0] == 2, "a listing and a removal"
    assert store.list_files("staging") == []


def seconds_to_choose(count: int) -> float:
    """To choose what is embedded again to notice drift, where that is a single image."""
    names = [f"{number:08d}.tar" for number in range(count)]
    shards = [
        Shard(id=f"{n:016x}", name=name, prefix=name, kind="tar", root="/input", files=()) for n, name in enumerate(names)
    ]
    records = tuple(ShardCounts(id=s.id, name=s.name, samples=1, vectors=1, rejects=0) for s in shards)
    entry = FileEntry(path="data/0", rows=count, bytes=1, sha256="", shards=records)
    manifest = make_manifest(1, SPACE, 8, [(entry, None)], plan_reuse(None, set()), gates={}, pins=LAYOUT.pins, lineage={})
    started = time.monotonic()
    assert len(work.choose_unchanged(manifest, shards, 64)) == 64
    plan_reuse(manifest, {shard.id for shard in shards}, [f"{name}/x" for name in names[::8]])
    return time.monotonic() - started


def test_what_a_night_chooses_takes_time_in_proportion_to_the_shards() -> None:
    """Also with one image of eight to be forgotten. Sixteen times the shards took 256 times as long."""
    small, large = (min(seconds_to_choose(count) for _ in range(3)) for count in (1000, 16_000))
    assert large <= 48 * max(small, 0.005)


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

    before = sum(path.stat().st_size for path in (tmp_path / "table" / "data").rglob("*.parquet"))
    started = time.monotonic()
    with counted_traffic() as traffic:
        result = run_job(job, replaces=True)
    seconds = time.monotonic() - started
    shards_read = {path for path in traffic.paths_read if path.startswith(str(source))}
    _, read, published = traffic.below(job.table, "data", "rejects")
    _, _, written = traffic.below(job.table)
    print(f"\n1 of 1,000 shards changed: {seconds:.1f} s, {written:,} bytes written, {len(shards_read)} shards read")
    assert (result.embedded, result.version) == (3, 2)
    assert str(changed) in shards_read
    assert len(shards_read) == 1 + drift / 2
    assert published <= 1.01 * before
    assert read <= (3 if drift else 2) * before + 3 * FOOTER_BYTES, "the drift gate looks 64 images up"
    assert len(read_rows(tmp_path / "table")) == 2001


def seconds_to_find(job: Any, store: Store, shards: list[Shard]) -> float:
    started = time.monotonic()
    assert work.find_work(job, store, described(space_id=SPACE), LAYOUT, shards) == []
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
            id=f"{n:016x}",
            name=f"{n:08d}.tar",
            prefix=f"{n:08d}.tar",
            kind="tar",
            root="/input",
            files=(Entry("x", 1, "e"),),
        )
        for n in range(count)
    ]
    counts = [ShardCounts(id=s.id, name=s.name, samples=512, vectors=512, rejects=0) for s in shards]
    store = Store(str(folder))
    create(folder, folder / "table.json", b'{"format": 1}\n')
    parts = folder / "staging" / SPACE / LAYOUT.layout_id
    parts.mkdir(parents=True)
    for shard in shards[count // 2 :]:
        os.close(os.open(parts / f"{shard.id}-00000000-last.parquet", os.O_CREAT))
    half = counts[: count // 2]
    files = tuple(
        FileEntry(
            path=f"data/{SPACE}/{n:032x}.parquet", rows=170 * 512, bytes=2**27, sha256="0" * 64, shards=tuple(half[n : n + 170])
        )
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
