"""What a run leaves with its table: a record, a report, and neither a secret nor a failure more."""

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.monitor.record import OPTIONS, RejectExample, RunRecord, bins_of
from lora_embed.monitor.runs import describe_runs, read_runs
from lora_embed.monitor.timeline import Reading
from lora_embed.report.run import rate_chart, run_page
from lora_embed.run import journal
from lora_embed.run.job import run_job
from lora_embed.run.plan import plan_job
from lora_embed.store.store import Store
from lora_embed.table import rejects
from lora_embed.table.read import open_table
from lora_embed.table.rejects import describe_examples, describe_rejects
from lora_embed.table.versions import read_manifest
from lora_embed.text import without_secrets
from pages import whole_names
from samples import png, tar_of, touch_files

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


def test_a_record_holds_every_key_of_a_job_but_the_storage_options() -> None:
    assert set(OPTIONS) == {name for name in JobConfig.model_fields if not name.endswith("_storage_options")}


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
    text = whole_names(page.read_text())
    for said in ("Published as version 1", "not_an_image", "&lt;b&gt;no picture", "weighted_sum", "✓ passed", record["run_id"]):
        assert said in text
    assert f"report: {job.table}/runs/{record['run_id']}/report.html" in capfd.readouterr().err


def test_rejects_in_files_that_are_not_read_are_counted(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(job)
    store = Store(job.table)
    manifest = read_manifest(store)
    assert manifest is not None
    monkeypatch.setattr(rejects, "MOST_FILES", 0)
    assert journal.find_rejects(store, manifest) == ({rejects.NOT_READ: 1}, ())


def test_a_run_that_finds_nothing_to_do_leaves_no_record(job: JobConfig) -> None:
    run_job(job)
    run_job(job)
    assert len(records(job)) == 1


def test_a_run_that_a_gate_stops_says_why(job: JobConfig) -> None:
    strict = job.model_copy(update={"max_rejects": 0.0})
    with pytest.raises(GateFailed) as stopped:
        run_job(strict)
    (record,) = records(strict)
    assert (record["outcome"], record["version"], record["embedded"]) == ("failed", None, 25)
    assert record["rejects"] == {"not_an_image": 1}
    assert [(shown["id"], shown["reason"]) for shown in record["examples"]] == [("0003.tar/<b>no picture", "not_an_image")]
    with pytest.raises(GateFailed):
        run_job(strict)  # embeds nothing: what was staged before is told
    assert sorted(record["rejected"] for record in records(strict)) == [0, 1]
    (state, _) = read_runs(Store(job.table))
    shown = "\n".join(describe_runs(read_runs(Store(job.table))))
    pages = [html.unescape(path.read_text()) for path in Path(job.table, "runs").glob("*/report.html")]
    errors = [record["error"] for record in records(strict)]
    assert len(pages) == 2
    for text in (*pages, *errors, state.state.error, shown, str(stopped.value)):
        assert "1 of 25 new samples cannot be embedded: 1 not_an_image" in text
        assert "0003.tar/<b>no picture: not_an_image, " in text
    for record in records(strict):
        assert record["gates"]["rejects"]["details"][0].startswith("0003.tar/<b>no picture: not_an_image, ")
        assert record["gates"]["removed"]["holds"]


def test_examples_are_of_as_many_reasons_as_possible() -> None:
    examples = [RejectExample(id=f"{n}", reason=reason, detail="") for reason in ("empty", "no_image") for n in range(3)]
    assert describe_examples(examples) == ["0: empty", "0: no_image", "1: empty"]
    assert describe_rejects({"empty": 2, "no_image": 1200}) == "1,200 no_image, 2 empty"


def test_what_was_passed_over_is_in_record_state_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=1, images=2)
    (source / "0001.tar").write_bytes(tar_of([("a.jpg", png()), ("a.left.png", b"-"), ("._a.jpg", b"-"), ("b.heic", b"-")]))
    touch_files(source, "notes.txt", "more.txt", "film.mp4", ".c.jpg")
    (source / "loose.jpg").write_bytes(png(7))
    (source / "gone.jpg").symlink_to("/nowhere/gone.jpg")
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, max_rejects=0.9, gates={"passed_over": 0.1})
    with pytest.raises(GateFailed, match=r"passed_over: passed over by the listing: 4 files \(.txt 2, .mp4 1, hidden .jpg 1\)"):
        run_job(job)
    result = run_job(job.model_copy(update={"gates": {"passed_over": 0.5}}))
    stopped, record = sorted(records(job), key=lambda record: record["outcome"])
    (state, _) = [json.loads(path.read_text()) for path in Path(job.table, "runs").glob("*/state.json")]
    plan = plan_job(job)
    files = {".txt": 2, ".mp4": 1, "hidden .jpg": 1}
    assert record["passed_over"] == state["passed_over"] == result.passed_over == plan.passed_over == files
    assert (stopped["outcome"], record["outcome"]) == ("failed", "published")
    assert stopped["passed_in_tars"] == {".left.png": 1, "macOS ._": 1}
    assert result.counts["samples"] == 2 + 2 + 2
    table = open_table(job.table)
    assert {(row["id"], row["reason"], row["detail"]) for row in table.rejects().to_pylist()} >= {
        ("gone.jpg", "no_image", "a link to /nowhere/gone.jpg, which does not exist")
    }
    said = " ".join(capfd.readouterr().err.split())
    assert "Passed over: 4 files (.txt 2, .mp4 1, hidden .jpg 1)" in said
    assert said.count("Images in tars that are passed over, beside the image of their sample or hidden: .left.png 1") == 1
    assert "passed 4 files (.txt 2, .mp4 1, hidden .jpg 1) passed over" in " ".join(plan.describe().split())
    for page in Path(job.table, "runs").glob("*/report.html"):
        assert "Files of the input that are passed over: .txt 2, .mp4 1, hidden .jpg 1." in page.read_text()
    assert run_job(job).passed_over == files  # also where there is nothing to do


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
