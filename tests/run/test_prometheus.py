"""What Prometheus gets from the metrics endpoint of a run's node."""

import os
import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs import ROOT, job_of, tiny_recipe
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.record import RunState
from lora_embed.monitor.runs import Run, to_prometheus
from lora_embed.monitor.stages import Bound
from lora_embed.run.job import run_job
from lora_embed.run.prometheus import COUNTERS, GAUGES, Meters
from lora_embed.schema import ChunkHead
from lora_embed.store.retry import retried, take_retries
from samples import png, tar_of


def scrape(table: str) -> dict[tuple[str, str], float]:
    """(name, the tag beside the table) → value, of the series of a table; names without what Ray puts before them."""
    [node] = [node for node in ray.nodes() if node["Alive"]]
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.labels.get("table") == table:
            further = [value for name, value in sample.labels.items() if name in ("reason", "stage", "state", "by", "run_id")]
            found[sample.name.removeprefix("ray_lora_embed_"), "".join(further)] = sample.value
    return found


def test_the_docs_name_these_metrics_and_no_others() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    here = {f"ray_lora_embed_{name}_total" for name in COUNTERS} | {f"ray_lora_embed_{name}" for name in GAUGES}
    named = {name.replace("…", "ray_lora_embed") for name in re.findall(r"(?:ray_lora_embed|…)_\w+", text)}
    assert named == here


def test_the_docs_name_the_metrics_of_a_table_and_no_others() -> None:
    state = RunState(run_id="1", host="node", started="2026-01-01T00:00:00+00:00", outcome="published")
    text = to_prometheus("table", 1, [Run(state=state, heard=9.0, silent_s=1.0)])
    made = {family.name for family in text_string_to_metric_families(f"{text}\n")}
    page = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^(lora_embed_\w+){", page, flags=re.MULTILINE)) == made
    assert set(re.findall(r"\b(?<!ray_)lora_embed_\w+", page)) == made


class Recorded(Meters):
    """Keeps the names that are set or increased."""

    def __init__(self) -> None:
        super().__init__("table", "1", 1.0)
        self.names: list[str] = []

    def _count(self, name: str, total: float, **tags: str) -> None:
        self.names += [name] if total and set(tags) == set(COUNTERS[name][1]) else []

    def _set(self, name: str, value: float, **tags: str) -> None:
        self.names += [name] if set(tags) == set(GAUGES[name][1]) else []


def test_a_run_shows_every_metric_that_is_listed() -> None:
    head = ChunkHead(shard_id="1", shard_name="a", prefix="a", samples=3, reasons={"empty": 1}, image_bytes=9, retries=1)
    effort, meters = Effort(), Recorded()
    effort.begin(1)
    effort.add(replace(head, seconds={"decode": 1.0}))
    effort.bound = Bound(by="decode", shares={}, says="")
    meters.show(effort, 1)
    assert set(meters.names) == {*COUNTERS, *GAUGES}


def test_requests_that_are_tried_again_are_counted_once() -> None:
    def answer() -> str:
        if errors:
            raise errors.pop()
        return "here"

    errors: list[Exception] = [ConnectionError(), TimeoutError()]
    take_retries()
    assert retried(answer, "a request", limit_s=30.0) == "here"
    assert [take_retries(), take_retries()] == [2, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_scrape_shows_what_a_run_did(tmp_path: Path) -> None:
    images = [png(number) for number in range(7)]
    members = [(f"{number}.png", data) for number, data in enumerate(images)]
    source = tmp_path / "shards"
    source.mkdir()
    (source / "0000.tar").write_bytes(tar_of([*members, ("text.png", b"plain text"), ("empty.png", b"")]))
    (source / "0001.tar").write_bytes(tar_of(members))
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, chunk_size=5, max_rejects=0.2)
    before = time.time()
    result = run_job(job)
    found, deadline = scrape(job.table), time.monotonic() + 30  # Ray hands on what was counted every ten seconds
    while ("version", "") not in found or ("samples_total", "") not in found:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
        found = scrape(job.table)
    counted = {name: found[f"{name}_total", ""] for name in ("samples", "vectors", "chunks", "image_bytes")}
    size = 2 * sum(map(len, images)) + len(b"plain text")
    assert counted == {"samples": 16, "vectors": 14, "chunks": 4, "image_bytes": size}
    assert {key: value for key, value in found.items() if key[0] == "rejects_total"} == {
        ("rejects_total", "not_an_image"): 1,
        ("rejects_total", "empty"): 1,
    }
    seconds = {stage: value for (name, stage), value in found.items() if name == "stage_seconds_total"}
    assert seconds == pytest.approx(result.stages, abs=0.001)
    assert {state: found["shards", state] for state in ("done", "failed", "waiting")} == {"done": 2, "failed": 0, "waiting": 0}
    assert [by for (name, by), value in found.items() if name == "bound" and value] == [result.bound]
    assert found["version", ""] == 1
    assert before <= found["run_start_timestamp_seconds", ""] <= found["last_chunk_timestamp_seconds", ""] <= time.time()
    assert [run_id for name, run_id in found if name == "run_info"] == [path.name for path in Path(job.table, "runs").iterdir()]


@pytest.mark.parametrize("name", ["Löwen", "表", "\U0001f600", os.fsdecode(b"caf\xe9")])
def test_a_tables_name_beyond_ascii_is_a_label_all_the_same(name: str) -> None:
    table = f"/data/{name}"
    meters = Meters(table, "1", 1.0)
    meters.show(Effort(shards=3), None)
    assert not meters._has_failed
    assert meters._table == f"/data/{quote(os.fsencode(name))}"


def test_metrics_that_ray_does_not_take_do_not_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Meters):
        def _set(self, name: str, value: float, **tags: str) -> None:
            raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)")

    meters = Broken("table", "1", 1.0)
    for _ in range(2):
        meters.show(Effort(shards=3), None)
    assert capsys.readouterr().err.count("metrics could not be recorded") == 1
