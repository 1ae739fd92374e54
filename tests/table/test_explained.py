"""What commands say of single images and versions: rejects, forgotten images, rollbacks, and their reasons."""

from pathlib import Path

import pytest

from jobs import job_of, run_here, tiny_recipe
from lora_embed.cli.main import run_command
from lora_embed.config.models import JobConfig
from lora_embed.run.job import run_job
from samples import png, tar_of


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Three images and a text that is named like one."""
    run_here(monkeypatch)
    (tmp_path / "shards").mkdir()
    members = [(f"{number}.png", png(number)) for number in range(3)] + [("text.png", b"not an image")]
    (tmp_path / "shards" / "a.tar").write_bytes(tar_of(members))
    return job_of(tmp_path, tiny_recipe(tmp_path), tmp_path / "shards", max_rejects=1.0)


def said(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run_command(list(command)) == code
    out, err = capsys.readouterr()
    return out + err


def test_a_run_names_its_rejects(job: JobConfig) -> None:
    result = run_job(job)
    assert (result.embedded, result.rejected) == (4, 1)
    head, reject = result.describe().splitlines()
    assert "; embedded 4 samples (1 reject among them) in " in head
    assert reject.startswith("  reject a.tar/text: not_an_image, 12 bytes of text")


def test_many_rejects_are_counted_after_the_first(job: JobConfig, tmp_path: Path) -> None:
    members = [(f"{number}.png", b"no image") for number in range(9)]
    (tmp_path / "shards" / "a.tar").write_bytes(tar_of(members))
    lines = run_job(job).describe().splitlines()
    assert len(lines) == 5
    assert lines[-1] == "  and 6 more rejects, which the report of the run counts by reason"


def test_explain_says_what_became_of_an_image_without_a_vector(job: JobConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(job)
    text = said(capsys, "explain", job.table, "a.tar/text", code=2)
    assert "version 1 has no vector with the id 'a.tar/text': the image is a reject, not_an_image (12 bytes of text" in text
    text = said(capsys, "explain", job.table, "a.tar/nobody", code=2)
    assert "no vector with the id 'a.tar/nobody', and no reject either. Correct the id" in text
    text = said(capsys, "forget", job.table, "a.tar/1", "--why", "asked by its owner")
    assert (
        "version 2 is published without 1 image. No later version will hold it.\nRetired, because they held it: versions 1."
        in text
    )
    text = said(capsys, "explain", job.table, "a.tar/1", code=2)
    assert "no vector with the id 'a.tar/1': the image was forgotten, and no later version will hold it." in text
    assert "          made to forget 1 image: asked by its owner\n" in said(capsys, "status", job.table)


def test_status_says_that_a_version_is_a_rollback_and_why(
    job: JobConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(job)
    (tmp_path / "shards" / "b.tar").write_bytes(tar_of([("9.png", png(9))]))
    run_job(job)
    assert "rollback to" not in said(capsys, "status", job.table)
    said(capsys, "rollback", job.table, "--to", "1", "--why", "the new camera")
    assert "          a rollback to version 1: the new camera\n" in said(capsys, "status", job.table)
    run_job(job)
    assert "rollback to" not in said(capsys, "status", job.table)
