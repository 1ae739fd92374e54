"""What a table tells of its runs: one that goes on elsewhere, one that was killed, and how the last ones ended."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import ROOT, job_of, kill_all, run_here, tiny_recipe, write_job, write_tars
from lora_embed.cli.main import run_command
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.monitor import heartbeat, runs
from lora_embed.monitor.runs import Run, prune_runs, read_runs
from lora_embed.run.job import run_job
from lora_embed.store.store import Store
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table
from s3 import Proxy, Request, S3Server
from samples import tar_of

BEATS_OFTEN = """
import sys
from lora_embed.cli import main
from lora_embed.monitor import ending
from lora_embed.monitor import heartbeat
heartbeat.EVERY_S = 0.3
ending.end_process(main.embed_job(sys.argv[1:]))
"""
COMMAND = "import sys; from lora_embed.cli.main import main; main()"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Two shards of eight images, and a text that is none."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=2, images=8)
    (source / "0002.tar").write_bytes(tar_of([("text.png", b"plain text")]))
    return job_of(tmp_path, tiny_recipe(tmp_path), source, max_rejects=0.1)


def runs_of(job: JobConfig) -> list[Run]:
    return read_runs(Store(job.table))


def wait_for(found: Callable[[], Any], limit_s: float = 240) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value


def test_how_runs_ended(job: JobConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GateFailed):
        run_job(job.model_copy(update={"max_rejects": 0.0}))
    run_job(job, publishes=False)
    run_job(job)
    run_job(job)
    quiet, published, kept, failed = runs_of(job)
    assert [run.status for run in (failed, kept, published, quiet)] == ["failed", "not published", "published", "current"]
    assert (failed.state.embedded, failed.state.rejected, failed.state.shards_done, failed.state.shards) == (17, 1, 3, 3)
    assert failed.state.doing == "publishing"
    assert "1 of 17 new samples cannot be embedded" in failed.describe()
    assert (kept.state.embedded, published.state.version, quiet.state.version) == (0, 1, 1)
    assert re.fullmatch(r"published version 1 in 0:\d\d: 0 embedded, 0 rejects", published.describe())
    assert re.fullmatch(r"version 1 stayed current, in 0:\d\d: 0 embedded", quiet.describe())
    capsys.readouterr()
    assert run_command(["status", job.table]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("run ")][-1] == f"run       {failed.state.run_id} {failed.describe()}"
    verify_table(open_table(job.table))
    assert run_command(["status", job.table, "--metrics"]) == 0
    families = {family.name: family for family in text_string_to_metric_families(capsys.readouterr().out)}
    gauges = {name: [(sample.labels, sample.value) for sample in family.samples] for name, family in families.items()}
    assert gauges["lora_embed_table_version"] == [({"table": job.table}, 1)]
    assert gauges["lora_embed_last_run"] == [({"table": job.table, "status": "current"}, 1)]
    [(_, success)] = gauges["lora_embed_last_success_timestamp_seconds"]
    assert 0 <= time.time() - success < 60


def test_a_run_goes_on_where_its_state_cannot_be_written(job: JobConfig, capfd: pytest.CaptureFixture[str]) -> None:
    Path(job.table).mkdir()
    Path(job.table, "runs").write_text("in the way")
    assert run_job(job).published
    assert capfd.readouterr().err.count("the run's state could not be written, so `status` does not show it") == 1
    assert not run_job(job).published
    assert "the end of the run could not be written to its table" in capfd.readouterr().err


def test_what_old_runs_left_is_removed(job: JobConfig) -> None:
    run_job(job)
    store = Store(job.table)
    old, lately = time.time() - 2 * runs.KEPT_S, time.time() - runs.KEPT_S / 2
    for run_id, written in {"20200101T000000Z-1": old, "20200102T000000Z-2": lately, "20200103T000000Z-3": old}.items():
        for name in ("state.json", "record.json", "report.html"):
            store.create(f"runs/{run_id}/{name}", b"{}")
            os.utime(Path(job.table, "runs", run_id, name), (written, written))
    prune_runs(store, keep=4)
    assert len({entry.path.split("/")[1] for entry in store.list_files("runs")}) == 4
    run_job(job.model_copy(update={"retain": job.retain.model_copy(update={"runs": 2})}))
    left = sorted({entry.path.split("/")[1] for entry in store.list_files("runs")})
    assert left[0] == "20200102T000000Z-2"  # it may still go on
    assert len(left) == 3
    assert [run.state.version for run in runs_of(job)] == [1, 1]  # what is no state of this release is passed over


def status(uri: str, environment: dict[str, str], *arguments: str) -> str:
    """`lora-embed status` as another machine has it: another process, which knows the table's address alone."""
    command = [sys.executable, "-c", COMMAND, "status", uri, *arguments]
    variables = os.environ | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout


@pytest.mark.long
def test_a_run_is_seen_from_elsewhere_while_it_goes_on_and_seems_dead_once_it_is_killed(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tars(tmp_path / "shards", shards=12, images=4)
    job = write_job(tmp_path, tiny_recipe(tmp_path), source, table="s3://images/seen")

    def slowly(request: Request) -> None:
        time.sleep(2.0 if request.method == "PUT" and "/staging/" in request.path else 0)

    store = Store("s3://images/seen", server.options())
    with Proxy(server.endpoint) as proxy:
        proxy.watch = slowly
        command = [sys.executable, "-c", BEATS_OFTEN, "--config", str(job)]
        with (tmp_path / "log").open("wb") as log:
            variables = os.environ | server.environment(proxy.endpoint)
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: process.poll() is not None or any(run.state.embedded for run in read_runs(store)))
            assert process.poll() is None, (tmp_path / "log").read_text()
            said = json.loads(status("s3://images/seen", server.environment(), "--json"))["runs"]
            text = status("s3://images/seen", server.environment())
        finally:
            kill_all(process)
    (run,) = said
    assert (run["status"], run["doing"], run["shards"], run["shards_failed"]) == ("running", "embedding", 12, 0)
    assert run["embedded"] == 4 * run["shards_done"] > 0
    assert run["silent_s"] < runs.DEAD_AFTER_S
    assert run["last_chunk"] >= run["started"]
    assert f"running   {run['run_id']} embedding on {run['host']} for " in text
    assert " of 12 shards, " in text

    monkeypatch.setattr(runs, "DEAD_AFTER_S", 0.5)
    (dead,) = wait_for(lambda: [run for run in read_runs(store) if run.status == "seems dead"])
    assert dead.describe().startswith(f"seems dead: embedding on {run['host']}, ")
    assert dead.state.run_id == run["run_id"]


def test_a_beat_that_hangs_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one was seen to, whose answer the network lost."""
    monkeypatch.setattr(heartbeat, "LAST_BEAT_S", 0.2)
    forever = threading.Event()

    def beat() -> None:
        forever.wait()

    began = time.monotonic()
    with heartbeat.Heartbeat(beat):
        pass
    assert time.monotonic() - began < 5
    forever.set()
