"""Write a FAISS index of a table's vectors with a file of their ids, and open it for search."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lora_embed.errors import ConfigError
from lora_embed.search.index import (
    DESCRIPTION,
    FAISS_FILE,
    HIT_COLUMNS,
    IDS,
    IDS_FILE,
    Hit,
    IndexDescription,
    Nearest,
    Vectors,
    damage_named,
)
from lora_embed.search.index_files import check_faiss, check_ids
from lora_embed.vectors.rows import unit, vectors_of

if TYPE_CHECKING:
    from lora_embed.table.read import Table

SAMPLE_BYTES = 256 * 2**20  # most bytes of vectors that an IVF index is trained on
# Fewest points per list for which FAISS's k-means does not warn, and the most that it uses.
POINTS_PER_LIST = (39, 256)
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 200, 128
Empty = Callable[[Any, "Table", int], tuple[Any, dict[str, Any]]]  # FAISS, table, seed → an empty index, its parameters


def write_faiss(empty: Empty, faiss: Any, table: "Table", folder: Path, seed: int) -> tuple[int, dict[str, Any]]:
    """Write vectors scaled to length 1, whose inner product is the cosine, and a file of ids: row n is position n."""
    index, parameters = empty(faiss, table, seed)
    with pq.ParquetWriter(folder / IDS_FILE, IDS, compression="zstd", use_dictionary=["shard"]) as ids:
        for batch in table.batches([*HIT_COLUMNS, "embedding"]):
            index.add(unit(vectors_of(batch)))
            ids.write_batch(batch.select(HIT_COLUMNS).cast(IDS))  # one row group, so that looking up a hit reads little
    try:
        faiss.write_index(index, str(folder / FAISS_FILE))
    except RuntimeError as error:  # for example a full disk
        raise OSError(str(error)) from None
    return index.ntotal, parameters


def _flat(faiss: Any, table: "Table", seed: int) -> tuple[Any, dict[str, Any]]:
    return faiss.IndexFlatIP(table.dimension), {}


def _ivf(faiss: Any, table: "Table", seed: int) -> tuple[Any, dict[str, Any]]:
    """An index that is trained: its lists are found by k-means of a sample."""
    least, most = POINTS_PER_LIST
    affordable = min(table.count, max(1, SAMPLE_BYTES // (4 * table.dimension)))
    lists = max(1, min(round(4 * math.sqrt(table.count)), affordable // least))
    sample = draw_sample(table, min(affordable, lists * most), seed)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(table.dimension), table.dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.min_points_per_centroid = seed, 1  # no warning for a table with fewer than `least` vectors
    index.train(sample)
    index.nprobe = min(lists, max(8, round(2 * math.sqrt(lists))))
    return index, {"lists": lists, "probes": index.nprobe, "trained_on": len(sample), "seed": seed}


def _hnsw(faiss: Any, table: "Table", seed: int) -> tuple[Any, dict[str, Any]]:
    index = faiss.IndexHNSWFlat(table.dimension, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
    return index, {"links": HNSW_LINKS, "ef_construction": HNSW_BUILD, "ef_search": HNSW_SEARCH}


EMPTY: dict[str, Empty] = {"faiss-flat": _flat, "faiss-ivf": _ivf, "faiss-hnsw": _hnsw}


def draw_sample(table: "Table", size: int, seed: int) -> Vectors:
    """Draw `size` of a table's vectors uniformly by seed, scaled to length 1: (size, d)."""
    rows = np.sort(np.random.default_rng(seed).choice(table.count, size, replace=False))
    sample = np.empty((size, table.dimension), np.float32)
    start = 0
    for batch in table.batches(["embedding"]):
        first, end = np.searchsorted(rows, [start, start + batch.num_rows])
        sample[first:end] = vectors_of(batch)[rows[first:end] - start]
        start += batch.num_rows
    return unit(sample)


def open_faiss(faiss: Any, folder: Path, description: IndexDescription) -> Nearest:
    with damage_named(folder):
        check_faiss(folder / FAISS_FILE, description.kind, description.count, description.dimension)
        check_ids(pq.ParquetFile(folder / IDS_FILE), IDS)
        ids = pq.ParquetFile(folder / IDS_FILE, read_dictionary=HIT_COLUMNS)  # so that memory holds a repeated value once
        index = faiss.read_index(str(folder / FAISS_FILE))
    if not index.ntotal == ids.metadata.num_rows == description.count or index.d != description.dimension:
        raise ConfigError(
            f"{folder}: holds {index.ntotal} vectors of {index.d} dimensions and {ids.metadata.num_rows} ids, but its "
            f"{DESCRIPTION} says {description.count} vectors of {description.dimension}. Export it again."
        )
    ends = np.cumsum([ids.metadata.row_group(group).num_rows for group in range(ids.num_row_groups)])

    def nearest(queries: Vectors, k: int) -> list[list[Hit]]:
        if description.kind == "faiss-hnsw":
            index.hnsw.efSearch = max(HNSW_SEARCH, k)
        scores, positions = index.search(queries, min(k, description.count))
        rows = _rows_at(ids, ends, set(positions[positions >= 0].tolist()))
        return [
            [Hit(score=float(score), **rows[int(place)]) for score, place in zip(*pair, strict=True) if place >= 0]
            for pair in zip(scores, positions, strict=True)
        ]

    return nearest


def _rows_at(ids: pq.ParquetFile, ends: NDArray[np.int64], positions: set[int]) -> dict[int, dict[str, Any]]:
    """Id, shard and key at each position, read from those row groups that hold one of the positions."""
    rows_at: dict[int, dict[str, str]] = {}
    places = np.array(sorted(positions), np.int64)
    groups = np.searchsorted(ends, places, side="right")
    for group in np.unique(groups).tolist():
        places_in_group = places[groups == group]
        start = int(ends[group - 1]) if group else 0
        rows = ids.read_row_group(group).take(pa.array(places_in_group - start)).to_pylist()
        rows_at |= dict(zip(places_in_group.tolist(), rows, strict=True))
    return rows_at
