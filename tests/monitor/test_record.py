"""What a run leaves with its table: a record, a report, and neither a secret nor a failure more."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.monitor.record import Reading, RunRecord, bins_of
from lora_embed.report.run import rate_chart, run_page
from lora_embed.run import journal
from lora_embed.run.job import run_job
from lora_embed.store.store import Store
from lora_embed.table.versions import read_manifest
from lora_embed.text import without_secrets
from samples import tar_of

SECRET = "wJalrXUtnFEMI"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Three shards of eight images, one of them beside a text file that is none."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=3, images=8)
    (source / "0003.tar").write_bytes(tar_of([("<b>no picture.png", b"plain text")]))
    return job_of(tmp_path, tiny_recipe(tmp_path), source, max_rejects=0.1, chunk_size=4, input_storage_options={"retry_s": 7})


def records(job: JobConfig) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(job.table, "runs").glob("*/record.json"))]


def test_a_run_leaves_its_record_and_a_report(job: JobConfig, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_job(job)
    (record,) = records(job)
    assert (record["outcome"], record["version"], record["error"]) == ("published", 1, "")
    assert record["embedded"] == result.embedded == 25
    assert (record["rejected"], record["rejects"]) == (1, {"not_an_image": 1})
    assert [(one["id"], one["reason"]) for one in record["examples"]] == [("0003.tar/<b>no picture", "not_an_image")]
    assert record["counts"] == result.counts
    assert record["stages"] == pytest.approx(result.stages)
    assert record["readings"][-1]["samples"] == 25
    assert set(record["gates"]) >= {"rejects", "removed"}
    assert record["merge"]["members"][0]["weights_changed"] > 0
    assert "weights" not in record["merge"]["members"][0]
    assert record["lineage"]["recipe_id"] == record["encoder"]["recipe_id"]
    assert not [key for key in record["job"] if "storage_options" in key]
    (page,) = Path(job.table, "runs").glob("*/report.html")
    text = page.read_text()
    for said in ("Published as version 1", "not_an_image", "&lt;b&gt;no picture", "weighted_sum", "✓ passed", record["run_id"]):
        assert said in text
    assert f"report: {job.table}/runs/{record['run_id']}/report.html" in capfd.readouterr().err


def test_rejects_in_files_that_are_not_read_are_counted(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(job)
    store = Store(job.table)
    manifest = read_manifest(store)
    assert manifest is not None
    monkeypatch.setattr(journal, "MOST_REJECT_FILES", 0)
    assert journal.find_rejects(store, manifest) == ({journal.NOT_READ: 1}, ())


def test_a_run_that_finds_nothing_to_do_leaves_no_record(job: JobConfig) -> None:
    run_job(job)
    run_job(job)
    assert len(records(job)) == 1


def test_a_run_that_a_gate_stops_says_why(job: JobConfig) -> None:
    strict = job.model_copy(update={"max_rejects": 0.0})
    with pytest.raises(GateFailed):
        run_job(strict)
    (record,) = records(strict)
    assert (record["outcome"], record["version"], record["embedded"]) == ("failed", None, 25)
    assert "1 of 25 new samples cannot be embedded" in record["error"]
    with pytest.raises(GateFailed):
        run_job(strict)  # embeds nothing, so there is nothing to tell beside the message
    (page,) = Path(job.table, "runs").glob("*/report.html")
    assert "1 of 25 new samples cannot be embedded" in page.read_text()


def test_a_run_does_not_fail_for_its_report(job: JobConfig, capfd: pytest.CaptureFixture[str]) -> None:
    Path(job.table).mkdir()
    Path(job.table, "runs").write_text("in the way")
    assert run_job(job).published
    assert "the end of the run could not be written to its table" in capfd.readouterr().err


def test_secrets_in_uris_are_left_out() -> None:
    given = {
        "input": [f"https://me:{SECRET}@host/a.tar?X-Amz-Signature={SECRET}&x=1", "s3://bucket/shard-?.tar"],
        "table": f"abfs://key:{SECRET}@host/table",
        "error": f"cannot read https://host/a.tar?sig={SECRET} twice",
        "chunk_size": 4,
    }
    found = without_secrets(given)
    assert SECRET not in json.dumps(found)
    assert found["input"][1] == "s3://bucket/shard-?.tar"
    assert found["error"] == "cannot read https://host/a.tar?… twice"
    assert found["chunk_size"] == 4


def record_of(readings: tuple[Reading, ...], actors: int = 2) -> RunRecord:
    return RunRecord(
        run_id="20261127T010203Z-abcdef", started="2026-11-27T01:02:03+00:00", seconds=61.0, outcome="not published", error="",
        job={"table": "s3://bucket/<table>", "input": ["s3://bucket/x"], "recipe": "r.yaml"},
        encoder={"space_id": "0" * 12, "recipe_id": "1" * 12, "dimension": 384}, layout={"precision": "float32"},
        embedded=readings[-1].samples, rejected=0, stages=readings[-1].seconds, bound={"by": "forward", "says": "bound by x"},
        workers={"actors": actors, "decoders": 0, "cpus_per_decoder": 1.0}, readings=readings,
    )  # fmt: skip


def test_the_time_line_is_cut_into_stretches_that_say_what_bounded_them() -> None:
    readings = [Reading(elapsed_s=0.0, samples=0)]
    spent = {"read": 0.0, "decode": 0.0, "forward": 0.0}
    for second in range(2, 400, 2):
        spent["decode" if second < 200 else "forward"] += 3.6
        readings.append(Reading(elapsed_s=second, samples=10 * second, seconds=dict(spent)))
    bins = bins_of(record_of(tuple(readings)))
    assert 20 < len(bins) <= 49
    assert sum(one.samples for one in bins) == readings[-1].samples
    assert [(one.start_s, one.bound.by) for one in (bins[0], bins[-1])] == [(0.0, "decode"), (bins[-1].start_s, "forward")]
    assert bins[0].busy["decode"] == pytest.approx(1.8)
    text = run_page(record_of(tuple(readings)))
    assert "Bound by decode until 3:" in text
    assert "then forward until 6:38." in text
    assert "<desc>Images per second in" in text
    assert "&lt;table&gt;" in text
    assert bins_of(record_of((Reading(elapsed_s=0.0, samples=0),))) == []


@pytest.mark.parametrize(("end_s", "unit", "end"), [(240, "seconds", 240.0), (480, "minutes", 8.0)])
def test_the_axis_of_time_is_in_its_unit(end_s: int, unit: str, end: float) -> None:
    readings = [Reading(elapsed_s=s, samples=10 * s, seconds={"forward": 1.8 * s}) for s in range(0, end_s + 2, 2)]
    chart = rate_chart(bins_of(record_of(tuple(readings))))
    times = [point.x for point in chart.series[0].points]
    assert chart.x.name == f"{unit} since the beginning"
    assert 0 < times[0] < times[-1] < end < times[-1] + 2 * times[0]
    assert {round(point.y, 6) for point in chart.series[0].points} == {10.0}


def test_a_run_without_embedding_or_merge_has_a_page_too() -> None:
    text = run_page(replace(record_of((Reading(elapsed_s=0.0, samples=0),)), bound={}, error="a\nb <i>", outcome="failed"))
    assert "Ended before it was complete" in text
    assert "a<br>b &lt;i&gt;" in text
