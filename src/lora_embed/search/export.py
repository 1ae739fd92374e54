"""A table's vectors → an index to search: FAISS or Lance, made and opened by their own libraries."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from lora_embed.config.foreign import Count, parse_record
from lora_embed.errors import ConfigError, LoraEmbedError, StorageError, VerificationFailed
from lora_embed.schema import carry_fields
from lora_embed.search.index_files import check_faiss, check_ids, check_lance, check_plain
from lora_embed.store.aside import folder_aside
from lora_embed.store.store import Store
from lora_embed.vectors.rows import unit, vectors_of

if TYPE_CHECKING:
    from lora_embed.table.read import Table

KINDS = ("faiss-flat", "faiss-ivf", "faiss-hnsw", "lance")
DESCRIPTION, FAISS_FILE, IDS_FILE, LANCE_NAME = "index.json", "index.faiss", "ids.parquet", "vectors"
FORMAT = 1
HIT_COLUMNS = ["id", "shard", "key"]
_IDS = pa.schema([pa.field(name, pa.string(), nullable=False) for name in HIT_COLUMNS])
SAMPLE_BYTES = 256 * 2**20  # of vectors that an IVF index is trained on at most
# What FAISS's k-means takes at least, before it warns, and at most, before it leaves out the rest.
POINTS_PER_LIST = (39, 256)
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 200, 128

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One image that was found; `score` is the cosine similarity to the query."""

    id: str
    score: float
    shard: str
    key: str


Nearest = Callable[[Vectors, int], list[list[Hit]]]  # queries of length 1 (m, d) and k → the hits of each


@dataclass(frozen=True, kw_only=True)
class IndexDescription:
    """What `index.json` says: which version of which table the index is of, and how it was made."""

    kind: str
    table: str
    version: Count
    space_id: str
    dimension: Annotated[Count, Field(lt=2**20)]
    count: Count  # vectors
    library: str
    library_version: str
    parameters: dict[str, Any]
    metric: str = "cosine"
    format: int = field(default=FORMAT)


@dataclass(frozen=True)
class Index:
    """An index, open for search."""

    folder: Path
    description: IndexDescription
    nearest: Nearest = field(repr=False)

    def search(self, vectors: NDArray[Any], k: int, space_id: str) -> list[list[Hit]]:
        """Up to k hits for each query (m, d), best first; fewer where the index finds no more.

        `space_id` is that of the encoder that made the queries. Raises ConfigError when it is not the index's own.
        """
        about = self.description
        where = f"{self.folder}: the index of {about.table}, version {about.version},"
        refuse_other_space(where, about.space_id, space_id, "Export the table's current version again.")
        try:
            return self.nearest(unit_queries(vectors, about.dimension, k), k)
        except (RuntimeError, OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"{self.folder}: the index cannot be read ({_line(error)}). Export it again.") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def refuse_other_space(where: str, space_id: str, query_space: str, remedy: str) -> None:
    """Raises ConfigError when queries were made by an encoder of another space."""
    if query_space != space_id:
        raise ConfigError(
            f"{where} holds vectors of space {space_id}, the query was made by an encoder of space {query_space}: what "
            f"they say of each other means nothing. Use the encoder of space {space_id}. {remedy}"
        )


def unit_queries(vectors: NDArray[Any], dimension: int, k: int) -> Vectors:
    """Queries (m, d), scaled to length 1. Raises ConfigError for another shape, values not finite, or a k below 1."""
    queries = np.asarray(vectors, np.float32)
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ConfigError(f"queries have the shape {queries.shape}, expected (number of queries, {dimension})")
    if not np.isfinite(queries).all():
        raise ConfigError("a query holds NaN or infinity, which is near to nothing")
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    return unit(queries)


