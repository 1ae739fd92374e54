"""What Prometheus gets from the metrics endpoint of a run's node."""

import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs import ROOT, job_of, tiny_recipe
from lora_embed.run.job import run_job
from lora_embed.run.prometheus import COUNTERS, GAUGES
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
