"""The table on storage without a cluster: parts, completeness, versions, compaction, and what verify notices."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lora_embed.errors import TableError, VerificationFailed
from lora_embed.gates.checks import Gate
from lora_embed.schema import ChunkHead, Part, Shard, sample_schema
from lora_embed.store.store import Store
from lora_embed.table.compact import SMALL_FILES, Reuse, Source, compact, cut_shard, make_manifest, plan_compactions, plan_reuse
from lora_embed.table.lineage import forget
from lora_embed.table.manifest import Manifest, ShardCounts
from lora_embed.table.parts import make_part, to_parquet, write_part
from lora_embed.table.read import Table, open_table
from lora_embed.table.staging import VerifiedShard, clear_absorbed, is_complete, part_paths, staged_parts, verify_parts
from lora_embed.table.status import describe_table
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import commit_version, read_manifest, refuse_gone
from samples import layout

SPACE = "5ace5ace5ace"
LAYOUT = layout(chunk_size=3)


def part_of(shard: str, chunk: int, last: bool) -> Part:
    return Part(shard_id=shard, chunk=chunk, last=last)


def stage(store: Store, shard_id: str, name: str, samples: int, rejects: int = 0) -> list[Part]:
    """Parts of a shard whose first `rejects` samples are bad."""
    parts = []
    for start in range(0, max(samples, 1), LAYOUT.chunk_size):
        numbers = range(start, min(start + LAYOUT.chunk_size, samples))
        rows = [{"key": f"{number}", "reason": "empty" if number < rejects else None, "detail": None} for number in numbers]
        last = start + LAYOUT.chunk_size >= samples
        good = sum(number >= rejects for number in numbers)
        head = ChunkHead(
            shard_id=shard_id, shard_name=name, prefix=name, chunk=start // LAYOUT.chunk_size, last=last, good=good
        )
        batch = pa.RecordBatch.from_pylist(rows, schema=sample_schema(()))
        vectors = np.array([[number, 1.0] for number in numbers if number >= rejects], np.float32).reshape(-1, 2)
        write_part(store, SPACE, LAYOUT, head, make_part(head, batch, vectors, LAYOUT))
        parts.append(head.part)
    return parts


def shard_of(shard_id: str, name: str) -> Shard:
    return Shard(id=shard_id, name=name, prefix=name, kind="tar", root="/input", files=())


def publish(store: Store, version: int, staged: dict[str, VerifiedShard], reuse: Reuse, names: dict[str, str]) -> Manifest:
    sources = []
    for shard_id, verified in staged.items():
        parts = staged_parts(store, SPACE, LAYOUT.layout_id)[shard_id]
        sources += cut_shard(shard_of(shard_id, names[shard_id]), verified, part_paths(SPACE, LAYOUT, parts), 8)
    tasks = plan_compactions([*reuse.sources, *sources], LAYOUT, SPACE, 2)
    written = [compact(store, task) for task in tasks]
    about: dict[str, Any] = {"gates": {}, "pins": LAYOUT.pins, "lineage": {}}
    manifest = make_manifest(version, SPACE, 2, written, reuse, **about)
    assert commit_version(store, manifest)
    return manifest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A table of two shards at version 1, of which the first has one reject."""
    store = Store(str(tmp_path / "table"))
    store.create(f"encoders/{SPACE}/encoder.json", b"{}")
    parts = {"aa": stage(store, "aa", "a.tar", 7, rejects=1), "bb": stage(store, "bb", "b.tar", 2)}
    staged = {shard: verify_parts(store, SPACE, LAYOUT, of_shard) for shard, of_shard in parts.items()}
    publish(store, 1, staged, plan_reuse(None, set()), {"aa": "a.tar", "bb": "b.tar"})
    return store


@pytest.mark.parametrize("name", ["x-y.parquet", "aa-1.parquet", "aa-00000001-last.txt", "aa-00000001-first.parquet", "notes"])
def test_a_stray_file_is_no_part(name: str) -> None:
    assert Part.parse(name) is None


