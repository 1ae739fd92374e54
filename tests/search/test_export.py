"""Indexes: made, refused and damaged; what they hold of real vectors is in `test_real_vectors.py`."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pytest

from documented import bits, expected_ids
from lora_embed.cli import main
from lora_embed.errors import ConfigError, VerificationFailed
from lora_embed.installed import how_to_install
from lora_embed.search.export import KINDS, export_index, import_library, open_index
from lora_embed.table.read import Table
from tables import noise_vectors, publish_vectors, spread


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_lance_holds_every_row_bit_for_bit(tmp_path: Path, vector_type: str) -> None:
    import lance
    import lancedb

    written = noise_vectors(300).astype(vector_type)
    table = publish_vectors(tmp_path / "table", spread(written, 7), vector_type=vector_type, shards_per_file=2)
    export_index(table, "lance", tmp_path / "index")
    for rows in (
        lancedb.connect(tmp_path / "index").open_table("vectors").to_arrow(),
        lance.dataset(str(tmp_path / "index" / "vectors.lance")).to_table(),
    ):
        assert rows.column_names == ["id", "vector", "shard", "key", "label"]
        assert rows["id"].to_pylist() == expected_ids(table)
        assert bits(np.stack(rows["vector"].to_numpy())) == bits(written.astype(np.float32))
        assert rows.select(["shard", "key", "label"]) == pq_rows(table, ["shard", "key", "label"], rows.schema)


def pq_rows(table: Table, columns: list[str], schema: pa.Schema) -> pa.Table:
    return pds.dataset(table.files).to_table(columns=columns).cast(pa.schema([schema.field(name) for name in columns]))


@pytest.mark.parametrize("kind", KINDS)
def test_more_hits_than_vectors_are_all_vectors(kind: str, tmp_path: Path) -> None:
    written = noise_vectors(5)
    table = publish_vectors(tmp_path / "table", spread(written, 2))
    export_index(table, kind, tmp_path / "index")
    (hits,) = open_index(tmp_path / "index").search(written[:1], 50, table.space_id)
    assert {hit.id for hit in hits} == set(expected_ids(table))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_the_same_seed_gives_the_same_ivf_index(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(500), 3))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        export_index(table, "faiss-ivf", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "index.faiss").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def empty_table(folder: Path) -> Table:
    return publish_vectors(folder / "empty", {"a.tar": ([], np.empty((0, 4), np.float32))})


def used_directory(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")


REFUSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "not a kind of index": ("faiss-ivfpq", lambda folder: None),
    "exists and is not an empty directory": ("faiss-flat", used_directory),
    "exists and is not": ("lance", lambda folder: (folder / "out").write_text("a file")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_export_that_cannot_be_is_refused_and_changes_nothing(message: str, tmp_path: Path) -> None:
    kind, prepare = REFUSED[message]
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(5), 1))
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        export_index(table, kind, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_without_vectors_has_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="version 1 holds no vectors"):
        export_index(empty_table(tmp_path), "faiss-flat", tmp_path / "out")


def test_the_help_names_every_kind(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main.run_command(["export", "--help"]) == 0
    *others, last = KINDS
    assert f"{', '.join(others)} or {last}." in " ".join(capsys.readouterr().out.split())


def test_a_library_that_no_kind_has_is_not_another_one() -> None:
    assert all(import_library(kind.library).__name__ == kind.library for kind in KINDS.values())
    with pytest.raises(ValueError, match="'usearch' is no library of indexes"):
        import_library("usearch")


@pytest.mark.parametrize("kind", ["faiss-flat", "lance"])
def test_a_missing_library_is_named_with_its_remedy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind.partition("-")[0], None)  # as if it were not installed
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(5), 1))
    with pytest.raises(ConfigError, match=f"is not installed .*{re.escape(how_to_install('indexes'))}"):
        export_index(table, kind, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_fails_midway_leaves_nothing(kind: str, tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(50), 4))
    Path(table.files[-1]).unlink()
    with pytest.raises(VerificationFailed, match="is missing, but the table needs it"):
        export_index(table, kind, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table"]


@pytest.mark.parametrize("more", [-1, 1])
def test_an_index_of_more_or_fewer_vectors_than_the_version_is_not_kept(more: int, tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(50), 4))
    counts = table.manifest.counts | {"vectors": 50 + more}
    with pytest.raises(VerificationFailed, match=f"its files hold 50 vectors, its manifest says {50 + more}"):
        export_index(Table(table.store, replace(table.manifest, counts=counts)), "faiss-flat", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table"]


def test_an_empty_directory_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_index(publish_vectors(tmp_path / "table", spread(noise_vectors(5), 1)), "faiss-flat", tmp_path / "out")
    assert open_index(tmp_path / "out").description.count == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["no index", "no description", "broken description", "another format", "other count"])
def test_a_damaged_index_is_one_message(kind: str, harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_index(publish_vectors(tmp_path / "table", spread(noise_vectors(5), 1)), kind, folder)
    about = json.loads((folder / "index.json").read_text())
    if harm == "no index":
        (folder / ("vectors.lance" if kind == "lance" else "index.faiss")).rename(tmp_path / "away")
    elif harm == "no description":
        (folder / "index.json").unlink()
    else:
        change = {"another format": {"format": 9}, "other count": {"count": 4}}.get(harm)
        (folder / "index.json").write_text(json.dumps(about | change) if change else "{")
    with pytest.raises(ConfigError, match=r"cannot be read|not an index|is damaged|another format|holds 5 vectors"):
        open_index(folder)


def test_the_command_writes_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(30), 2))
    publish_vectors(tmp_path / "table", spread(noise_vectors(40), 2), space_id="07be707be700")
    where = [table.store.uri, "--to", "faiss-hnsw", "--json"]
    assert main.run_command(["export", *where, "--out", str(tmp_path / "now")]) == 0
    now = json.loads(capsys.readouterr().out)
    assert (now["version"], now["space_id"], now["count"]) == (2, "07be707be700", 40)
    assert main.run_command(["export", *where, "--out", str(tmp_path / "then"), "--version", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 30
    assert main.run_command(["export", *where, "--out", str(tmp_path / "then")]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
