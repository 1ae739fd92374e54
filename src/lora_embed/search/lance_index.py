"""Write a Lance dataset of a table's vectors, and open it for search."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lora_embed.errors import ConfigError, LoraEmbedError
from lora_embed.schema import carry_fields
from lora_embed.search.index import (
    DESCRIPTION,
    HIT_COLUMNS,
    IDS,
    LANCE_NAME,
    Hit,
    IndexDescription,
    Nearest,
    Vectors,
    damage_named,
)
from lora_embed.search.index_files import check_lance
from lora_embed.vectors.rows import vectors_of

if TYPE_CHECKING:
    from lora_embed.table.read import Table


def write_lance(lance: Any, table: "Table", folder: Path, seed: int) -> tuple[int, dict[str, Any]]:
    """Write a Lance dataset with id, vector (float32, not scaled), shard, key and carried fields."""
    carried = carry_fields(table.manifest.carry)
    if any(field.name == "vector" for field in carried):
        raise ConfigError(f"{table.store.uri}: carries a field `vector`, which is a column of Lance indexes. Choose FAISS.")
    vector = pa.field("vector", pa.list_(pa.float32(), table.dimension))
    schema = pa.schema([IDS.field("id"), vector, IDS.field("shard"), IDS.field("key"), *carried])
    columns = ["id", "embedding", "shard", "key", *(field.name for field in carried)]
    failed: list[LoraEmbedError] = []  # Lance raises an OSError in place of an error that occurs while it reads

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
        yield pa.record_batch([array.cast(to) for array, to in zip(arrays, schema.types, strict=True)], schema=schema)


def open_lance(lance: Any, folder: Path, description: IndexDescription) -> Nearest:
    with damage_named(folder):
        check_lance(folder / f"{LANCE_NAME}.lance")
        dataset = lance.dataset(str(folder / f"{LANCE_NAME}.lance"))
        count = dataset.count_rows()
        expected = IDS.insert(1, pa.field("vector", pa.list_(pa.float32(), description.dimension)))
        if [(column.name, column.type) for column in dataset.schema][: len(expected)] != [
            (column.name, column.type) for column in expected
        ]:
            raise ValueError(f"its columns are {dataset.schema.names}, expected {expected.names} and carried fields")
    if count != description.count:
        raise ConfigError(f"{folder}: holds {count} vectors, but its {DESCRIPTION} says {description.count}. Export it again.")

    def nearest(queries: Vectors, k: int) -> list[list[Hit]]:
        hits = []
        for query in queries:
            nearest_to = {"column": "vector", "q": query, "k": min(k, count), "metric": description.metric}
            rows = dataset.to_table(columns=[*HIT_COLUMNS, "_distance"], nearest=nearest_to).to_pylist()
            hits.append([Hit(score=1 - row.pop("_distance"), **row) for row in rows])
        return hits

    return nearest
