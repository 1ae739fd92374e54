"""A sample goes before a full pass: too small a change is skipped, a bad one stops, any other goes on."""

from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.runs import read_runs
from lora_embed.run import journal
from lora_embed.run.job import run_job
from lora_embed.run.work import choose_unchanged
from lora_embed.schema import ChunkHead
from lora_embed.shards.listing import list_shards
from lora_embed.store.store import Store
from lora_embed.table.read import open_table
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
    assert (result.version, result.published, result.embedded) == (1, False, 84)
    said = capfd.readouterr().err
    assert "sample of 84 images in 7 shards: the change is below your threshold" in said
    assert "embedding all images anew would have taken about 1 minute" in said
    assert staged(job) == 7
    again = run_job(job, replaces=True)  # the next night says so again, without embedding
    assert (again.version, again.embedded) == (1, 0)
    assert staged(job) == 7
    states = [(run.status, run.state) for run in read_runs(Store(job.table))]
    assert [(status, state.embedded, state.shards_done, state.shards) for status, state in states] == [
        ("current", 0, 0, 0), ("current", 84, 7, 7), ("published", 120, 10, 10),
    ]  # fmt: skip


def test_a_bad_encoder_is_stopped_by_its_sample(job: JobConfig) -> None:
    retrain(job, 60.0)
    with pytest.raises(GateFailed, match=r"not embedded anew, version 1 stays: .*neighbours"):
        run_job(job, replaces=True)
    assert staged(job) == 7
    unasked = job.model_copy(update={"reembed": job.reembed.model_copy(update={"sample": 0})})
    with pytest.raises(GateFailed, match=r"not published\. Readers get what they got before"):
        run_job(unasked, replaces=True)
    assert staged(job) == 10
    assert open_table(job.table).version == 1


def test_any_other_goes_on_and_embeds_nothing_twice(job: JobConfig) -> None:
    retrain(job, 1.2)
    result = run_job(job, replaces=True)
    assert (result.version, result.published, result.embedded) == (2, True, 120)


def test_the_state_counts_shards_and_images_in_every_phase(job: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the run in this process, as a beat leaves it for others after each chunk."""
    retrain(job, 1.2)
    seen: dict[str, list[tuple[int, int, int]]] = {}
    add = Effort.add

    def added(effort: Effort, chunk: ChunkHead) -> None:
        add(effort, chunk)
        if effort is recordings[-1].effort:  # and not that of one try
            beat()

    def beat() -> None:
        journal._leave_state(recordings[-1])
        (state, *_) = (run.state for run in read_runs(Store(job.table)) if run.status == "running")
        seen.setdefault(state.doing, []).append((state.embedded, state.shards_done, state.shards))

    monkeypatch.setattr(Effort, "add", added)
    recordings: list[journal.Journal] = []
    made = journal.Journal.__init__

    def keep(self: journal.Journal, *arguments: Any, **more: Any) -> None:
        made(self, *arguments, **more)
        recordings.append(self)

    monkeypatch.setattr(journal.Journal, "__init__", keep)
    result = run_job(job, replaces=True)
    assert seen["embedding a sample"] == [(12 * done, done, 7) for done in range(1, 8)]
    assert seen["embedding"] == [(12 * done, done, 10) for done in range(8, 11)]
    assert result.embedded == 120


def test_the_sample_is_the_same_whatever_else_is_there(job: JobConfig) -> None:
    shards, current = list_shards(job.input, {}), open_table(job.table).manifest
    chosen = choose_unchanged(current, shards, 80)
    assert len(chosen) == 7
    assert choose_unchanged(current, shards[::-1], 80) == chosen
    assert choose_unchanged(current, shards, 30) == chosen[:3]
    assert choose_unchanged(current, shards, 0) == []
