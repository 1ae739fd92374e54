"""One job of very many shards: time and driver memory for each; `make test-long` prints the figures."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from jobs import job_of, tiny_recipe, write_tars
from lora_embed.chain import cluster
from lora_embed.run.job import run_job
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table


class DriverMemory:
    """The most resident memory of this process while the block runs, in bytes above what it had before."""

    def __enter__(self) -> "DriverMemory":
        self._before = self.most = psutil.Process().memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self.most - self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.most = max(self.most, psutil.Process().memory_info().rss)


@pytest.mark.long
def test_ten_thousand_shards_are_one_job(tmp_path: Path) -> None:
    """Each shard is a real tar with one real image; what a shard costs must not grow with their number."""
    recipe = tiny_recipe(tmp_path)
    cluster.connect()
    per_shard, memory = {}, {}
    for shards in (100, 1_000, 10_000):  # the first warms up
        folder = tmp_path / str(shards)
        source = write_tars(folder / "shards", shards=shards, images=1)
        job = job_of(folder, recipe, source, resources={})
        started = time.monotonic()
        with DriverMemory() as driver:
            result = run_job(job)
        seconds = time.monotonic() - started
        assert result.counts == {"shards": shards, "samples": shards, "vectors": shards, "rejects": 0}
        verify_table(open_table(str(folder / "table")))
        per_shard[shards], memory[shards] = seconds * 1e3 / shards, driver.most / 1e6
        print(
            f"\n{shards:,} shards on {os.cpu_count()} CPUs: {seconds:.1f} s, {per_shard[shards]:.1f} ms a shard; driver "
            f"{memory[shards]:.0f} MB, {driver.grown / shards / 1e3:.1f} kB a shard"
        )
    assert per_shard[10_000] < 1.5 * per_shard[1_000]
    assert memory[10_000] < memory[1_000] + 100