def test_many_small_files_are_put_together_and_a_few_are_left_alone(store: Store) -> None:
    names, files = {"aa": "a.tar", "bb": "b.tar"}, []
    current = read_manifest(store)
    for night in range(2, 14):
        shard_id, name = f"{night:04x}", f"night{night:02d}.tar"
        names[shard_id] = name
        before = {entry.path for entry in current.files} if current else set()
        stats = verify_parts(store, SPACE, LAYOUT, stage(store, shard_id, name, 4, rejects=night % 2))
        current = publish(store, night, {shard_id: stats}, plan_reuse(current, set(names)), names)
        files.append(len(current.files))
        assert len(before - {entry.path for entry in current.files}) in (0, SMALL_FILES)
    assert max(files) == SMALL_FILES
    assert current is not None
    assert {shard.name for shard in current.shards.values()} == set(names.values())
    verify_table(open_table(store.uri))


def test_a_part_is_its_name() -> None:
    for part in (part_of("0af3", 12, False), part_of("0af3", 0, True)):
        assert Part.parse(part.name) == part


def test_a_shard_is_complete_when_its_parts_reach_a_proven_last_one_without_a_gap() -> None:
    assert is_complete([part_of("aa", 0, False), part_of("aa", 1, True)])
    assert not is_complete([])
    assert not is_complete([part_of("aa", 0, False), part_of("aa", 1, False)])
    assert not is_complete([part_of("aa", 0, False), part_of("aa", 2, True)])


def test_parts_that_a_version_has_not_absorbed_stay_staged(store: Store) -> None:
    """They may be of another run that goes on beside."""
    parts = stage(store, "cc", "c.tar", 7)
    assert staged_parts(store, SPACE, LAYOUT.layout_id).keys() == {"aa", "bb", "cc"}
    manifest = read_manifest(store)
    assert manifest is not None
    clear_absorbed(store, manifest, LAYOUT)
    assert staged_parts(store, SPACE, LAYOUT.layout_id) == {"cc": parts}


def test_vectors_and_rejects_are_published_apart(store: Store) -> None:
    table = open_table(store.uri)
    rows = table.to_dataset().to_table().sort_by("id").to_pylist()
    assert [row["id"] for row in rows] == [f"a.tar/{n}" for n in range(1, 7)] + ["b.tar/0", "b.tar/1"]
    assert rows[2]["embedding"] == [3.0, 1.0]
    assert [(row["id"], row["reason"]) for row in table.rejects().to_pylist()] == [("a.tar/0", "empty")]
    assert table.manifest.counts == {"shards": 2, "samples": 9, "vectors": 8, "rejects": 1}
    verify_table(table)


@pytest.mark.parametrize("hint", [b"1\n", b"", b"7", b"not a number", None])
def test_the_current_version_is_found_whatever_the_hint_says(store: Store, hint: bytes | None) -> None:
    store.create("versions/notes.txt", b"stray")
    if hint is None:
        store.delete(["CURRENT"])
    else:
        store.replace("CURRENT", hint)
    first = read_manifest(store)
    assert first is not None
    assert first.version == 1
    store.create("versions/00000002.json", replace(first, version=2).to_json())
    second = read_manifest(store)
    assert second is not None
    assert second.version == 2


def test_a_version_has_one_winner(store: Store) -> None:
    first = read_manifest(store)
    assert first is not None
    assert not commit_version(store, replace(first, space_id="other"))
    assert read_manifest(store) == first


@pytest.mark.parametrize("kind", ["files", "rejects"])
def test_a_version_whose_files_are_gone_is_not_created(store: Store, kind: str) -> None:
    manifest = read_manifest(store)
    assert manifest is not None
    refuse_gone(store, manifest)
    (gone,) = getattr(manifest, kind)
    store.delete([gone.path])
    with pytest.raises(VerificationFailed, match=rf"{gone.path}: is missing, .* \(missing in all: 1\)"):
        refuse_gone(store, manifest)


