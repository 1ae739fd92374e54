"""What a run has done, counted by its driver while its heartbeat counts and reads as well: nothing lost, nothing torn."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import job_of, run_here, write_tars
from lora_embed.chain import cluster
from lora_embed.chain.items import Pass
from lora_embed.monitor import heartbeat
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.stages import Workers
from lora_embed.run import journal
from lora_embed.schema import ChunkHead
from lora_embed.store import retry
from lora_embed.store.store import Store
from samples import described, layout

CHUNKS = 4_000
CHUNK = ChunkHead(
    shard_id="a", shard_name="a", prefix="a", samples=3, reasons={"empty": 1}, retries=1, last=True, seconds={"read": 1.0}
)
FAILED = ChunkHead(shard_id="b", shard_name="b", prefix="b", error="gone", retries=1)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty")
def test_no_retry_is_lost_between_driver_and_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0)
    job = job_of(tmp_path, tmp_path / "recipe.yaml", write_tars(tmp_path / "shards", shards=1, images=1))
    shared = Pass.of(job, Store(job.table), described(), layout())
    topology = cluster.Topology(decode=None, embed={}, write={}, device={}, workers=Workers(actors=1))
    retry.take_retries()
    ended = threading.Event()

    def request() -> None:
        while not ended.is_set():  # other requests of this process are counted, so that the heartbeat waits for its turn
            with retry._counting:
                time.sleep(1e-4)

    others = threading.Thread(target=request)
    others.start()
    with journal.recorded(journal.begin(job), job, shared.store, shared.encoder.space_id, topology) as recording:
        recording.shared = shared
        for _ in range(CHUNKS):
            recording.effort.add(CHUNK)
        for _ in range(CHUNKS):
            retry._count_retry()
        ended.set()
    others.join()
    assert recording.effort.retries + retry.take_retries() == 2 * CHUNKS


@pytest.mark.usefixtures("hasty")
def test_what_others_read_is_of_one_moment() -> None:
    effort, ended = Effort(), threading.Event()

    def count() -> None:
        for number in range(CHUNKS):
            effort.begin(1)
            effort.add(CHUNK if number % 5 else FAILED)
        ended.set()

    driver = threading.Thread(target=count)
    driver.start()
    while not ended.is_set():
        now = effort.now()
        assert now.samples == now.vectors + now.rejects.total() == 3 * now.shards_done
        assert now.samples == now.timeline.readings()[-1].samples == 3 * now.seconds.get("read", 0.0)
        assert now.chunks == now.shards_done <= now.retries
        effort.add_retries(1)
    driver.join()
    assert effort.now().samples == 3 * CHUNKS * 4 // 5
