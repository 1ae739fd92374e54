"""Runs over lists of references: each row is a vector or a reject, and a night embeds what changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import job_of, read_rows, run_here, tiny_recipe, vectors_by_id, write_tars
from lists import images_in, write_list
from lora_embed.chain import pipeline
from lora_embed.chain.device import Device
from lora_embed.cli.options import read_as
from lora_embed.config.models import JobConfig
from lora_embed.errors import ConfigError, GateFailed, IncompleteRun
from lora_embed.evaluate.assess import open_source
from lora_embed.evaluate.request import LabelledInput, Request
from lora_embed.run.job import run_job
from lora_embed.run.plan import plan_job
from lora_embed.run.refuse import local_places
from lora_embed.shards import lists, references
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import count_samples
from lora_embed.store.objects import fetch
from lora_embed.store.store import Store
from lora_embed.table import lineage
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table
from lora_embed.tune.labelled import Wanted, read_labelled
from samples import PREPROCESSING, png


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder / "recipe.yaml"


def job_with(folder: Path, tiny: Path, source: Path, **options: Any) -> JobConfig:
    return job_of(folder, tiny, source, reference_column="url", chunk_size=8, **options)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_a_list_gives_the_vectors_of_its_images(tmp_path: Path, tiny: Path, name: str) -> None:
    paths = images_in(tmp_path / "in", 20)
    run_job(job_of(tmp_path, tiny, tmp_path / "in", table="loose"))
    loose = vectors_by_id(read_rows(tmp_path / "loose"))
    named = [*paths, "images/gone.png", paths[0]]
    source = write_list(tmp_path / "in" / name, {"url": named, "label": list(range(22))})
    result = run_job(job_with(tmp_path, tiny, source, carry=["label:int64"], max_rejects=0.5))
    assert result.counts == {"shards": 1, "samples": 22, "vectors": 20, "rejects": 2}
    assert vectors_by_id(read_rows(tmp_path / "table")) == {f"{name}/{path}": loose[path] for path in paths}
    assert {row["key"]: row["label"] for row in read_rows(tmp_path / "table").to_pylist()} == {
        path: number for number, path in enumerate(paths)
    }
    assert rejects_by_id(tmp_path / "table") == [
        (f"{name}/{paths[0]}", "duplicate_id", "an earlier row of the list has the same key"),
        (f"{name}/images/gone.png", "no_image", "images/gone.png does not exist"),
    ]
    verify_table(open_table(str(tmp_path / "table")))


def rejects_by_id(table: Path) -> list[tuple[str, str, str]]:
    rows = [row for path in (table / "rejects").rglob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted((row["id"], row["reason"], row["detail"]) for row in rows)


def test_a_night_embeds_the_range_that_changed(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new row at the start of the list, an image that is gone, and one that was replaced, which is seen only if asked."""
    monkeypatch.setattr(lists, "FEWEST_ROWS", 2)
    monkeypatch.setattr(lists, "ENDS_ONE_IN", 12)
    source = tmp_path / "in" / "a.csv"
    paths = images_in(tmp_path / "in", 120)
    write_list(source, {"url": paths[1:]})
    job = job_with(tmp_path, tiny, source)
    assert run_job(job).counts["vectors"] == 119
    assert run_job(job).embedded == 0
    write_list(source, {"url": paths})
    outlook = plan_job(job)
    assert (outlook.to_embed, outlook.shards) == (1, len(open_table(job.table).manifest.shards))
    night = run_job(job)
    assert (night.version, night.counts["vectors"]) == (2, 120)
    assert night.embedded == 1
    assert 0 < night.taken < 60
    (tmp_path / "in" / paths[60]).write_bytes(png(999))
    assert run_job(job).embedded == 0
    checking = job.model_copy(update={"check_references": True})
    assert run_job(checking).counts["vectors"] == 120  # all ids are others, as they now hold etags
    (tmp_path / "in" / paths[60]).write_bytes(png(1000))
    assert run_job(checking).embedded == 1
    write_list(source, {"url": paths[:100]})
    with pytest.raises(GateFailed, match="20 of 120 images of the version before are missing"):
        run_job(checking)
    verify_table(open_table(job.table))