def test_unchanged_files_are_reused_and_rows_of_touched_ones_copied(store: Store) -> None:
    first = read_manifest(store)
    assert first is not None
    whole = plan_reuse(first, {"aa", "bb"})
    assert whole.files == first.files
    assert not whole.sources
    parts = stage(store, "cc", "c.tar", 4)
    reuse = plan_reuse(first, {"aa", "cc"})
    assert [[shard.id for shard in source.shards] for source in reuse.sources] == [["aa"]]
    second = publish(store, 2, {"cc": verify_parts(store, SPACE, LAYOUT, parts)}, reuse, {"cc": "c.tar"})
    assert second.counts == {"shards": 2, "samples": 11, "vectors": 10, "rejects": 1}
    verify_table(open_table(store.uri))
    verify_table(open_table(store.uri, version=1))
    rows = open_table(store.uri).to_dataset().to_table().sort_by("id").to_pylist()
    assert [row["id"] for row in rows if row["shard"] == "a.tar"] == [f"a.tar/{n}" for n in range(1, 7)]


def test_parts_of_another_layout_or_with_a_gap_are_noticed(store: Store) -> None:
    parts = staged_parts(store, SPACE, LAYOUT.layout_id)["aa"]
    assert verify_parts(store, SPACE, LAYOUT, parts).vectors == 6
    with pytest.raises(VerificationFailed, match="its footer says"):
        verify_parts(store, SPACE, LAYOUT, [parts[0], parts[2]])
    other = layout(chunk_size=3, precision="bfloat16")
    for part in parts:
        moved = store.read(part_paths(SPACE, LAYOUT, [part])[0])
        store.create(part_paths(SPACE, other, [part])[0], moved or b"")
    with pytest.raises(VerificationFailed, match="layout_id"):
        verify_parts(store, SPACE, other, parts)


def test_verify_notices_damage(store: Store) -> None:
    path = Path(store.full_path(open_table(store.uri).manifest.files[0].path))
    whole = path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(VerificationFailed, match=r"another SHA-256 than the \d+ bytes in the manifest"):
            verify_table(open_table(store.uri))
    path.unlink()
    with pytest.raises(VerificationFailed, match="is missing"):
        verify_table(open_table(store.uri))


def test_verify_notices_counts_that_do_not_add_up(store: Store) -> None:
    table = open_table(store.uri)
    (entry,) = table.manifest.files
    first, *others = entry.shards
    wrong = replace(entry, shards=(replace(first, vectors=first.vectors + 1), *others))
    with pytest.raises(VerificationFailed, match="rows per shard differ"):
        verify_table(Table(store, replace(table.manifest, files=(wrong,))))


def test_verify_notices_an_id_in_two_files(store: Store) -> None:
    """Each file alone is as its manifest says; a copy of it holds the same ids under another shard's record."""
    table = open_table(store.uri)
    (entry,) = table.manifest.files
    rows = pq.read_table(store.full_path(entry.path)).filter(pc.equal(pc.field("key"), "3"))
    data = to_parquet(rows)
    record = replace(entry.shards[0], id="zz", samples=1, vectors=1, rejects=0)
    store.create("data/again.parquet", data)
    again = replace(
        entry, path="data/again.parquet", rows=1, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), shards=(record,)
    )
    with pytest.raises(VerificationFailed, match=r"1 id occurs in more than one data file: a\.tar/3"):
        verify_table(Table(store, replace(table.manifest, files=(entry, again))))


def test_compaction_refuses_rows_that_are_not_what_was_verified(store: Store) -> None:
    counts = ShardCounts(id="bb", name="b.tar", samples=3, vectors=3, rejects=0)
    parts = part_paths(SPACE, LAYOUT, staged_parts(store, SPACE, LAYOUT.layout_id)["bb"])
    (task,) = plan_compactions([Source(shards=(counts,), parts=parts)], LAYOUT, SPACE, 2)
    with pytest.raises(VerificationFailed, match="has 2 vectors and 0 rejects, expected 3 and 0"):
        compact(store, task)


