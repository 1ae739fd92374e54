"""Real vectors: what tables and indexes of them hold, find and cost; the figures of docs/readers.md."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from documented import bits, documented, expected_ids, run_documented
from lora_embed.config.models import load_recipe
from lora_embed.demo.parts import LabelledImage
from lora_embed.errors import ConfigError
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.search.export import KINDS, export_index, open_index
from lora_embed.search.index import Hit, Index
from lora_embed.search.search import search_table
from lora_embed.table.read import Table
from lora_embed.vectors.rows import unit
from tables import publish_vectors, spread

EVERY = 3  # of the demo's images: about 1,270
ROUNDS = 7
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
    with pytest.raises(ConfigError, match=r"space 5ace5ace5ace, but the query was made by an encoder of space 0therspace00"):
        indexes[kind].search(real_vectors[:1], 3, "0therspace00")


@pytest.mark.parametrize(
    ("vector_type", "value_bytes", "most"), [("float32", 4, 0.87), pytest.param("float16", 2, 0.95, marks=pytest.mark.slow)]
)
def test_bytes_of_a_vector_and_read_throughput(
    vector_type: str, value_bytes: int, most: float, real_vectors: NDArray[np.float32], tmp_path: Path
) -> None:
    stored = publish_vectors(tmp_path / "small", spread(real_vectors, 1), vector_type=vector_type)
    size = pq.ParquetFile(stored.files[0]).metadata.row_group(0).column(1).total_compressed_size / stored.count
    raw = real_vectors.shape[1] * value_bytes
    print(f"\n{vector_type}: {size:.0f} bytes a vector of {raw}")
    assert size < most * raw
    many = np.concatenate([real_vectors * (1 + n / 100) for n in range(30)])  # scaled: none compresses as a copy of another
    large = publish_vectors(tmp_path / "large", spread(many, 12), vector_type=vector_type, shards_per_file=3)
    columns = ["id", "embedding"]
    reads: dict[str, Callable[[], Any]] = {
        "plain pyarrow": lambda: [pq.read_table(path, columns=columns) for path in large.files],
        "to_dataset": lambda: large.to_dataset().to_table(columns=columns),
        "batches": lambda: list(large.batches(columns)),
    }
    seconds = in_turn(reads)
    print(f"reading {large.count:,} ids and vectors, medians of {ROUNDS} rounds, against plain pyarrow in the same round:")
    for name, taken in seconds.items():
        wall, core = large.count / np.median(taken, axis=0) / 1000
        wall_share, core_share = np.median(seconds["plain pyarrow"] / taken, axis=0)
        print(f"  {name:14} thousands a second {wall:.0f} ({wall_share:.2f}), a second of a core {core:.0f} ({core_share:.2f})")
        assert wall_share > 0.3
        assert core_share > 0.6


def in_turn(reads: dict[str, Callable[[], Any]]) -> dict[str, NDArray[np.float64]]:
    """Seconds and CPU seconds (rounds, 2) of each, alternating, so that all meet the same load; after a round to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in reads}
    for _ in range(ROUNDS + 1):
        for name, read in reads.items():
            started, core_started = time.perf_counter(), time.process_time()
            read()
            seconds[name].append((time.perf_counter() - started, time.process_time() - core_started))
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}
