"""Reading a part of a table: given ids, given columns, one file at a time; how fast a large one opens."""

import gc
import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pytest

from lora_embed.errors import TableError, VerificationFailed
from lora_embed.schema import Shard
from lora_embed.search.export import export_index, import_library
from lora_embed.search.search import search_table
from lora_embed.store.store import READ_AHEAD, Store
from lora_embed.table.manifest import FileEntry, ShardCounts
from lora_embed.table.read import Table, open_table
from tables import SPACE, noise_vectors, publish_vectors, spread

POOLS: list[pa.MemoryPool] = []


class CountingStore(Store):
    """A store that notes which files are opened."""

    opened: list[str]

    def open(self, path: str, ahead: int = READ_AHEAD) -> BinaryIO:
        self.opened.append(path)
        return super().open(path, ahead)


def counting(table: Table) -> tuple[Table, list[str]]:
    store = CountingStore(table.store.uri)
    opened: list[str] = []
    object.__setattr__(store, "opened", opened)
    return Table(store, table.manifest), opened


@pytest.mark.slow
def test_memory_of_search_and_export_does_not_grow_with_the_table(tmp_path: Path) -> None:
    peaks: dict[str, list[float]] = {"search": [], "faiss-flat": [], "lance": []}
    for files in (20, 80):
        table = publish_vectors(tmp_path / f"{files}", spread(noise_vectors(files * 2000, 64), files))
        for work, found in peaks.items():
            found.append(peak_bytes(table, work, tmp_path / f"{files}-{work}") / 1e6)
    print("\nMB held by Python and Arrow for 10 MB of vectors in 20 files, and for 41 MB in 80: ", end="")
    print(", ".join(f"{work} {small:.1f}, {large:.1f}" for work, (small, large) in peaks.items()))
    assert all(large < 1.3 * small for small, large in peaks.values())


def peak_bytes(table: Table, work: str, out: Path) -> int:
    """Most bytes that numpy, Python and Arrow's default pool held beyond what they held before."""
    if work != "search":
        import_library(work.partition("-")[0])
    gc.collect()
    with arrow_pool() as pool:
        tracemalloc.start()
        try:
            if work == "search":
                search_table(table, noise_vectors(3, 64), 10)
            else:
                export_index(table, work, out)
            return tracemalloc.get_traced_memory()[1] + pool.max_memory()
        finally:
            tracemalloc.stop()


@contextmanager
def arrow_pool() -> Iterator[pa.MemoryPool]:
    """A pool of its own for what Arrow allocates meanwhile; kept for good, since what it gave out may outlive the block."""
    before = pa.default_memory_pool()
    POOLS.append(pa.proxy_memory_pool(before))
    pa.set_memory_pool(POOLS[-1])
    try:
        yield POOLS[-1]
    finally:
        pa.set_memory_pool(before)


def test_rows_of_given_ids_come_in_their_order_from_their_files_alone(tmp_path: Path) -> None:
    vectors = noise_vectors(400)
    table, opened = counting(publish_vectors(tmp_path / "table", spread(vectors, 40)))
    wanted = ["0031.tar/000315", "0002.tar/000021", "0031.tar/000311", "0002.tar/999999", "nowhere.tar/1", "0031.tar/000315"]
    rows = table.rows(wanted, ["id", "embedding"])
    assert rows.column("id").to_pylist() == ["0031.tar/000315", "0002.tar/000021", "0031.tar/000311", "0031.tar/000315"]
    assert np.stack(rows.column("embedding").to_numpy()).tobytes() == vectors[[315, 21, 311, 315]].tobytes()
    assert len(opened) == 2, "of 40 files"
    assert table.rows([]).num_rows == table.rows(["x"]).num_rows == 0
    assert table.rows(wanted[:1]).schema.names == table.schema.names
    assert table.rows(wanted[1:4], ["label"]).to_pylist() == [{"id": wanted[1], "label": 1}, {"id": wanted[2], "label": 1}]


def test_rows_of_loose_images_are_found_in_their_folders_groups(tmp_path: Path) -> None:
    def group(name: str, prefix: str, id_: str) -> Shard:
        return Shard(id=id_, name=name, prefix=prefix, kind="images", root="/", files=())

    groups = {"./#0000of0001": "", "a/#0000of0002": "a", "a/#0001of0002": "a", "a/b/#0000of0001": "a/b"}
    listed = tuple(group(name, prefix, f"{number:016x}") for number, (name, prefix) in enumerate(groups.items()))
    shards = {name: ([f"{number}.png"], noise_vectors(1, seed=number)) for number, name in enumerate(groups)}
    table, opened = counting(publish_vectors(tmp_path / "table", shards, listed=listed))
    assert table.rows(["a/2.png", "0.png", "a/b/3.png", "a/1.png"], ["id"]).column("id").to_pylist() == [
        "a/2.png", "0.png", "a/b/3.png", "a/1.png",
    ]  # fmt: skip
    opened.clear()
    assert table.rows(["a/b/3.png"]).num_rows == 1
    assert len(opened) == 4, "its own, and the groups of the folders above it, whose keys may hold slashes"


