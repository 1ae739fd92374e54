"""Readers of a table's files: the blocks of docs/readers.md, compared bit for bit with what was written."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from documented import bits, documented, expected_ids, run_documented
from lora_embed.search.search import search_table
from lora_embed.table.parquet import read_rows
from lora_embed.vectors.rows import vectors_of
from tables import noise_vectors, publish_vectors, spread


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
    names = run_documented(documented(reader)[0], table, names)
    ids = names["rows"]["id"]
    assert list(ids if isinstance(ids, np.ndarray) else map(str, ids)) == expected_ids(table)
    if reader == "DuckDB":  # gives float32, as with_format("numpy") does below; what they hold is as it was
        assert bits(np.stack(names["rows"].column("embedding").to_numpy())) == bits(written.astype(np.float32))
        assert [row[0] for row in names["nearest"]] == [hit.id for hit in search_table(table, written[:1], 10)[0]]
    elif reader == "pyarrow":
        assert bits(names["vectors"]) == bits(written)
    else:
        assert bits(names["vectors"]) == bits(written.astype(np.float32))


def test_float16_that_is_byte_stream_split_is_read_but_not_by_duckdb(tmp_path: Path) -> None:
    """Files as lora-embed wrote them at first, and half floats from Arrow: once DuckDB takes either, mend the page."""
    import duckdb
    import pandas

    written = noise_vectors(100).astype(np.float16)
    table = publish_vectors(tmp_path / "table", spread(written, 1), vector_type="float16")
    (path,) = table.files
    whole = pq.read_table(path)
    pq.write_table(whole, path, use_dictionary=["shard"], column_encoding={"embedding.list.element": "BYTE_STREAM_SPLIT"})
    assert "BYTE_STREAM_SPLIT" in pq.read_metadata(path).row_group(0).column(1).encodings
    assert read_rows(table.store, table.manifest.files[0].path, table.schema) == whole
    assert bits(np.concatenate([vectors_of(batch) for batch in table.batches(["embedding"])])) == bits(
        written.astype(np.float32)
    )
    assert bits(np.stack(pandas.read_parquet(path)["embedding"])) == bits(written)
    with pytest.raises(duckdb.Error, match="BYTE_STREAM_SPLIT encoding is only supported for"):
        duckdb.sql(f"SELECT embedding FROM read_parquet('{path}')").fetchall()
    with pytest.raises(duckdb.NotImplementedException, match="Unsupported Internal Arrow Type e"):
        duckdb.sql("SELECT embedding FROM whole").fetchall()


def test_documented_python_reads_batches_and_rows(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(1274), 13), shards_per_file=3)
    names = run_documented(documented("Python, a few columns, a few rows")[0], table, {"table": table})
    assert names["some"].column_names == ["id", "embedding", "label"]
    assert names["some"]["label"].to_pylist() == [3, 110 - len(table.rows([f"0000.tar/{n:06d}" for n in range(200)]))]