def export_index(table: "Table", kind: str, out: Path, seed: int = 0) -> IndexDescription:
    """Write an index of a table's version into a new directory, which is there only once it is whole.

    Raises ConfigError for an unknown kind, a library that is not installed, a directory in use or a table without
    vectors; VerificationFailed when the index does not hold as many vectors as the version.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no kind of index; expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    name = kind.partition("-")[0]
    library = import_library(name)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: is there already and not an empty directory. Name a new one, or remove it.")
    if not table.count:
        raise ConfigError(f"{table.store.uri}: version {table.version} holds no vectors, so there is nothing to index")
    Store(str(out.parent)).check_writable()
    try:
        with folder_aside(out) as aside:
            write = _write_lance if kind == "lance" else _write_faiss
            count, parameters = write(library, table, kind, aside, seed)
            if count != table.count:
                raise VerificationFailed(f"{table.store.uri}: its files hold {count} vectors, its manifest says {table.count}")
            description = IndexDescription(
                kind=kind,
                table=table.store.uri,
                version=table.version,
                space_id=table.space_id,
                dimension=table.dimension,
                count=count,
                library=name,
                library_version=library.__version__,
                parameters=parameters,
            )
            (aside / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {_line(error)}") from None
    return description


def open_index(folder: Path | str) -> Index:
    """Open what `export_index` wrote. Raises ConfigError where there is none, or it is damaged."""
    folder = Path(folder)
    description = _read_description(folder)
    library = import_library(description.kind.partition("-")[0])
    opened = _open_lance if description.kind == "lance" else _open_faiss
    return Index(folder, description, opened(library, folder, description))


def _read_description(folder: Path) -> IndexDescription:
    """Of a folder that holds regular files and folders alone."""
    try:
        check_plain(folder)
        description = parse_record(IndexDescription, (folder / DESCRIPTION).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: is no index: it has no {DESCRIPTION}. Make one with `lora-embed export`.") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{folder}/{DESCRIPTION}: is damaged ({error}). Export the index again.") from None
    if description.format != FORMAT or description.kind not in KINDS or description.metric != "cosine":
        raise ConfigError(
            f"{folder}/{DESCRIPTION}: is of another format than {FORMAT}, or of a kind that is none of {', '.join(KINDS)}. "
            "Export the index again."
        )
    return description


def import_library(name: str) -> Any:
    """FAISS or Lance. Raises ConfigError where it is not installed."""
    try:
        if name == "lance":
            import lance

            return lance
        import faiss

        return faiss
    except ImportError as error:
        raise ConfigError(f"{name} is not installed ({error}). Install it: pip install 'lora-embed[indexes]'") from None


def _write_faiss(faiss: Any, table: "Table", kind: str, folder: Path, seed: int) -> tuple[int, dict[str, Any]]:
    """Vectors of length 1, whose inner product is the cosine, in FAISS; ids beside them, row n for position n."""
    index, parameters = _new_faiss(faiss, table, kind, seed)
    with pq.ParquetWriter(folder / IDS_FILE, _IDS, compression="zstd", use_dictionary=["shard"]) as ids:
        for batch in table.batches([*HIT_COLUMNS, "embedding"]):
            index.add(unit(vectors_of(batch)))
            ids.write_batch(batch.select(HIT_COLUMNS).cast(_IDS))  # a row group each, so that a hit reads only that
    try:
        faiss.write_index(index, str(folder / FAISS_FILE))
    except RuntimeError as error:  # a full disk, say
        raise OSError(str(error)) from None
    return index.ntotal, parameters


def _new_faiss(faiss: Any, table: "Table", kind: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """An empty index, trained if need be, and what shapes it."""
    if kind == "faiss-flat":
        return faiss.IndexFlatIP(table.dimension), {}
    if kind == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(table.dimension, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
        return index, {"links": HNSW_LINKS, "ef_construction": HNSW_BUILD, "ef_search": HNSW_SEARCH}
    least, most = POINTS_PER_LIST
    affordable = min(table.count, max(1, SAMPLE_BYTES // (4 * table.dimension)))
    lists = max(1, min(round(4 * math.sqrt(table.count)), affordable // least))
    sample = draw_sample(table, min(affordable, lists * most), seed)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(table.dimension), table.dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.min_points_per_centroid = seed, 1  # fewer than `least` only in a table of fewer vectors
    index.train(sample)
    index.nprobe = min(lists, max(8, round(2 * math.sqrt(lists))))
    return index, {"lists": lists, "probes": index.nprobe, "trained_on": len(sample), "seed": seed}


def draw_sample(table: "Table", size: int, seed: int) -> Vectors:
    """`size` of a table's vectors, scaled to length 1, (size, d): each row as likely as any other, the same for a seed."""
    chosen = np.sort(np.random.default_rng(seed).choice(table.count, size, replace=False))
    sample = np.empty((size, table.dimension), np.float32)
    start = 0
    for batch in table.batches(["embedding"]):
        first, end = np.searchsorted(chosen, [start, start + batch.num_rows])
        sample[first:end] = vectors_of(batch)[chosen[first:end] - start]
        start += batch.num_rows
    return unit(sample)