def test_files_hold_whole_shards_up_to_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_embed.table.compact.DATA_FILE_BYTES", 100)
    shards = [ShardCounts(id=f"{n}", name=f"{n}.tar", samples=5, vectors=5, rejects=0) for n in range(5)]
    tasks = plan_compactions([Source(shards=(shard,), parts=("p",)) for shard in shards], LAYOUT, SPACE, 2)
    assert [[source.shards[0].name for source in task.sources] for task in tasks] == [
        ["0.tar", "1.tar", "2.tar"],
        ["3.tar", "4.tar"],
    ]


def spanning(store: Store, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Version 2: beside `a` and `b` a shard of 42 samples, 3 of them bad, whose rows take three files."""
    monkeypatch.setattr("lora_embed.table.compact.DATA_FILE_BYTES", 80)  # ten vectors
    parts = stage(store, "cc", "c.tar", 42, rejects=3)
    reuse = plan_reuse(read_manifest(store), {"aa", "bb", "cc"})
    return publish(store, 2, {"cc": verify_parts(store, SPACE, LAYOUT, parts)}, reuse, {"cc": "c.tar"})


def test_a_shard_may_span_data_files_and_is_one_shard_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = spanning(store, monkeypatch)
    holding = [shard for entry in manifest.files for shard in entry.shards if shard.id == "cc"]
    assert [(shard.start, shard.samples) for shard in holding] == [(0, 21), (21, 18), (39, 3)]
    assert manifest.shards["cc"] == ShardCounts(id="cc", name="c.tar", samples=42, vectors=39, rejects=3)
    assert manifest.counts == {"shards": 3, "samples": 51, "vectors": 47, "rejects": 4}
    opened = open_table(store.uri)
    verify_table(opened)
    assert opened.manifest == manifest
    ids = opened.to_dataset().to_table(columns=["id"]).column("id").to_pylist()
    assert [id_ for id_ in ids if id_.startswith("c.tar")] == [f"c.tar/{number}" for number in range(3, 42)]
    assert opened.rows(["c.tar/41", "c.tar/3"], ["id"]).column("id").to_pylist() == ["c.tar/41", "c.tar/3"]
    assert opened.rejects().num_rows == 4
    whole = plan_reuse(manifest, {"aa", "bb", "cc"})
    assert (set(whole.files), set(whole.rejects), whole.sources) == (set(manifest.files), set(manifest.rejects), ())


def test_an_older_release_does_not_publish_where_a_shard_spans_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their records hold `start`, which it does not know; all other manifests are written as it writes them."""
    assert b'"start"' not in (store.read("versions/00000001.json") or b"")
    spanning(store, monkeypatch)
    assert (store.read("versions/00000002.json") or b"").count(b'"start"') == 2, "of three files, the first begins at 0"


def test_forgetting_in_a_shard_that_spans_files_leaves_all_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spanning(store, monkeypatch)
    store.create(f"encoders/{SPACE}/merge_report.json", b"{}")
    forget(store, ["c.tar/5", "c.tar/28", "c.tar/40", "b.tar/1"], "asked")
    opened = open_table(store.uri)
    verify_table(opened)
    assert opened.manifest.counts == {"shards": 3, "samples": 51, "vectors": 43, "rejects": 8}
    assert opened.manifest.shards["cc"] == ShardCounts(id="cc", name="c.tar", samples=42, vectors=36, rejects=6)
    ids = set(opened.to_dataset().to_table(columns=["id"]).column("id").to_pylist())
    assert len(ids) == 43
    assert not ids & {"c.tar/5", "c.tar/28", "c.tar/40", "b.tar/1"}


def test_a_shard_that_spans_files_goes_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = spanning(store, monkeypatch)
    third = publish(store, 3, {}, plan_reuse(manifest, {"aa", "bb"}), {})
    verify_table(open_table(store.uri))
    assert third.counts == {"shards": 2, "samples": 9, "vectors": 8, "rejects": 1}


def test_a_data_file_has_at_most_twice_its_size_and_small_row_groups(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes together: one that was close to twice the size before gets nothing more."""
    monkeypatch.setattr("lora_embed.table.compact.DATA_FILE_BYTES", 100)
    monkeypatch.setattr("lora_embed.table.compact.ROW_GROUP_BYTES", 16)
    shards = [ShardCounts(id=f"{n}", name=f"{n}.tar", samples=n, vectors=n, rejects=0) for n in (12, 24, 13, 11, 25, 1)]
    tasks = plan_compactions([Source(shards=(shard,), data="d") for shard in shards], LAYOUT, SPACE, 2)
    assert max(task.vector_bytes for task in tasks) <= 200
    assert sum(task.vector_bytes for task in tasks) == 8 * (12 + 24 + 13 + 11 + 25 + 1)
    parts = stage(store, "dd", "d.tar", 9)
    manifest = publish(store, 2, {"dd": verify_parts(store, SPACE, LAYOUT, parts)}, plan_reuse(None, set()), {"dd": "d.tar"})
    (entry,) = manifest.files
    metadata = pq.read_metadata(store.full_path(entry.path))
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2, 2, 2, 2, 1]
    assert Table(store, manifest).rows(["d.tar/7"]).column("embedding").to_pylist() == [[7.0, 1.0]]


def test_an_absent_table_or_version_is_named(tmp_path: Path, store: Store) -> None:
    with pytest.raises(TableError, match="has no published version"):
        open_table(str(tmp_path / "nowhere"))
    with pytest.raises(TableError, match="has no version 5"):
        open_table(store.uri, version=5)


def test_status_shows_the_gates_of_the_current_version(store: Store) -> None:
    """Those that held in one line; those that a person let through by their sentence and the reason."""
    checked = [
        Gate(name="rejects", value=0.0, limit=0.01, direction="at most", says="0 of 9 new samples cannot be embedded"),
        Gate(name="spread", value=0.15695, limit=0.001, direction="at least", says="the mean distance is 0.16"),
        Gate(name="norms", value=float("inf"), limit=2.0, direction="at most", says="the median length was 0"),
        Gate(name="processor", value=2.0, limit=0.0, direction="at most", says="images are prepared in another way: …"),
    ]
    gates = {gate.name: gate.to_dict() | ({} if gate.holds else {"accepted": "the new camera"}) for gate in checked}
    first = read_manifest(store)
    assert first is not None
    older = {"removed": {"value": 0.25, "limit": 0.5}}  # as the first tables have it
    assert commit_version(store, replace(first, version=2, gates=gates | older))
    state = describe_table(store.uri)
    lines = state.describe().splitlines()
    assert "gates     3 passed: rejects 0 ≤ 0.01, spread 0.157 ≥ 0.001, removed 0.25 ≤ 0.5" in lines
    assert "accepted  norms not finite, at most 2 (the new camera): the median length was 0" in lines
    assert "accepted  processor 2, at most 0 (the new camera): images are prepared in another way: …" in lines
    assert state.gates["spread"]["value"] == 0.15695  # for --json, as the manifest has them


def test_a_damaged_manifest_is_one_message(store: Store) -> None:
    store.replace("versions/00000001.json", b"{")
    with pytest.raises(TableError, match=r"versions/00000001\.json: is damaged"):
        open_table(store.uri)


def test_data_files_are_plain_parquet_with_split_and_compressed_vectors(store: Store) -> None:
    file = pq.ParquetFile(store.full_path(open_table(store.uri).manifest.files[0].path))
    names = [file.schema_arrow.field(n).name for n in range(len(file.schema_arrow))]
    assert names == ["id", "embedding", "shard", "key", "width", "height", "sha256"]
    assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float not null>[2]"
    column = file.metadata.row_group(0).column(1)
    assert (column.compression, "BYTE_STREAM_SPLIT" in column.encodings) == ("ZSTD", True)
