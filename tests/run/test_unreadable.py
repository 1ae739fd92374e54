"""A file that cannot be read stops a version, is named, and can be left out; a trial leaves nothing behind."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed.chain.items import WorkItem
from lora_embed.errors import IncompleteRun
from lora_embed.run.job import run_job
from lora_embed.run.work import places_to_leave_out
from lora_embed.schema import ChunkHead
from lora_embed.shards.listing import list_shards
from lora_embed.table.status import describe_table
from samples import png


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


def test_a_tar_that_is_cut_is_named_and_the_rest_published_without_it(tmp_path: Path, recipe: Path) -> None:
    source = write_tars(tmp_path / "in", shards=4, images=5)
    cut = source / "0002.tar"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:2000])
    with pytest.raises(IncompleteRun) as caught:
        run_job(job_of(tmp_path, recipe, source))
    said = str(caught.value)
    assert said.startswith("1 of 4 shards is not complete, so nothing was published.")
    assert f"with leave_out: [{cut}] in the job, they are counted as passed over" in said
    assert f"\n  {cut}: incomplete tar, cut short at 2000 bytes" in said
    assert caught.value.advice == "correct or leave out what it names, then run it again"

    with pytest.raises(IncompleteRun, match=r"^1 of 1 shard is not complete.*leave_out: \["):  # it alone is missing
        run_job(job_of(tmp_path, recipe, source))
    result = run_job(job_of(tmp_path, recipe, source, leave_out=[str(cut)]))
    assert (result.published, result.counts["vectors"], result.passed_over) == (True, 15, {"left out": 1})

    cut.write_bytes(whole)  # the next run takes it in
    result = run_job(job_of(tmp_path, recipe, source))
    assert (result.embedded, result.counts["vectors"]) == (5, 20)


def test_where_most_shards_fail_none_is_to_be_left_out(tmp_path: Path, recipe: Path) -> None:
    source = write_tars(tmp_path / "in", shards=3, images=5)
    for name in ("0000.tar", "0002.tar"):
        (source / name).write_bytes((source / name).read_bytes()[:2000])
    with pytest.raises(IncompleteRun) as caught:
        run_job(job_of(tmp_path, recipe, source))
    assert "2 of 3 shards are not complete" in str(caught.value)
    assert "leave_out" not in str(caught.value)
    assert caught.value.advice == IncompleteRun.advice


def test_of_loose_images_the_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "in" / "abc"[number // 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "abc"[number // 2] / f"{number}.png").write_bytes(png(number))
    work = [WorkItem(shard=shard) for shard in list_shards((str(tmp_path / "in"),), {})]
    locked = f"{tmp_path}/in/b/3.png"
    named = {
        f"{locked}: access denied (Permission denied). Check its permissions or keys.": {locked},
        "s3://elsewhere/3.png: access denied": set(),  # not a file of this input
    }
    for error, places in named.items():
        failed = ChunkHead(shard_id=work[1].shard.id, shard_name="b", prefix="b", error=error)
        assert places_to_leave_out({work[1].shard.id: failed}, work) == places
        assert places_to_leave_out({work[1].shard.id: replace(failed, may_pass=True)}, work) == set()


def test_a_trial_leaves_no_parts_and_removes_no_others(tmp_path: Path, recipe: Path) -> None:
    source = write_tars(tmp_path / "in", shards=2, images=5)
    run_job(job_of(tmp_path, recipe, source), publishes=False)
    staged = describe_table(str(tmp_path / "table")).staged
    assert sum(staged.values()) == 2
    source = write_tars(tmp_path / "in", shards=4, images=5)
    trial = run_job(job_of(tmp_path, recipe, source, limit=7))
    assert (trial.embedded, trial.version) == (7, None)
    assert describe_table(str(tmp_path / "table")).staged == staged