def _open_faiss(faiss: Any, folder: Path, about: IndexDescription) -> Nearest:
    try:
        check_faiss(folder / FAISS_FILE, about.kind, about.count, about.dimension)
        check_ids(pq.ParquetFile(folder / IDS_FILE), _IDS)
        ids = pq.ParquetFile(folder / IDS_FILE, read_dictionary=HIT_COLUMNS)  # so that one long value stays one in memory
        index = faiss.read_index(str(folder / FAISS_FILE))
    except (RuntimeError, OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{folder}: the index cannot be read ({_line(error)}). Export it again.") from None
    if not index.ntotal == ids.metadata.num_rows == about.count or index.d != about.dimension:
        raise ConfigError(
            f"{folder}: holds {index.ntotal} vectors of {index.d} dimensions and {ids.metadata.num_rows} ids, its "
            f"{DESCRIPTION} says {about.count} of {about.dimension}. Export it again."
        )
    ends = np.cumsum([ids.metadata.row_group(group).num_rows for group in range(ids.num_row_groups)])

    def nearest(queries: Vectors, k: int) -> list[list[Hit]]:
        if about.kind == "faiss-hnsw":
            index.hnsw.efSearch = max(HNSW_SEARCH, k)
        scores, positions = index.search(queries, min(k, about.count))
        rows = _rows_at(ids, ends, set(positions[positions >= 0].tolist()))
        return [
            [Hit(score=float(score), **rows[int(place)]) for score, place in zip(*pair, strict=True) if place >= 0]
            for pair in zip(scores, positions, strict=True)
        ]

    return nearest


def _rows_at(ids: pq.ParquetFile, ends: NDArray[np.int64], positions: set[int]) -> dict[int, dict[str, str]]:
    """Id, shard and key at each position, from the row groups that hold one."""
    found: dict[int, dict[str, str]] = {}
    places = np.array(sorted(positions), np.int64)
    groups = np.searchsorted(ends, places, side="right")
    for group in np.unique(groups).tolist():
        here = places[groups == group]
        start = int(ends[group - 1]) if group else 0
        rows = ids.read_row_group(group).take(pa.array(here - start)).to_pylist()
        found |= dict(zip(here.tolist(), rows, strict=True))
    return found


def _write_lance(lance: Any, table: "Table", kind: str, folder: Path, seed: int) -> tuple[int, dict[str, Any]]:
    """A Lance dataset of id, vector (float32, as they are in the table), shard, key and carried fields."""
    carried = carry_fields(tuple((name, kind) for name, kind in table.manifest.pins["carry"]))
    if any(one.name == "vector" for one in carried):
        raise ConfigError(f"{table.store.uri}: carries a field `vector`, the name of the index's own column; choose FAISS")
    vector = pa.field("vector", pa.list_(pa.float32(), table.dimension))
    schema = pa.schema([_IDS.field("id"), vector, _IDS.field("shard"), _IDS.field("key"), *carried])
    columns = ["id", "embedding", "shard", "key", *(one.name for one in carried)]
    failed: list[LoraEmbedError] = []  # Lance makes an OSError of its own of what goes wrong while it reads

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from _lance_batches(table, columns, schema)
        except LoraEmbedError as error:
            failed.append(error)
            raise

    try:
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        return lance.write_dataset(reader, str(folder / f"{LANCE_NAME}.lance")).count_rows(), {}
    except OSError:
        if failed:
            raise failed[0] from None
        raise


def _lance_batches(table: "Table", columns: list[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in table.batches(columns):
        arrays = [batch.column(name) for name in columns]
        arrays[1] = pa.FixedSizeListArray.from_arrays(pa.array(vectors_of(batch).reshape(-1)), table.dimension)
        yield pa.record_batch([one.cast(to) for one, to in zip(arrays, schema.types, strict=True)], schema=schema)


def _open_lance(lance: Any, folder: Path, about: IndexDescription) -> Nearest:
    try:
        check_lance(folder / f"{LANCE_NAME}.lance")
        dataset = lance.dataset(str(folder / f"{LANCE_NAME}.lance"))
        count = dataset.count_rows()
        expected = _IDS.insert(1, pa.field("vector", pa.list_(pa.float32(), about.dimension)))
        if [(of.name, of.type) for of in dataset.schema][: len(expected)] != [(of.name, of.type) for of in expected]:
            raise ValueError(f"its columns are {dataset.schema.names}, expected those that were exported")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{folder}: the index cannot be read ({_line(error)}). Export it again.") from None
    if count != about.count:
        raise ConfigError(f"{folder}: holds {count} vectors, its {DESCRIPTION} says {about.count}. Export it again.")

    def nearest(queries: Vectors, k: int) -> list[list[Hit]]:
        found = []
        for query in queries:
            how = {"column": "vector", "q": query, "k": min(k, count), "metric": about.metric}
            rows = dataset.to_table(columns=[*HIT_COLUMNS, "_distance"], nearest=how).to_pylist()
            found.append([Hit(score=1 - row.pop("_distance"), **row) for row in rows])
        return found

    return nearest
