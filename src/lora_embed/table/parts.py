"""A chunk's vectors → its part: one object, committed once, whose bytes depend on shard, encoder and layout alone."""

import contextlib
import io
import json
from dataclasses import dataclass
from typing import IO, Annotated, Any, NotRequired, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from lora_embed.config.foreign import Count
from lora_embed.schema import NON_FINITE, TAKEN, ChunkHead, Layout, Part, part_schema
from lora_embed.store.store import Store
from lora_embed.table.parquet import damage_named

FOOTER = b"lora_embed.part"
FOOTER_BYTES = 2**16  # bytes read at once from a part when only its footer and keys are needed


class _Footer(TypedDict):
    space_id: str
    layout_id: str
    start: Count
    samples: Count
    vectors: Count
    bytes: NotRequired[Annotated[list[Count], Field(min_length=2, max_length=2)] | None]


_FOOTER = TypeAdapter(_Footer)


def part_path(space_id: str, layout_id: str, part: Part | None = None) -> str:
    """The path below the table of a layout's parts, or of one part."""
    return f"staging/{space_id}/{layout_id}/{part.name if part else ''}".rstrip("/")


def make_part(head: ChunkHead, samples: pa.RecordBatch, vectors: NDArray[np.float32], layout: Layout) -> pa.Table:
    """Join samples (n rows) with the vectors (head.good, d) of those that have neither a reject reason nor a vector in `TAKEN`.

    A vector that is not finite becomes a reject. Rejects have zeros for a vector; only the reason marks a reject.
    """
    good = np.array(pc.is_null(samples.column("reason")).to_numpy(zero_copy_only=False), dtype=bool)
    taken = np.array(pc.is_valid(samples.column(TAKEN)).to_numpy(zero_copy_only=False), dtype=bool)
    assert (int(good.sum()), int(taken.sum())) == (head.good + head.taken, head.taken), head
    embedding = np.zeros((len(good), vectors.shape[1]), dtype=layout.vector_type)
    with np.errstate(over="ignore"):  # beyond float16's range a value becomes infinite, and so a reject
        embedding[good & ~taken] = vectors[: head.good]
    stored = b"".join(samples.column(TAKEN).drop_null().to_pylist())
    embedding[taken] = np.frombuffer(stored, layout.vector_type).reshape(-1, vectors.shape[1])
    unsound = good & ~np.isfinite(embedding).all(axis=1)
    embedding[unsound] = 0
    keys = samples.column("key").to_pylist()
    columns = {name: samples.column(name) for name in samples.schema.names}
    if unsound.any():
        columns["reason"] = pc.if_else(pa.array(unsound), NON_FINITE, samples.column("reason"))
    schema = part_schema(vectors.shape[1], layout.vector_type, layout.carry).with_metadata(samples.schema.metadata)
    columns |= {
        "id": pa.array([head.sample_id(key) for key in keys], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), type=schema.field("embedding").type),
        "shard": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(keys), np.int32)), pa.array([head.shard_name])),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write_part(store: Store, space_id: str, layout: Layout, head: ChunkHead, table: pa.Table) -> bool:
    """Commit a part; False if it had been committed before. The footer holds the values that `read_footer` returns."""
    facts = {
        "space_id": space_id,
        "layout_id": layout.layout_id,
        "start": head.chunk * layout.chunk_size,
        "samples": table.num_rows,
        "vectors": table.column("reason").null_count,
        "bytes": None if head.begin is None or head.end is None else [head.begin, head.end],
    }
    footer = (table.schema.metadata or {}) | {FOOTER: json.dumps(facts).encode()}
    return store.create(part_path(space_id, layout.layout_id, head.part), to_parquet(table.replace_schema_metadata(footer)))


def read_footer(data: pq.FileMetaData) -> dict[str, Any] | None:
    """What a part says of itself: space_id, layout_id, start, samples, vectors; None for a file that is not a part.

    Also `bytes`: the range [begin, end) of the chunk in its tar, or None if reading cannot begin there.
    """
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads((data.metadata or {}).get(FOOTER, b"null"))
        return cast(dict[str, Any], _FOOTER.validate_python(facts, strict=True))
    return None


@dataclass(frozen=True, kw_only=True)
class ChunkPlace:
    """The bytes [begin, end) of a committed chunk in its tar, and the keys of its samples."""

    begin: int
    end: int
    keys: frozenset[str]


def read_place(store: Store, path: str) -> ChunkPlace | None:
    """The place of a part's chunk in its tar; None if the part no longer exists or does not record its bytes."""
    try:
        with store.open(path, FOOTER_BYTES) as data, damage_named(store.name(path)):
            file = pq.ParquetFile(data)
            place = (read_footer(file.metadata) or {}).get("bytes")
            if place is None:
                return None
            begin, end = place
            return ChunkPlace(begin=begin, end=end, keys=frozenset(file.read(columns=["key"])["key"].to_pylist()))
    except FileNotFoundError:
        return None


def to_parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file of one row group, for a part or a file of rejects."""
    buffer = io.BytesIO()
    with parquet_writer(buffer, table.schema) as writer:
        writer.write_table(table, max(1, table.num_rows))
    return buffer.getvalue()


def parquet_writer(file: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    """The Parquet writer of parts and data files: zstd, and dictionary encoding only for columns whose values repeat."""
    has_float32 = "embedding" in schema.names and schema.field("embedding").type.value_type == pa.float32()
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_dictionary=[name for name in ("shard", "reason") if name in schema.names],
        # With BYTE_STREAM_SPLIT, real float32 vectors of 1,536 bytes take 1,295 bytes and without it 1,420. Float16 vectors
        # would take 658 and not 709, but DuckDB (2.0, duckdb#17114) reads it for values of 32 and 64 bits only.
        column_encoding={"embedding.list.element": "BYTE_STREAM_SPLIT"} if has_float32 else None,
    )
