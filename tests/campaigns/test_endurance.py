"""What grows is found: by trends of what is counted, by processes that lost their parent, by objects that nothing leads to."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from census import MARK, count_copies, count_files, count_processes, orphans
from growth import find_trend
from jobs import ROOT, job_of, run_here, tiny_recipe, write_tars
from lora_embed.run.job import run_job
from lora_embed.store.store import Store
from month_world import DAY, Month
from soak import trends_of

HOURS = [minute / 60 for minute in range(15)]  # nights of a minute each, of a soak of 20 minutes, without its first quarter


def test_a_handle_lost_each_night_grows_and_what_only_varies_does_not() -> None:
    grows = []
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(0, 3, len(HOURS))
        leaking = find_trend("handles", HOURS, [100 + n + 2 * night for night, n in enumerate(noise)], limit=1.0)
        assert leaking.grows, "two a night, in noise of three"
        assert leaking.low < 120 < leaking.high
        grows.append(find_trend("handles", HOURS, list(100 + noise), limit=1.0).grows)
    assert sum(grows) <= 2
    assert not find_trend("objects", HOURS, [7.0] * len(HOURS), limit=1.0).grows
    assert not find_trend("runs", HOURS, [2.0 * night for night in range(len(HOURS))], limit=None).grows


def test_trends_leave_the_warm_up_out_and_judge_by_name() -> None:
    figures = [{"handles of resident": 50.0 + min(n, 6), "threads of resident": 3.0 * n} for n in range(21)]
    for n in range(10, 21):
        figures[n]["processes: other"] = (n - 7) // 3
    lines = [{"hours": n / 60, "figures": one} for n, one in enumerate(figures)]
    trends = {trend.name: trend for trend in trends_of(lines, minutes=20)}
    assert {name: trend.grows for name, trend in trends.items()} == {
        "handles of resident": False,
        "threads of resident": True,
        "processes: other": True,  # none before the tenth night counts as none
    }
    assert trends["threads of resident"].slope == pytest.approx(180)


@pytest.mark.parametrize(("a_night", "grows"), [(0.2, False), (0.6, True)])
def test_what_ray_keeps_of_each_night_is_no_growth_of_ours(a_night: float, grows: bool) -> None:
    lines = [{"hours": n / 60, "form": "resident", "figures": {"memory of resident, MB": 400 + a_night * n}} for n in range(60)]
    [memory] = trends_of(lines, minutes=60)
    assert (memory.grows, memory.slope) == (grows, pytest.approx(60 * a_night))


def test_a_process_that_lost_its_parent_is_counted(tmp_path: Path) -> None:
    mark = f"test-{os.getpid()}"
    orphan = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid)"
    environment = os.environ | {MARK: mark}
    ended = subprocess.run([sys.executable, "-c", orphan], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    try:
        assert count_processes(mark, {}) == {"processes: other": 1}
    finally:
        os.kill(int(ended.stdout), 9)


def test_files_and_copies_that_should_be_gone_are_counted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x" * 2**20)
    assert count_files({"cache": tmp_path}) == {"files: cache": 2, "MB of files: cache": 1.0}
    for name, days in (("old", 20), ("used", 2), ("new", 0)):
        (tmp_path / "fetched" / name).mkdir(parents=True)
        lock = tmp_path / "fetched" / f"{name}.lock"
        lock.touch()
        os.utime(lock, (time.time() - days * DAY, time.time() - days * DAY))
    assert count_copies(tmp_path) == {"orphan copies": 1}


def test_objects_that_nothing_leads_to_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=2, images=3)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, retain={"versions": 2, "grace_days": 0.01})
    run_job(job)
    month = Month(tmp_path, job, random.Random(0))
    store, space = Store(job.table), next((tmp_path / "table" / "encoders").iterdir()).name
    lost = [f"data/{space}/lost-race.parquet", "encoders/0ther/encoder.json", f"staging/{space}/l/aa-00000000.parquet", "odd"]
    for path in lost:
        store.create(path, b"{}")
    store.create("recipes/other.json", b'{"space_id": "0ther"}')

    def modified(age_s: float) -> dict[str, float]:
        return {entry.path: time.time() - (0 if entry.path == "CURRENT" else age_s) for entry in store.list_files()}

    assert orphans(month, modified(age_s=60)) == [], "they are in their grace period"
    assert set(orphans(month, modified(age_s=7200))) == {*lost, "recipes/other.json"}


@pytest.mark.long
def test_nothing_grows_in_twenty_minutes_of_nights(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "soak.py"), "--minutes", "20", "--out", str(tmp_path / "soak.jsonl")]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.long
def test_no_reader_fails_while_runs_publish(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "readers.py"), "--minutes", "1"]
    assert subprocess.run(command, check=False).returncode == 0
