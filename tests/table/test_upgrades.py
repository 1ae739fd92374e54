"""Tables that older commits wrote are read and gone on with; what a newer release has written is read, or says what to do."""

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs import run_here
from lora_embed import open_table
from lora_embed.cli.main import run_command
from lora_embed.config.models import load_job
from lora_embed.errors import EncoderError, TableError
from lora_embed.model.golden import relative_difference
from lora_embed.run.job import run_job
from lora_embed.schema import FORMAT
from lora_embed.store.store import Store
from lora_embed.table.lineage import forget
from lora_embed.table.status import describe_table
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import roll_back
from old_table import COMMITS, TABLES
from samples import encoded, noise

FORGOTTEN = {"b0781d5": set(), "ccc375e": {"a.tar/001"}}
# Rejects, which are decoded again: the first told local files apart by seconds, not nanoseconds, so all shards are new.
ANEW = {"b0781d5": 9, "ccc375e": 0}


@pytest.fixture(params=sorted(COMMITS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What lies around a table and the table itself, as that commit left them."""
    with tarfile.open(TABLES) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(f"{request.param}/")]
        tar.extractall(tmp_path, members, filter="data")
    return tmp_path / request.param


def ids_of(*shards: str) -> set[str]:
    """Those of images, as `old_table.write_table` numbered them."""
    firsts, counts = {"a": 0, "b": 10, "c": 20}, {"a": 5, "b": 5, "c": 6}
    return {f"{name}.tar/{firsts[name] + n:03d}" for name in shards for n in range(counts[name])}


def vectors_of(folder: Path) -> dict[str, bytes]:
    """By plain pyarrow."""
    manifest = json.loads(max((folder / "table" / "versions").iterdir()).read_text())
    rows = [row for entry in manifest["files"] for row in pq.read_table(folder / "table" / entry["path"]).to_pylist()]
    return {row["id"]: np.array(row["embedding"], np.float32).tobytes() for row in rows}


def array_of(vectors: dict[str, bytes], ids: list[str]) -> NDArray[np.float32]:
    return np.array([np.frombuffer(vectors[id_], np.float32) for id_ in ids])


def image_of(id_: str) -> Image.Image:
    return Image.open(io.BytesIO(encoded(noise(6, 5, seed=int(id_[-3:])))))


def test_it_is_read_verified_and_searched(folder: Path, tmp_path: Path) -> None:
    uri = str(folder / "table")
    table, state = open_table(uri), describe_table(uri)
    forgotten = FORGOTTEN[folder.name]
    assert (state.version, sum(state.staged.values()), state.forgotten) == (1 + len(forgotten), 2, len(forgotten))
    verify_table(table)
    rows = table.to_dataset().to_table().to_pylist()
    assert {row["id"] for row in rows} == ids_of("a", "b") - forgotten
    assert [row["label"] for row in rows] == [str(int(row["key"]) % 2) for row in rows]
    assert set(table.rejects()["id"].to_pylist()) == {"a.tar/bad", "b.tar/bad"} | forgotten
    batches = list(table.batches(["id", "embedding"]))
    assert sum(batch.num_rows for batch in batches) == table.count == len(rows)

    embedded = table.encoder().embed([image_of(row["id"]) for row in rows])
    kept = np.array([row["embedding"] for row in rows], np.float32)
    assert relative_difference(embedded, kept) <= (1e-3 if table.manifest.pins["vector_type"] == "float16" else 1e-5)
    image_of(rows[0]["id"]).save(tmp_path / "query.png")
    for command in (["status"], ["verify"], ["search"], ["explain"]):
        more = {"search": [str(tmp_path / "query.png")], "explain": [rows[0]["id"]]}.get(command[0], [])
        assert run_command([*command, uri, *more]) == 0


def test_the_next_night_goes_on_from_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    job, before, version = load_job(folder / "job.yaml"), vectors_of(folder), open_table(str(folder / "table")).version
    space = open_table(job.table).space_id
    result = run_job(job, replaces=True)
    assert (result.published, result.version, result.space_id) == (True, version + 1, space)
    assert result.embedded == ANEW[folder.name]
    after = vectors_of(folder)
    assert after.keys() == before.keys() | ids_of("c")
    if ANEW[folder.name]:  # by another processor than the one that wrote the table: its vectors differ in their last digits
        assert relative_difference(*(array_of(vectors, sorted(before)) for vectors in (after, before))) <= 1e-5
    else:
        assert {id_: after[id_] for id_ in before} == before
    assert not list((folder / "table" / "staging").rglob("*.parquet"))
    verify_table(open_table(job.table))
    assert not run_job(job, replaces=True).published
    forget(Store(job.table), ["c.tar/020"], "its owner asked")
    with pytest.raises(TableError, match="images that were forgotten after it was published"):
        roll_back(Store(job.table), version, "too old")


def test_parts_of_a_layout_that_is_no_more_are_left_alone_and_go_after_the_grace_period(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch)
    [part, _] = (folder / "table" / "staging").rglob("*.parquet")
    old = part.parent.rename(part.parent.with_name("0" * 12))
    for path in old.iterdir():
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    job = load_job(folder / "job.yaml", ["retain={versions: 10, grace_days: 1}"])
    assert run_job(job, replaces=True).embedded == (ANEW[folder.name] or 7)
    assert len(list(old.iterdir())) == 2
    (folder / "shards" / "c.tar").unlink()
    run_job(load_job(folder / "job.yaml", ["retain={versions: 10, grace_days: 0.01}", "max_removed=1.0"]), replaces=True)
    assert not old.exists() or not list(old.iterdir())


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_a_table_of_the_next_format_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    job, newest = load_job(folder / "job.yaml"), max((folder / "table" / "versions").iterdir())
    says = rf"has format {FORMAT + 1}, but this release of lora-embed \(.*\) reads format {FORMAT} only. Use a newer release"
    (folder / "table" / "table.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(TableError, match=f"table.json: {says}"):
        run_job(job, replaces=True)
    assert open_table(job.table).count, "its manifest says that it can be read"
    edit(newest, lambda manifest: manifest.update(format=FORMAT + 1))
    for act in (lambda: open_table(job.table), lambda: describe_table(job.table)):
        with pytest.raises(TableError, match=rf"{newest.name}: {says}"):
            act()


def test_what_a_newer_release_adds_is_passed_over_by_readers_and_kept_from_writers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch)
    job, newest = load_job(folder / "job.yaml"), max((folder / "table" / "versions").iterdir())

    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][0]["crc"] = 1
        manifest["files"][0]["shards"][0]["hue"] = "blue"

    edit(newest, add)
    verify_table(open_table(job.table))
    store, before = Store(job.table), newest.read_bytes()
    for act in (
        lambda: run_job(job, replaces=True),
        lambda: forget(store, ["b.tar/010"], "no"),
        lambda: roll_back(store, 1, "no"),
    ):
        with pytest.raises(
            TableError, match=r"written by a newer release of lora-embed. It has the field 'crc', .* Reading works"
        ):
            act()
    assert max((folder / "table" / "versions").iterdir()).read_bytes() == before

    [encoder] = (folder / "table" / "encoders").iterdir()
    edit(encoder / "encoder.json", lambda found: found.update(gamma=2.2))
    with pytest.raises(EncoderError, match="a newer release of lora-embed wrote it, with the key 'gamma'"):
        open_table(job.table).encoder()
    shutil.rmtree(encoder)


def test_the_stored_tables_are_small() -> None:
    assert TABLES.stat().st_size < 110_000
