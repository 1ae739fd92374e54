"""A column that a release has added is null in rows that an older release wrote, whatever reads or rewrites them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lance
import pyarrow.parquet as pq
import pytest

from jobs import job_of, run_here, tiny_recipe
from lora_embed.config.models import JobConfig
from lora_embed.errors import VerificationFailed
from lora_embed.run.job import run_job
from lora_embed.search.export import export_index, open_index
from lora_embed.search.search import search_table
from lora_embed.store.store import Store
from lora_embed.table.lineage import explain_row, forget
from lora_embed.table.read import Table, open_table
from lora_embed.table.verify import verify_table
from models import edit_tensors
from samples import png, tar_of

ADDED = {"height", "label", "detail"}  # as if an older release had not known them


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobConfig:
    """Published, in this process: 3 shards of 8 images with labels and a reject each, in one data file."""
    run_here(monkeypatch)
    write_shards(tmp_path / "shards", 0, 1, 2)
    job = job_of(tmp_path, tiny_recipe(tmp_path), tmp_path / "shards", carry=["label"], max_rejects=0.5, chunk_size=4)
    run_job(job)
    return job


def write_shards(folder: Path, *numbers: int) -> None:
    """Tars of 8 labelled images each, and a file that is no image."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        members = [("bad.png", b"no image")]
        for image in range(8):
            members += [(f"{image}.png", png(8 * number + image)), (f"{image}.json", b'{"label": "%d"}' % (image % 2))]
        (folder / f"{number}.tar").write_bytes(tar_of(members))


def age(table: Path, paths: list[Path], columns: set[str] = ADDED) -> None:
    """Write files of a table again without some columns, and correct the newest manifest, if it names them."""
    newest = max((table / "versions").iterdir())
    manifest = json.loads(newest.read_text())
    for path in paths:
        rows = pq.read_table(path)
        pq.write_table(rows.drop_columns(sorted(columns & set(rows.column_names))), path)
        for entry in manifest["files"] + manifest["rejects"]:
            if entry["path"] == path.relative_to(table).as_posix():
                data = path.read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    newest.write_text(json.dumps(manifest))


def files_in(job: JobConfig, folder: str) -> list[Path]:
    return sorted(Path(job.table, folder).rglob("*.parquet"))


def rows_by_id(table: Table) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for batch in table.batches(table.schema.names) for row in batch.to_pylist()}


def test_a_table_without_the_columns_is_read_exported_and_searched(job: JobConfig, tmp_path: Path) -> None:
    before = open_table(job.table)
    complete, rejects = rows_by_id(before), before.rejects()
    assert all(row["height"] and row["label"] is not None for row in complete.values())
    assert rejects.num_rows == 3
    assert rejects["detail"].null_count == 0
    age(Path(job.table), files_in(job, "data") + files_in(job, "rejects"))

    table = open_table(job.table)
    verify_table(table)
    expected = {id_: row | {"height": None, "label": None} for id_, row in complete.items()}
    assert rows_by_id(table) == expected
    assert {row["id"]: row for row in table.to_dataset().to_table().to_pylist()} == expected
    some = list(complete)[:3]
    assert table.rows(some).to_pylist() == [expected[id_] for id_ in some]
    assert table.rows(some, ["label"]).to_pylist() == [{"id": id_, "label": None} for id_ in some]
    assert [batch.to_pylist() for batch in table.batches(["height"], rows=100)] == [[{"height": None}] * len(complete)]
    assert table.rejects().schema == rejects.schema
    assert table.rejects()["detail"].null_count == 3
    assert explain_row(table, some[0]).shard == "0.tar"

    vectors = table.rows(some, ["embedding"])["embedding"].combine_chunks().flatten().to_numpy().reshape(3, -1)
    hits = search_table(table, vectors, 1)
    for kind in ("faiss-flat", "lance"):
        export_index(table, kind, tmp_path / kind)
        nearest = open_index(tmp_path / kind).search(vectors, 1, table.space_id)
        assert [hit[0].id for hit in nearest] == [hit[0].id for hit in hits] == some
    assert set(lance.dataset(str(tmp_path / "lance" / "vectors.lance")).to_table()["label"].to_pylist()) == {None}


def test_nights_and_forgetting_rewrite_such_files_and_parts(job: JobConfig, tmp_path: Path) -> None:
    """The data file holds three shards, of which one goes; one more shard was staged by the older release, one is new."""
    old = rows_by_id(open_table(job.table))
    write_shards(tmp_path / "shards", 3)
    run_job(job, publishes=False)
    age(Path(job.table), files_in(job, "data") + files_in(job, "rejects") + files_in(job, "staging"))
    write_shards(tmp_path / "shards", 4)
    (tmp_path / "shards" / "2.tar").unlink()
    result = run_job(job.model_copy(update={"max_removed": 0.5}))
    assert (result.version, result.embedded) == (2, 9)

    table = open_table(job.table)
    verify_table(table)
    rows = rows_by_id(table)
    known = {(row["shard"], row["height"] is not None, row["label"] is not None) for row in rows.values()}
    assert known == {("0.tar", False, False), ("1.tar", False, False), ("3.tar", False, False), ("4.tar", True, True)}
    kept = [id_ for id_ in old if id_ in rows]
    assert [rows[id_]["embedding"] for id_ in kept] == [old[id_]["embedding"] for id_ in kept]
    details = {row["shard"]: row["detail"] is not None for row in table.rejects().to_pylist()}
    assert details == {"0.tar": False, "1.tar": False, "3.tar": False, "4.tar": True}

    age(Path(job.table), files_in(job, "data") + files_in(job, "rejects"))
    assert forget(Store(job.table), [kept[0]], "its owner asked").images == 1
    table = open_table(job.table)
    verify_table(table)
    assert rows_by_id(table).keys() == rows.keys() - {kept[0]}
    assert [row for row in table.rejects().to_pylist() if row["id"] == kept[0]] == [
        {"id": kept[0], "shard": "0.tar", "key": old[kept[0]]["key"], "reason": "forgotten", "detail": None}
    ]


def test_a_sample_is_judged_whose_parts_two_releases_staged(job: JobConfig) -> None:
    edit_tensors(Path(job.recipe).parent / "ten", lambda tensors: {n: t * 1.2 for n, t in tensors.items()})
    run_job(job, replaces=True, publishes=False)
    age(Path(job.table), files_in(job, "staging")[:2])
    result = run_job(job, replaces=True)
    assert (result.version, result.published, result.embedded) == (2, True, 0)
    verify_table(open_table(job.table))


def test_a_column_that_may_not_be_null_is_not_made_up(job: JobConfig) -> None:
    age(Path(job.table), files_in(job, "data"), {"key"})
    table = open_table(job.table)
    for read in (lambda: list(table.batches(["key"])), lambda: table.rows(["0.tar/0"], ["key"])):
        with pytest.raises(VerificationFailed, match="is damaged, or lora-embed did not write it"):
            read()
    with pytest.raises(VerificationFailed, match="is damaged, or lora-embed did not write it"):
        forget(Store(job.table), [next(iter(table.batches(["id"]))).to_pylist()[0]["id"]], "its owner asked")
