"""What a run would do and how long it would take, without doing it."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import job_of, run_here, snapshot, tiny_recipe, write_tars
from lora_embed.chain import cluster
from lora_embed.config.models import JobConfig
from lora_embed.errors import ConfigError, IncompleteRun, TableError
from lora_embed.monitor.stages import Workers
from lora_embed.run import count
from lora_embed.run.count import Images
from lora_embed.run.job import run_job
from lora_embed.run.plan import Forecast, plan_job, reckon
from lora_embed.schema import ChunkHead
from lora_embed.table.read import open_table
from models import save_adapter
from samples import png


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """7 shards of 40 images, in this process."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=7, images=40)
    return job_of(tmp_path, tiny_recipe(tmp_path), source, prices={"cpu_hour": 0.1})


def test_a_forecast_leaves_nothing_behind_and_counts_what_a_run_embeds(job: JobConfig, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    outlook = plan_job(job, forecasts=True)
    assert snapshot(tmp_path) == before
    assert outlook.forecast is not None
    assert (outlook.to_embed, outlook.forecast.images) == (7, 280)
    assert outlook.forecast.seconds > outlook.forecast.start_seconds > 0
    assert outlook.forecast.cost == round(outlook.forecast.seconds / 3600 * 0.1, 4)
    assert "forecast  about 280 images at " in outlook.describe()
    assert run_job(job).embedded == 280


def test_a_forecast_of_the_rest_counts_the_rest_alone(job: JobConfig) -> None:
    assert run_job(job, publishes=False).embedded == 280
    write_tars(Path(job.input[0]), shards=1, images=20, seed=1000)
    outlook = plan_job(job, forecasts=True)
    assert outlook.forecast is not None
    assert (outlook.to_embed, outlook.forecast.images) == (1, 20)
    run_job(job)
    assert plan_job(job, forecasts=True).forecast is None  # nothing to embed, nothing to forecast


def test_a_trial_run_is_forecast_as_one(job: JobConfig) -> None:
    outlook = plan_job(job.model_copy(update={"limit": 50}), forecasts=True)
    assert outlook.forecast is not None
    assert outlook.forecast.images == 50


def took(samples: int, factor: float = 1.0) -> ChunkHead:
    seconds = {"read": 0.1 * factor, "decode": 0.4 * factor, "forward": 1.0 * factor, "write": 0.1 * factor}
    return ChunkHead(shard_id="s", shard_name="s", prefix="s", chunk=0, samples=samples, seconds=seconds)


def test_the_reckoning(job: JobConfig) -> None:
    """The first chunk of each actor is slow, and one later one happens to be."""
    found = [took(32, 10), took(32, 10), took(32), took(32, 3), took(32), took(32)]
    expected = Forecast(
        images=10_000,
        seconds=270.0,  # 20 to start, 1.6 s for 32 images, by two actors
        start_seconds=20.0,
        images_per_second=40.0,
        cost=round(270 / 3600 * 2 * 0.1, 4),
        bound="bound by forward (2 actors: read 6%, decode 25%, forward 62%, write 6%, idle 0%): use a GPU, or more CPUs",
    )
    assert reckon(job, found, 10_000, 20.0, Workers(actors=2)) == expected
    on_gpus = reckon(job, found, 10_000, 20.0, Workers(actors=1, decoders=2))
    assert (on_gpus.images_per_second, on_gpus.cost) == (32.0, round(332.5 / 3600 * 2 * 0.1, 4))


def test_nothing_is_reckoned_from_nothing(job: JobConfig) -> None:
    with pytest.raises(IncompleteRun, match="no image of the forecast's sample could be read"):
        reckon(job, [], 10, 1.0, Workers(actors=1))


def test_plan_refuses_what_a_run_refuses(job: JobConfig, tmp_path: Path) -> None:
    """An adapter that was trained again makes another space, which is known only once the encoder is built."""
    assert run_job(job).published
    shutil.rmtree(tmp_path / "ten")
    save_adapter(tmp_path / "ten", tmp_path / "base", 10, seed=9)
    before = snapshot(tmp_path)
    with pytest.raises(TableError, match=r"holds vectors of space .*, and vectors of two spaces must never mix") as planned:
        plan_job(job)
    assert snapshot(tmp_path) == before
    with pytest.raises(TableError) as refused:
        run_job(job)
    assert str(planned.value) == str(refused.value)
    outlook = plan_job(job, replaces=True)
    assert (outlook.to_embed, outlook.may_take_over, outlook.replaced_space is not None) == (7, 0, True)
    assert f"replaces space {outlook.replaced_space}" in outlook.describe()


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "another column of images": ({"image_column": "picture"}, "has no image column 'picture', found .*Correct image_column"),
    "another column of keys": ({"key_column": "name"}, "has no key column 'name', found .*Correct key_column"),
    "a member that no sample has": ({"image_member": "left.png"}, "0000.tar: sample '000000': "),
    "a field that no sample has": ({"carry": ["lable"]}, "carry names lable"),
    "a table that cannot be written": ({"table": "recipe.yaml/table"}, "is a file, so nothing can be written below it"),
    "another precision": ({"precision": "bfloat16"}, "precision 'float32', now 'bfloat16'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_plan_and_run_say_the_same_before_anything_starts(
    what: str, job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = WRONG[what]
    if "column" in what:
        folder = tmp_path / "parquet"
        folder.mkdir()
        for number in range(3):
            pq.write_table(pa.table({"image": [png(number)]}), folder / f"{number}.parquet")
        job = job_of(tmp_path, tmp_path / "recipe.yaml", folder)
    if what == "another precision":
        run_job(job)
    job = job_of(tmp_path, tmp_path / "recipe.yaml", Path(job.input[0]), **options)
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=message) as planned:
        plan_job(job)
    with pytest.raises(ConfigError) as refused:
        run_job(job)
    assert str(planned.value) == str(refused.value)
    assert str(planned.value).count("Correct") <= 1


def test_images_are_counted_exactly_or_estimated(job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outlook = plan_job(job)
    assert (outlook.images, outlook.to_embed_images) == (Images(number=280), Images(number=280))
    assert "input     7 shards, 0.6 MB: 280 images" in outlook.describe()
    monkeypatch.setattr(count, "FILES", 2)
    (tmp_path / "shards/0001.tar").write_bytes(b"no tar")
    outlook = plan_job(job)
    assert abs(outlook.images.number - 240) <= 10
    assert outlook.images.estimated_from in (1, 2)
    assert "about 2" in outlook.describe()


def test_a_plan_says_which_columns_come_and_go(job: JobConfig, tmp_path: Path) -> None:
    run_job(job)
    changed = job_of(tmp_path, tmp_path / "recipe.yaml", Path(job.input[0]), carry=["label"])
    outlook = plan_job(changed)
    assert (outlook.to_embed, outlook.may_take_over, outlook.added_columns) == (7, 7, ("label",))
    assert "columns   adds label" in outlook.describe()
    assert "only images that version 1 does not have are embedded" in outlook.describe()
    run_job(changed)
    assert plan_job(changed).to_embed == 0
    assert plan_job(job).removed_columns == ("label",)


def test_a_plan_tells_changed_shards_from_removed_ones(job: JobConfig, tmp_path: Path) -> None:
    run_job(job)
    assert "\nchanged" not in plan_job(job).describe()
    assert "\nremoved" not in plan_job(job).describe()
    write_tars(tmp_path / "shards", shards=1, images=41)  # the first one, with one more image
    (tmp_path / "shards" / "0006.tar").unlink()
    outlook = plan_job(job)
    assert (outlook.changed, outlook.removed, outlook.to_embed, outlook.may_take_over) == (1, 1, 1, 1)
    text = outlook.describe()
    assert "\nto read   1 shard, 0.1 MB: 41 images\n          only images that version 1 does not have are embedded\n" in text
    assert "\nchanged   1 shard of version 1\nremoved   1 shard of version 1" in text
    (tmp_path / "shards" / "0009.tar").write_bytes((tmp_path / "shards" / "0001.tar").read_bytes())
    assert (
        "\n          of 1 shard among these, only images that version 1 does not have are embedded" in plan_job(job).describe()
    )


def test_a_plan_says_that_a_column_changes_its_type(job: JobConfig, tmp_path: Path) -> None:
    texts, numbers = (
        job_of(tmp_path, tmp_path / "recipe.yaml", Path(job.input[0]), carry=carry) for carry in (["label"], ["label:int64"])
    )
    run_job(texts)
    outlook = plan_job(numbers)
    assert outlook.retyped_columns == ("label from string to int64",)
    assert "columns   changes label from string to int64" in outlook.describe()


def test_plan_and_run_say_that_published_images_keep_their_ids(
    job: JobConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another `key_column` counts for what is read from now on."""
    source = tmp_path / "parquet"
    source.mkdir()
    rows = {"image": [png(number) for number in range(4)], "id": list("abcd"), "name": list("efgh"), "label": list("xyxy")}
    pq.write_table(pa.table(rows), source / "a.parquet")
    first, other = (
        job_of(tmp_path, tmp_path / "recipe.yaml", source, table=str(tmp_path / "of-parquet"), **more)
        for more in ({}, {"key_column": "name"})
    )
    run_job(first)
    assert plan_job(first).remark == ""
    note = "version 1 was made with key_column not set. Shards that it has and that did not change keep their ids and images;"
    assert f"note      {note}" in plan_job(other).describe()
    capsys.readouterr()
    assert run_job(other).version == 1
    assert f"note: {note}" in capsys.readouterr().err
    carried = job_of(
        tmp_path, tmp_path / "recipe.yaml", source, table=str(tmp_path / "of-parquet"), key_column="name", carry=["label"]
    )
    assert plan_job(carried).remark == ""  # other columns: all is read again
    run_job(carried)
    assert sorted(open_table(carried.table).to_dataset().to_table()["key"].to_pylist()) == list("efgh")
