"""An index of a table's vectors: its description, and search in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from lora_embed.config.foreign import Count
from lora_embed.errors import ConfigError
from lora_embed.text import in_one_line
from lora_embed.vectors.rows import unit

DESCRIPTION, FAISS_FILE, IDS_FILE, LANCE_NAME = "index.json", "index.faiss", "ids.parquet", "vectors"
FORMAT = 1
HIT_COLUMNS = ["id", "shard", "key"]
IDS = pa.schema([pa.field(name, pa.string(), nullable=False) for name in HIT_COLUMNS])
Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One image that a search found; `score` is its cosine similarity to the query.

    `fields` are its carried fields. A search in an index does not have them: `table.rows(ids)` does.
    """

    id: str
    score: float
    shard: str
    key: str
    fields: dict[str, Any] = field(default_factory=dict, compare=False)


Nearest = Callable[[Vectors, int], list[list[Hit]]]  # queries of length 1 (m, d) and k → the hits of each


@dataclass(frozen=True, kw_only=True)
class IndexDescription:
    """The content of `index.json`: the table and version of the index, and how it was made."""

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
        """Up to k hits for each query (m, d), best first.

        `space_id` is that of the encoder that made the queries. Raises ConfigError if it is not the index's space.
        """
        description = self.description
        where = f"{self.folder}: the index of {description.table}, version {description.version},"
        refuse_other_space(where, description.space_id, space_id, "Export the table's current version again.")
        queries = unit_queries(vectors, description.dimension, k)
        with damage_named(self.folder):
            return self.nearest(queries, k)


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turn what FAISS, Lance or Arrow raise for a damaged index into ConfigError, also a panic of Lance's Rust code."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception, and its class cannot be imported
        is_damage = isinstance(error, RuntimeError | OSError | ValueError | pa.ArrowException)
        if not is_damage and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{folder}: the index cannot be read ({in_one_line(error, 300)}). Export it again.") from None


def refuse_other_space(where: str, space_id: str, query_space: str, remedy: str) -> None:
    """Raises ConfigError if queries were made by an encoder of another space."""
    if query_space != space_id:
        raise ConfigError(
            f"{where} holds vectors of space {space_id}, but the query was made by an encoder of space {query_space}. Their "
            f"similarity means nothing. Use the encoder of space {space_id}. {remedy}"
        )


def unit_queries(vectors: NDArray[Any], dimension: int, k: int) -> Vectors:
    """Queries (m, d), scaled to length 1. Raises ConfigError for another shape, values not finite, or a k below 1."""
    queries = np.asarray(vectors, np.float32)
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ConfigError(f"queries have the shape {queries.shape}, expected (number of queries, {dimension})")
    if not np.isfinite(queries).all():
        raise ConfigError("a query vector holds NaN or infinity, expected finite values")
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    return unit(queries)