def test_rows_skips_row_groups_that_cannot_hold_an_id(tmp_path: Path) -> None:
    """65,536 rows of two shards in one file: only one of its two row groups is read."""
    vectors = noise_vectors(70_000, dimension=2)
    table = publish_vectors(tmp_path / "table", spread(vectors, 1))
    with arrow_pool() as pool:
        (row,) = table.rows(["0000.tar/069999"], ["key"]).to_pylist()
    assert row == {"id": "0000.tar/069999", "key": "069999"}
    assert pool.max_memory() < 2e6, "the first group's ids alone are more"


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(20_000, 256), 2))
    with arrow_pool() as pool:
        names = [batch.schema.names for batch in table.batches(["label", "key"])]
    assert set(map(tuple, names)) == {("label", "key")}
    assert pool.max_memory() < 4e6, "the vectors are 20 MB"
    with pytest.raises(TableError, match=r"has no column 'lable'. Choose from id, embedding, .*, label"):
        list(table.batches(["lable"]))
    with pytest.raises(TableError, match="has no column 'lable'"):
        table.rows(["a"], ["lable"])


def test_a_data_file_that_is_gone_is_named(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(9), 3))
    Path(table.files[1]).unlink()
    with pytest.raises(VerificationFailed, match=r"data/.*\.parquet: is missing, but the table needs it"):
        search_table(table, noise_vectors(1), 1)
    with pytest.raises(VerificationFailed, match="is missing"):
        table.rows(["0001.tar/000003"])


def test_a_table_of_ten_thousand_files_opens_fast(tmp_path: Path) -> None:
    """The manifest alone is read, 10 shards a file; a lookup then opens one file."""
    vectors = noise_vectors(10)
    small = publish_vectors(tmp_path / "table", {"012345.tar": ([f"{n:06d}" for n in range(10)], vectors)})
    (real,) = small.manifest.files
    files = []
    for number in range(10_000):
        names = [f"{10 * number + shard:06d}.tar" for shard in range(10)]
        shards = tuple(ShardCounts(id=f"{int(name[:6]):016x}", name=name, samples=1, vectors=1, rejects=0) for name in names)
        path = real.path if "012345.tar" in names else f"data/{SPACE}/{number:032x}.parquet"
        if path != real.path:
            os.link(small.files[0], small.store.full_path(path))
        files.append(FileEntry(path=path, rows=10, bytes=real.bytes, sha256="0" * 64, shards=shards))
    counts = {"shards": 100_000, "samples": 100_000, "vectors": 100_000, "rejects": 0}
    manifest = replace(small.manifest, version=2, files=tuple(files), counts=counts)
    data = manifest.to_json()
    small.store.create("versions/00000002.json", data)
    started = time.process_time()
    opened = open_table(small.store.uri)
    open_s = time.process_time() - started
    started = time.process_time()
    opened.to_dataset()
    dataset_s = time.process_time() - started
    table, files_opened = counting(opened)
    started = time.process_time()
    assert table.rows(["012345.tar/000007"], ["embedding"]).num_rows == 1
    first_s = time.process_time() - started
    started = time.process_time()
    assert table.rows(["012345.tar/000003"], ["embedding"]).num_rows == 1
    lookup_s = time.process_time() - started
    assert files_opened == [real.path] * 2
    print(f"\n10,000 files, 100,000 shards, a manifest of {len(data) / 1e6:.1f} MB: opened in {open_s:.2f} s, ", end="")
    print(f"as a dataset in {dataset_s:.2f} s, first lookup {first_s:.2f} s, then {lookup_s * 1000:.1f} ms")
    assert open_s < 5
    assert lookup_s < 0.5


def test_a_table_opens_by_a_path_and_shows_itself_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shards = {f"{number:06d}.tar": ([f"{number}"], noise_vectors(1)) for number in range(50)}
    table = publish_vectors(tmp_path / "table", shards)
    for place in (tmp_path / "table", str(tmp_path / "table"), "~/table", Path("~/table")):
        assert open_table(place).manifest == table.manifest
    line = f"<Table {tmp_path}/table: version 1, 50 vectors of {table.dimension} numbers, space {SPACE}>"
    assert repr(open_table("~/table")) == line