def test_a_stopped_run_fetches_only_what_is_missing(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_list(tmp_path / "in" / "a.csv", {"url": images_in(tmp_path / "in", 60)})
    job = job_with(tmp_path, tiny, source)
    folder, aside = tmp_path / "in" / "images", tmp_path / "aside"
    (folder / "45.png").rename(aside)
    (folder / "45.png").symlink_to("/proc/1/mem")  # reading it fails, as on a disk that is broken
    with pytest.raises(IncompleteRun):
        run_job(job)
    (folder / "45.png").unlink()
    aside.rename(folder / "45.png")
    fetched: list[str] = []
    monkeypatch.setattr(references, "fetch", lambda place, *rest: (fetched.append(place.path), fetch(place, *rest))[1])
    result = run_job(job)
    assert result.counts["vectors"] == 60
    assert sorted(int(Path(path).stem) for path in fetched) == [*range(40, 60)]


def test_the_records_and_the_plan_know_lists(tmp_path: Path, tiny: Path) -> None:
    source = write_list(tmp_path / "in" / "a.csv", {"url": images_in(tmp_path / "in", 60)})
    job = job_with(tmp_path, tiny, source)
    forecast = plan_job(job, forecasts=True).forecast
    assert forecast is not None
    assert forecast.images == 60
    result = run_job(job.model_copy(update={"limit": 7}))
    assert (result.published, result.embedded) == (False, 7)


@pytest.mark.parametrize("key", ["check_references", "reject_unreachable", "reference_roots"])
def test_keys_of_lists_need_their_column(tmp_path: Path, tiny: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} has no effect without reference_column"):
        job_of(tmp_path, tiny, tmp_path, **{key: ["/data"] if key == "reference_roots" else True})


def test_a_job_without_lists_says_what_is_missing(tmp_path: Path, tiny: Path) -> None:
    """And one that has lists, but does not say so, is told of the key."""
    write_tars(tmp_path / "tars", shards=1, images=2)
    with pytest.raises(ConfigError, match=r"reference_column is 'url', but there is no list of references \(.parquet"):
        run_job(job_with(tmp_path, tiny, tmp_path / "tars"))
    source = write_list(tmp_path / "in" / "a.csv", {"url": images_in(tmp_path / "in", 2)})
    for given in (source, source.parent / "*.csv"):
        with pytest.raises(ConfigError, match="set reference_column in the job to the column that holds them"):
            run_job(job_of(tmp_path, tiny, given))


def test_evaluate_and_tune_read_the_lists_of_a_job(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--data job.yaml` reads is what a run would read."""
    rows = {"url": images_in(tmp_path / "in", 8), "kind": ["a", "b"] * 4}
    job = job_with(tmp_path, tiny, write_list(tmp_path / "in" / "a.csv", rows))
    wanted = Wanted(fields=("kind",), group=None, most=8, seed=0)
    found = read_labelled(LabelledInput(inputs=job.input, **read_as(job)), wanted, PREPROCESSING, tmp_path / "work")
    assert set(found.ids) == {f"a.csv/{path}" for path in rows["url"]}
    assert found.classes == {"kind": ("a", "b")}
    request = Request(recipes=(str(tiny),), inputs=job.input, labels=("kind",), work=str(tmp_path / "kept"), **read_as(job))
    monkeypatch.setattr(pipeline, "ask_device", lambda topology: Device(kind="cpu", has_native_bfloat16=False))
    source, _ = open_source(request)
    assert sum(count_samples(shard, source.layout, {}, 10**6) for shard in source.shards) == 8


@pytest.mark.parametrize(
    ("reference", "local"),
    [("images/0.png", True), ("/data/0.png", True), ("file:///data/0.png", True), ("https://example.org/0.png", False)],
)
def test_a_local_list_may_name_what_all_nodes_reach(tmp_path: Path, reference: str, *, local: bool) -> None:
    """Workers need the rows of a list, and not the list."""
    source = write_list(tmp_path / "a.csv", {"url": [reference, "s3://images/1.png"]})
    listed = list_shards((str(source),), {}, references=References(column="url", roots=("s3://images",)))
    assert local_places(Store("memory://table"), listed, {}) == [str(tmp_path)] * local


def files_with(table: Path, vector: bytes) -> set[str]:
    """The data files that hold these bytes among their vectors."""
    return {
        str(path.relative_to(table))
        for path in (table / "data").rglob("*.parquet")
        if any(
            vector == row.tobytes() for row in np.stack(pq.read_table(path).column("embedding").to_numpy()).astype(np.float32)
        )
    }


@pytest.mark.parametrize("kind", ["list", "folder", "folder\nof two lines"])
def test_an_image_is_found_and_forgotten_by_its_id(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its shard has a name of its own, which is no part of the id."""
    monkeypatch.setattr(lists, "FEWEST_ROWS", 2)
    monkeypatch.setattr(lists, "ENDS_ONE_IN", 12)
    folder = tmp_path / "in" / kind
    paths = images_in(folder, 60)
    if kind == "list":
        job, prefix = job_with(tmp_path, tiny, write_list(folder / "a.csv", {"url": paths})), "a.csv"
    else:
        job, prefix = job_of(tmp_path, tiny, tmp_path / "in"), kind
    run_job(job)
    table, wanted = open_table(job.table), f"{prefix}/{paths[40]}"
    rows = table.rows([wanted, f"{prefix}/{paths[7]}"], ["id", "embedding"]).to_pylist()
    assert [row["id"] for row in rows] == [wanted, f"{prefix}/{paths[7]}"]
    vector = np.asarray(rows[0]["embedding"], np.float32).tobytes()
    holding = files_with(Path(job.table), vector)
    assert len(holding) == 1
    lineage.forget(table.store, [wanted], "asked")
    now = open_table(job.table)
    assert now.count == 59
    assert now.rows([wanted]).num_rows == 0
    assert not holding & {file.path for file in now.manifest.files}
    verify_table(now)
