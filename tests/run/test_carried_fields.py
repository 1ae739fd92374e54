"""A carried field that no sample has stops a run before it writes anything; how many samples lack one is a figure."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import job_of, read_rows, run_here, tiny_recipe
from lora_embed.errors import ConfigError
from lora_embed.run.job import run_job
from lora_embed.run.plan import plan_job
from samples import png, tar_of


def write_labelled(folder: Path, labels: list[str | None], name: str = "a") -> Path:
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.png", png(number)), (f"{number}.json", json.dumps({"label": label}).encode())]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.tar").write_bytes(tar_of(members))
    return folder


@pytest.mark.parametrize(
    ("field", "says"),
    [
        (
            "lable",
            "carry names lable: of the first 2 samples of 1 shard, none has that field. .* Did you mean 'label'",
        ),
        ("label:int64", "none has it as int64, but as 'cat'. Carry it as text: label"),
    ],
)
def test_a_field_that_no_sample_has_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, says: str
) -> None:
    run_here(monkeypatch)
    job = job_of(tmp_path, tiny_recipe(tmp_path), write_labelled(tmp_path / "shards", ["cat", None]), carry=[field])
    with pytest.raises(ConfigError, match=says):
        run_job(job)
    with pytest.raises(ConfigError, match=says):
        plan_job(job)
    assert not (tmp_path / "table" / "staging").exists()
    name, _, kind = field.partition(":")
    optional = job.model_copy(update={"carry": (job.carry[0].model_copy(update={"optional": True}),)})
    assert run_job(optional).published, (name, kind)


def test_samples_that_lack_a_field_are_counted_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    job = job_of(
        tmp_path, tiny_recipe(tmp_path), write_labelled(tmp_path / "shards", ["cat", None, "dog"]), carry=["label", "folder"]
    )
    assert run_job(job).published
    rows = read_rows(tmp_path / "table").sort_by("id")
    assert rows["label"].to_pylist() == ["cat", None, "dog"]
    assert rows["folder"].to_pylist() == ["shards"] * 3
    (record,) = (tmp_path / "table" / "runs").glob("*/record.json")
    assert json.loads(record.read_text())["lacking"] == {"label": 1}
    assert "Embedded samples without a carried field: label 1." in record.with_name("report.html").read_text()


@pytest.mark.parametrize("carry", [["label"], ["label", {"name": "hint", "optional": True}]], ids=["alone", "beside optional"])
def test_a_table_that_has_the_column_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], carry: list[Any]
) -> None:
    run_here(monkeypatch)
    recipe = tiny_recipe(tmp_path)
    assert run_job(job_of(tmp_path, recipe, write_labelled(tmp_path / "shards", ["cat"]), carry=carry)).published
    (tmp_path / "shards" / "a.tar").unlink()
    write_labelled(tmp_path / "shards", [None, None], "b")
    job = job_of(tmp_path, recipe, tmp_path / "shards", carry=carry, max_removed=1.0)
    assert run_job(job).version == 2
    said = capfd.readouterr().err
    assert "carry names label: of the first 2 samples of 1 shard, all that have this field have null there." in said
    assert "Did you mean" not in said
    assert read_rows(tmp_path / "table")["label"].to_pylist() == [None, None]
