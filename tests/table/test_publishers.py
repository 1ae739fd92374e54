"""Many publishers at once on a real S3 server: no version is lost, and no reader sees half of one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_table_read import LAYOUT, SPACE, shard_of, stage

from lora_embed.store.store import Store
from lora_embed.table import versions
from lora_embed.table.compact import compact, cut_shard, make_manifest, plan_compactions, plan_reuse
from lora_embed.table.read import open_table
from lora_embed.table.staging import part_paths, verify_parts
from lora_embed.table.verify import verify_table
from s3 import S3Server

PUBLISHERS = 32
SAMPLES = 5


def add_shard(store: Store, number: int) -> int:
    """Publish one more shard beside all that are there, planning again from each winner; returns how often it took."""
    shard_id, name = f"{number:016x}", f"{number:04d}.tar"
    parts = stage(store, shard_id, name, SAMPLES)
    verified = verify_parts(store, SPACE, LAYOUT, parts)
    sources = cut_shard(shard_of(shard_id, name), verified, part_paths(SPACE, LAYOUT, parts), 8)
    attempts = 0
    while True:
        attempts += 1
        current = versions.read_manifest(store)
        reuse = plan_reuse(current, set(current.shards) if current else set())
        written = [compact(store, task) for task in plan_compactions([*reuse.sources, *sources], LAYOUT, SPACE, 2)]
        number = current.version + 1 if current else 1
        forgotten = current.forgotten if current else ()
        about = {"gates": {}, "pins": LAYOUT.pins, "lineage": {}}
        manifest = make_manifest(number, SPACE, 2, written, reuse, **about, forgotten=forgotten)
        if versions.commit_version(store, manifest):
            return attempts


@pytest.mark.slow
def test_publishers_at_once_make_gapless_versions_and_lose_no_change(server: S3Server) -> None:
    store = Store("s3://images/crowd", server.options()).claim("table.json", b'{"format": 1}\n')
    store.create(f"encoders/{SPACE}/encoder.json", b"{}")
    add_shard(store, 0)
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            opened = open_table(store.uri, storage_options=server.options())
            verify_table(opened)
            assert opened.count == SAMPLES * opened.version
            seen.append(opened.version)

    started = time.monotonic()
    with ThreadPoolExecutor(PUBLISHERS + 2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        attempts = list(pool.map(lambda number: add_shard(store, number), range(1, PUBLISHERS + 1)))
        done.set()
        for reader in readers:
            reader.result()
    print(f"\n{PUBLISHERS} publishers, {sum(attempts)} attempts, {len(seen)} reads, {time.monotonic() - started:.0f} s")
    assert versions.listed_versions(store) == list(range(1, PUBLISHERS + 2))
    last = open_table(store.uri, storage_options=server.options())
    assert {shard.name for shard in last.manifest.shards.values()} == {f"{n:04d}.tar" for n in range(PUBLISHERS + 1)}
    assert len(set(seen)) > 3
    verify_table(last)
