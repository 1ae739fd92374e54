"""What a run would do and how long it would take, without doing it."""

from pathlib import Path

import pytest

from jobs import job_of, run_here, snapshot, tiny_recipe, write_tars
from lora_embed.config.models import JobConfig
from lora_embed.errors import IncompleteRun
from lora_embed.monitor.stages import Workers
from lora_embed.run.job import run_job
from lora_embed.run.plan import Forecast, plan_job, reckon
from lora_embed.schema import ChunkHead


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
