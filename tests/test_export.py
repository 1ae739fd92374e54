"""Readers and indexes: each made or read with its own library, and compared bit for bit with what was written."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from jobs import ROOT
from lora_embed import cli
from lora_embed.config import load_recipe
from lora_embed.demo.parts import LabelledImage
from lora_embed.errors import ConfigError, VerificationFailed
from lora_embed.export import KINDS, Hit, Index, export_index, open_index, unit
from lora_embed.model.build import build_encoder, gather
from lora_embed.model.encoder import load_encoder
from lora_embed.search import search_table
from lora_embed.table import Table
from tables import noise_vectors, publish_vectors, spread

EVERY = 3  # of the demo's images: about 1,270
APPROXIMATE = ("faiss-ivf", "faiss-hnsw")


@pytest.fixture(scope="module")
def real_vectors(
    tmp_path_factory: pytest.TempPathFactory, base_model: Path, real_adapters: dict[str, Path], real_images: list[LabelledImage]
) -> NDArray[np.float32]:
    """Vectors (n, 384) of real images under two real adapters merged."""
    folder = tmp_path_factory.mktemp("encoder")
    adapters = [{"path": str(path), "weight": 0.5} for path in real_adapters.values()]
    recipe = {"base_model": str(base_model), "adapters": adapters, "image_size": 56}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    build_encoder(gather(load_recipe(folder / "recipe.yaml")), folder / "encoder", lambda line: None)
    encoder = load_encoder(folder / "encoder", check=False)
    return encoder.embed([Image.open(image.path) for image in real_images[::EVERY]])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, real_vectors: NDArray[np.float32]) -> Table:
    """Those vectors published in 13 shards and 5 files."""
    return publish_vectors(tmp_path_factory.mktemp("real") / "table", spread(real_vectors, 13), shards_per_file=3)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory, table: Table) -> dict[str, Index]:
    """One of each kind."""
    folder = tmp_path_factory.mktemp("indexes")
    for kind in KINDS:
        export_index(table, kind, folder / kind)
    return {kind: open_index(folder / kind) for kind in KINDS}


def expected_ids(table: Table) -> list[str]:
    return [str(name) for path in table.files for name in pq.read_table(path, columns=["id"]).column("id").to_pylist()]


def bits(vectors: Any) -> bytes:
    return np.ascontiguousarray(vectors).tobytes()


def documented(heading: str) -> list[str]:
    """The Python blocks of a section of docs/readers.md; "" for those before the first heading."""
    sections = re.split(r"^#+ (.*)$", (ROOT / "docs" / "readers.md").read_text(), flags=re.MULTILINE)
    section = sections[sections.index(heading) + 1]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def run_documented(block: str, table: Table, names: dict[str, Any] | None = None, **paths: str) -> dict[str, Any]:
    """What a block of the page leaves in its variables; its table and paths are replaced by those of the test."""
    for name, path in {'"tables/products"': json.dumps(table.store.uri), **paths}.items():
        block = block.replace(name, path)
    namespace = dict(names or {})
    exec(block, namespace)
    return namespace


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
@pytest.mark.parametrize("reader", ["pyarrow", "Hugging Face datasets", "DuckDB"])
def test_documented_readers_give_every_id_and_vector_bit_for_bit(
    reader: str, vector_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    written = noise_vectors(100).astype(vector_type)
    table = publish_vectors(tmp_path / "table", spread(written, 5), vector_type=vector_type, shards_per_file=2)
    names = run_documented(documented("Readers and indexes")[0], table) | {"vectors": written}
    if (reader, vector_type) == ("DuckDB", "float16"):
        import duckdb

        with pytest.raises(duckdb.Error, match="BYTE_STREAM_SPLIT"):  # as the page says: once this passes, mend the page
            run_documented(documented(reader)[0], table, names)
        return
    names = run_documented(documented(reader)[0], table, names)
    ids = names["rows"]["id"]
    assert list(ids if isinstance(ids, np.ndarray) else map(str, ids)) == expected_ids(table)
    if reader == "DuckDB":
        assert bits(np.stack(names["rows"].column("embedding").to_numpy())) == bits(written)
        assert [row[0] for row in names["nearest"]] == [hit.id for hit in search_table(table, written[:1], 10)[0]]
    elif reader == "pyarrow":
        assert bits(names["vectors"]) == bits(written)
    else:  # with_format("numpy") gives float32; what it holds is as it was
        assert bits(names["vectors"].astype(vector_type)) == bits(written)


def test_documented_python_reads_batches_and_rows(table: Table) -> None:
    names = run_documented(documented("Python, a few columns, a few rows")[0], table, {"table": table})
    assert names["some"].column_names == ["embedding", "label"]
    assert names["some"]["label"].to_pylist() == [3, 110 - len(table.rows([f"0000.tar/{n:06d}" for n in range(200)]))]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lance"])
def test_faiss_holds_every_vector_at_length_one_bit_for_bit(
    kind: str, table: Table, indexes: dict[str, Index], real_vectors: NDArray[np.float32]
) -> None:
    import faiss

    folder = indexes[kind].folder
    index = faiss.read_index(str(folder / "index.faiss"))
    if kind == "faiss-ivf":
        index.make_direct_map()
    assert index.ntotal == table.count == len(real_vectors)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert bits(index.reconstruct_n(0, index.ntotal)) == bits(unit(real_vectors))
    ids = pq.read_table(folder / "ids.parquet")
    assert ids.column("id").to_pylist() == expected_ids(table)
    assert ids.column("shard").to_pylist() == [name.partition("/")[0] for name in expected_ids(table)]


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


def test_an_index_says_what_it_is_of(table: Table, indexes: dict[str, Index]) -> None:
    for kind, index in indexes.items():
        about = json.loads((index.folder / "index.json").read_text())
        assert (about["table"], about["version"], about["space_id"]) == (table.store.uri, 1, table.space_id)
        assert (about["kind"], about["dimension"], about["count"], about["metric"]) == (kind, 384, table.count, "cosine")
        assert about["library_version"]


def recall(found: list[list[str]], exact: list[list[str]]) -> float:
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, exact, strict=True)]))


def test_recall_at_10_on_real_vectors(table: Table, indexes: dict[str, Index], real_vectors: NDArray[np.float32]) -> None:
    queries = real_vectors[::5]
    exact = [[hit.id for hit in hits] for hits in search_table(table, queries, 10)]
    print(f"\nrecall at 10, {len(queries)} queries, {table.count} real vectors of 384 dimensions")
    for kind, index in indexes.items():
        started = time.perf_counter()
        found = index.search(queries, 10, table.space_id)
        each_ms = (time.perf_counter() - started) / len(queries) * 1000
        share = recall([[hit.id for hit in hits] for hits in found], exact)
        print(f"  {kind:10} {share:.4f}  {each_ms:.2f} ms a query  {index.description.parameters}")
        assert share >= (0.9 if kind in APPROXIMATE else 0.999)
        near = max(abs(hits[0].score - 1) for hits in found)
        assert near < 1e-5, "every query is in the table"


@pytest.mark.parametrize("kind", ["faiss-flat", "lance"])
def test_an_exact_index_finds_what_the_table_does(
    kind: str, table: Table, indexes: dict[str, Index], real_vectors: NDArray[np.float32]
) -> None:
    queries = real_vectors[:50]
    for mine, exact in zip(indexes[kind].search(queries, 10, table.space_id), search_table(table, queries, 10), strict=True):
        np.testing.assert_allclose([hit.score for hit in mine], [hit.score for hit in exact], atol=2e-6)
        last = exact[-1].score + 4e-6  # beyond it no tie up to rounding decides who is in
        assert set(names_of(mine, last)) >= set(names_of(exact, last + 2e-6))


def names_of(hits: list[Hit], above: float) -> list[tuple[str, str, str]]:
    return [(hit.id, hit.shard, hit.key) for hit in hits if hit.score > above]


def test_documented_use_of_indexes(table: Table, real_vectors: NDArray[np.float32], tmp_path: Path) -> None:
    export_index(table, "faiss-flat", tmp_path / "index")
    export_index(table, "lance", tmp_path / "lance")
    ours, by_faiss, by_lancedb = documented("Indexes")
    names = {"table": table, "vectors": real_vectors}
    paths = {'"index': f'"{tmp_path}/index', '"lance-index"': f'"{tmp_path}/lance"'}
    found = run_documented(ours, table, names, **paths)
    assert [[hit.id for hit in hits] for hits in found["hits"]] == [[hit.id for hit in hits] for hits in found["exact"]]
    exact = [hit.id for hit in found["exact"][0]]
    assert run_documented(by_faiss, table, names, **paths)["names"] == exact
    lance = run_documented(by_lancedb, table, names, **paths)
    queries = real_vectors[::5]
    near = [lance["opened"].search(query).distance_type("cosine").nprobes(8).limit(10).to_list() for query in queries]
    all_exact = [[hit.id for hit in hits] for hits in search_table(table, queries, 10)]
    share = recall([[row["id"] for row in rows] for rows in near], all_exact)
    print(f"\nLance IVF_FLAT by LanceDB, 32 partitions of which 8 are probed: recall at 10 {share:.4f}")
    assert share >= 0.9
    assert set(lance["names"]) & set(exact)
    assert open_index(tmp_path / "lance").search(real_vectors[:1], 1, table.space_id)[0][0].score > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_of_another_space_is_refused(kind: str, indexes: dict[str, Index], real_vectors: NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match=r"space 5ace5ace5ace, the query was made by an encoder of space 0therspace00"):
        indexes[kind].search(real_vectors[:1], 3, "0therspace00")


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
    "no kind of index": ("faiss-ivfpq", lambda folder: None),
    "is there already and not an empty directory": ("faiss-flat", used_directory),
    "is there already": ("lance", lambda folder: (folder / "out").write_text("a file")),
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


@pytest.mark.parametrize("kind", ["faiss-flat", "lance"])
def test_a_missing_library_is_named_with_its_remedy(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, kind.partition("-")[0], None)  # as if it were not installed
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(5), 1))
    with pytest.raises(ConfigError, match=r"is not installed .*pip install 'lora-embed\[indexes\]'"):
        export_index(table, kind, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_fails_midway_leaves_nothing(kind: str, tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(50), 4))
    Path(table.files[-1]).unlink()
    with pytest.raises(VerificationFailed, match="is gone, though the version refers to it"):
        export_index(table, kind, tmp_path / "out")
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
    with pytest.raises(ConfigError, match=r"cannot be read|no index|is damaged|another format|holds 5 vectors"):
        open_index(folder)


def test_the_command_writes_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(30), 2))
    publish_vectors(tmp_path / "table", spread(noise_vectors(40), 2), space_id="0ther0ther00")
    where = [table.store.uri, "--to", "faiss-hnsw", "--json"]
    assert cli.run_command(["export", *where, "--out", str(tmp_path / "now")]) == 0
    now = json.loads(capsys.readouterr().out)
    assert (now["version"], now["space_id"], now["count"]) == (2, "0ther0ther00", 40)
    assert cli.run_command(["export", *where, "--out", str(tmp_path / "then"), "--version", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 30
    assert cli.run_command(["export", *where, "--out", str(tmp_path / "then")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_read_throughput_and_bytes_of_a_vector(
    table: Table, real_vectors: NDArray[np.float32], tmp_path: Path, real_images: list[LabelledImage]
) -> None:
    sizes = {}
    for kind in ("float32", "float16"):
        stored = publish_vectors(tmp_path / kind, spread(real_vectors, 1), vector_type=kind)
        group = pq.ParquetFile(stored.files[0]).metadata.row_group(0)
        sizes[kind] = group.column(1).total_compressed_size / stored.count
    raw = real_vectors.shape[1]
    print(f"\nbytes a vector of {raw} dimensions: float32 {sizes['float32']:.0f} of {raw * 4}, ", end="")
    print(f"float16 {sizes['float16']:.0f} of {raw * 2}")
    assert sizes["float32"] < raw * 4
    assert sizes["float16"] < raw * 2
    large = publish_vectors(tmp_path / "large", spread(np.tile(real_vectors, (30, 1)), 12), shards_per_file=3)
    rates = {
        "plain pyarrow": best_rate(large, lambda: [pq.read_table(path, columns=["id", "embedding"]) for path in large.files]),
        "table.to_dataset": best_rate(large, lambda: large.to_dataset().to_table(columns=["id", "embedding"])),
        "table.batches": best_rate(large, lambda: list(large.batches(["id", "embedding"]))),
    }
    print(f"read throughput, {large.count:,} vectors: ", ", ".join(f"{name} {rate:,.0f}/s" for name, rate in rates.items()))
    assert min(rates.values()) > 0.3 * rates["plain pyarrow"]


def best_rate(table: Table, read: Callable[[], Any]) -> float:
    """Vectors a second, the best of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - started)
    return table.count / min(seconds)
