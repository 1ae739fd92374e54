"""Each night a few unchanged images are embedded again beside the new ones: what computes their vectors may have changed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.chain.actors import EmbedImages
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.model.golden import BOUNDS
from lora_embed.run.job import publish_job, run_job
from lora_embed.table.read import open_table
from samples import png, tar_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where jobs run in this process, on 6 shards of 20 images."""
    run_here(monkeypatch)
    write_tars(tmp_path / "shards", shards=6, images=20)
    return tmp_path


def published(folder: Path, **options: Any) -> JobConfig:
    """A job whose first version is published, and which finds one more shard since."""
    options = {"max_rejects": 0.5} | options
    job = job_of(folder, tiny_recipe(folder), folder / "shards", chunk_size=16, **options)
    run_job(job)
    (folder / "shards" / "9999.tar").write_bytes(tar_of([("new.png", png(10**6))]))
    return job


def compute_otherwise(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Vectors change as by a library that the golden images do not notice."""
    right = EmbedImages.__call__

    def embed(actor: EmbedImages, batch: dict[str, Any]) -> dict[str, Any]:
        row = right(actor, batch)
        changed = np.frombuffer(row["vectors"][0], np.float32) * np.float32(factor)
        return row | {"vectors": np.array([changed.tobytes()], dtype=object)}

    monkeypatch.setattr(EmbedImages, "__call__", embed)


def test_the_figure_of_a_version_is_how_far_unchanged_images_have_moved(folder: Path) -> None:
    job = published(folder)
    result = run_job(job)
    gate = open_table(job.table).manifest.gates["drift"]
    assert (result.version, result.embedded) == (2, 1)  # those embedded again are not counted
    assert (gate["value"], gate["limit"], gate["holds"]) == (0.0, BOUNDS["float32"], True)
    # Of 4 shards the one full chunk of 16:
    assert gate["says"].startswith("64 unchanged images were embedded again; the vectors differ")
    assert not list(Path(job.table, "staging").rglob("*.parquet"))


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_vectors_that_are_computed_otherwise_are_not_published(
    folder: Path, monkeypatch: pytest.MonkeyPatch, vector_type: str
) -> None:
    job = published(folder, vector_type=vector_type)
    compute_otherwise(monkeypatch, 1.002)
    with pytest.raises(GateFailed, match=r"drift: \d+ unchanged images .* 2\.\de-03 .*\. If changed libraries .*/staging/"):
        run_job(job)
    assert open_table(job.table).version == 1
    result = publish_job(job, accepted={"drift": "measured, and too small to matter"})
    assert result.version == 2
    assert open_table(job.table).manifest.gates["drift"]["accepted"] == "measured, and too small to matter"


def test_what_a_precision_is_known_to_move_is_no_drift(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = published(folder, vector_type="float16")
    compute_otherwise(monkeypatch, 1.0001)
    assert run_job(job).version == 2


def test_it_can_be_turned_off(folder: Path) -> None:
    job = published(folder, reembed={"drift": 0})
    run_job(job)
    assert "drift" not in open_table(job.table).manifest.gates


def test_unchanged_images_that_cannot_be_read_any_more_hold_nothing_up(folder: Path) -> None:
    """Their shards are as they were listed, and turn out to be another at the first read."""
    job = published(folder)
    for shard in (folder / "shards").glob("000*.tar"):
        stat = shard.stat()
        data = shard.read_bytes()
        shard.write_bytes(data[:1024] + b"\1" * (len(data) - 1024))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_job(job).version == 2
    assert "drift" not in open_table(job.table).manifest.gates


def test_unchanged_images_that_are_all_rejects_hold_nothing_up(folder: Path) -> None:
    for shard in (folder / "shards").glob("000*.tar"):
        shard.write_bytes(tar_of([("none.png", b"no image")]))
    job = published(folder, max_rejects=1.0)
    assert run_job(job).version == 2
    assert "drift" not in open_table(job.table).manifest.gates
