"""A sample goes before a full pass: too small a change is skipped, a bad one stops, any other goes on."""

from pathlib import Path

import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.config import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.plan import list_shards
from lora_embed.run import run_job
from lora_embed.table import open_table
from lora_embed.work import choose_unchanged
from models import edit_tensors


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Published, in this process: 10 shards of 12 images, of which 7 make a sample."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=10, images=12)
    job = job_of(tmp_path, tiny_recipe(tmp_path), source, reembed={"sample": 80})
    run_job(job)
    return job


def retrain(job: JobConfig, factor: float) -> None:
    edit_tensors(
        Path(job.recipe).parent / "ten", lambda tensors: {n: t * factor if "lora_B" in n else t for n, t in tensors.items()}
    )


def staged(job: JobConfig) -> int:
    return len(list(Path(job.table, "staging").rglob("*.parquet")))


def test_a_change_below_the_threshold_is_skipped(job: JobConfig, capfd: pytest.CaptureFixture[str]) -> None:
    retrain(job, 1.0001)
    result = run_job(job, replaces=True)
    assert (result.version, result.published, result.embedded) == (1, False, 0)
    said = capfd.readouterr().err
    assert "sample of 84 images in 7 shards: the change is below your threshold" in said
    assert "it would have cost about 1 minutes" in said
    assert staged(job) == 7
    assert run_job(job, replaces=True).version == 1  # the next night says so again, without embedding
    assert staged(job) == 7


def test_a_bad_encoder_is_stopped_by_its_sample(job: JobConfig) -> None:
    retrain(job, 60.0)
    with pytest.raises(GateFailed, match=r"not embedded anew, version 1 stays: .*neighbours"):
        run_job(job, replaces=True)
    assert staged(job) == 7
    unasked = job.model_copy(update={"reembed": job.reembed.model_copy(update={"sample": 0})})
    with pytest.raises(GateFailed, match="not published, the version before stays"):
        run_job(unasked, replaces=True)
    assert staged(job) == 10
    assert open_table(job.table).version == 1


def test_any_other_goes_on_and_embeds_nothing_twice(job: JobConfig) -> None:
    retrain(job, 1.2)
    result = run_job(job, replaces=True)
    assert (result.version, result.published, result.embedded) == (2, True, 120)


def test_the_sample_is_the_same_whatever_else_is_there(job: JobConfig) -> None:
    shards, current = list_shards(job.input, {}), open_table(job.table).manifest
    chosen = choose_unchanged(current, shards, 80)
    assert len(chosen) == 7
    assert choose_unchanged(current, shards[::-1], 80) == chosen
    assert choose_unchanged(current, shards, 30) == chosen[:3]
    assert choose_unchanged(current, shards, 0) == []
