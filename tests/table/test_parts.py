"""Writing: a part is a function of shard, encoder and layout; its footer and counts are those of its rows."""

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_embed.chain.actors import WriteParts
from lora_embed.chain.items import EncoderSource, Pass
from lora_embed.schema import ChunkHead, Layout, Part, part_schema, sample_schema, to_ipc
from lora_embed.store.store import Store
from lora_embed.table.parts import make_part, part_path, read_footer, to_parquet, write_part
from samples import described, layout

HEAD = ChunkHead(shard_id="5" * 16, shard_name="a/0.tar", prefix="a/0.tar", chunk=2, last=True, good=2)
CARRY = (("label", "int64"), ("text", "string"), ("share", "float64"), ("flag", "bool"))


def samples(reasons: list[str | None], shape: Layout) -> pa.RecordBatch:
    rows: list[dict[str, Any]] = [
        {"key": f"k{number}", "width": number, "height": 2, "sha256": bytes([number]) * 32, "reason": reason,
         "detail": reason and f"why {number}", "label": number, "text": f"t{number}", "share": number / 2, "flag": number == 0}
        for number, reason in enumerate(reasons)
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=sample_schema(shape.carry))


def vectors(count: int, dimension: int = 5, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def row_of(head: ChunkHead, batch: pa.RecordBatch, values: Any) -> dict[str, Any]:
    """As `EmbedImages` hands it on."""
    return {
        "head": np.array([head.to_json()], dtype=object),
        "samples": np.array([to_ipc(batch)], dtype=object),
        "vectors": np.array([values[: head.good].tobytes()], dtype=object),
        "classes": np.array([b""], dtype=object),
    }


def writer(store: Store, shape: Layout) -> WriteParts:
    """Of parts with vectors of 5 numbers."""
    source = EncoderSource.on(store, described(space_id="space", dimension=5))
    return WriteParts(Pass(encoders=(source,), layout=shape, input_options={}, store=store, writes_parts=True))


def test_a_part_round_trips(tmp_path: Path) -> None:
    shape, store = layout(carry=CARRY), Store(str(tmp_path))
    values = vectors(2)
    table = make_part(HEAD, samples([None, "empty", None], shape), values, shape)
    assert write_part(store, "space", shape, HEAD, table)
    assert not write_part(store, "space", shape, HEAD, table.slice(0, 1))  # the first stays

    path = tmp_path / "staging" / "space" / shape.layout_id / f"{'5' * 16}-00000002-last.parquet"
    assert part_path("space", shape.layout_id, HEAD.part) == path.relative_to(tmp_path).as_posix()
    assert Part.parse(path.name) == HEAD.part
    read = pq.read_table(path)
    assert read.schema.equals(part_schema(5, "float32", CARRY))
    assert read.column("id").to_pylist() == ["a/0.tar/k0", "a/0.tar/k1", "a/0.tar/k2"]
    np.testing.assert_array_equal(np.array(read.column("embedding").to_pylist(), np.float32), [values[0], [0] * 5, values[1]])
    rows = read.drop_columns(["id", "embedding"]).to_pylist()
    assert rows[1] == {
        "shard": "a/0.tar", "key": "k1", "width": 1, "height": 2, "sha256": b"\1" * 32, "label": 1, "text": "t1",
        "share": 0.5, "flag": False, "reason": "empty", "detail": "why 1",
    }  # fmt: skip
    assert read_footer(pq.read_metadata(path)) == {
        "space_id": "space", "layout_id": shape.layout_id, "start": 8, "samples": 3, "vectors": 2, "bytes": None,
    }  # fmt: skip


def test_a_file_that_is_no_part_has_no_footer() -> None:
    assert read_footer(pq.read_metadata(io.BytesIO(to_parquet(pa.table({"x": [1]}))))) is None


def test_ids_of_images_at_the_root_have_no_prefix() -> None:
    head = ChunkHead(shard_id="5", shard_name="./#0000of0001", prefix="", good=1)
    assert make_part(head, samples([None], layout()), vectors(1), layout()).column("id").to_pylist() == ["k0"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_a_reject_of_zeros(bad: float) -> None:
    values = vectors(2)
    values[1, 3] = bad
    table = make_part(HEAD, samples([None, "empty", None], layout()), values, layout())
    assert table.column("reason").to_pylist() == [None, "empty", "non_finite_vector"]
    found = np.array(table.column("embedding").to_pylist(), np.float32)
    np.testing.assert_array_equal(found, [values[0], [0] * 5, [0] * 5])


def test_float16_vectors_and_what_overflows_them() -> None:
    half = layout(vector_type="float16")
    values = vectors(2)
    values[1, 0] = 1e5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = make_part(HEAD, samples([None, "empty", None], half), values, half)
    read = pq.read_table(io.BytesIO(to_parquet(table)))
    assert read.schema.equals(part_schema(5, "float16", ()))
    assert read.column("reason").to_pylist() == [None, "empty", "non_finite_vector"]
    np.testing.assert_array_equal(np.array(read.column("embedding")[0].as_py(), np.float16), values[0].astype(np.float16))


def test_parts_without_vectors_and_without_rows(tmp_path: Path) -> None:
    shape, store = layout(), Store(str(tmp_path))
    for reasons in (["empty", "no_image"], []):
        head = ChunkHead(shard_id=f"{len(reasons)}" * 16, shard_name="s", prefix="s", last=True)
        (row,) = writer(store, shape)(row_of(head, samples(reasons, shape), vectors(1)))["head"]
        counted = ChunkHead.from_json(row)
        assert (counted.samples, counted.rejects, counted.last) == (len(reasons), len(reasons), True)
        read = pq.read_table(tmp_path / part_path("space", shape.layout_id, head.part))
        assert read.schema.equals(part_schema(5, "float32", ()))
        assert read.column("reason").to_pylist() == reasons


def test_write_parts_goes_batch_to_batch(tmp_path: Path) -> None:
    shape, store = layout(carry=CARRY), Store(str(tmp_path))
    values = vectors(3)
    values[2, 0] = np.nan
    head = ChunkHead(shard_id="a" * 16, shard_name="s", prefix="s", chunk=1, good=3)
    batch = row_of(head, samples([None, "empty", None, None], shape), values)
    write = writer(store, shape)
    for _ in range(2):  # again by a task that was retried: the same counts, nothing new
        (row,) = write(batch)["head"]
        counted, written = replace(head, samples=4, reasons={"empty": 1, "non_finite_vector": 1}), ChunkHead.from_json(row)
        assert replace(written, examples=[]) == counted
        assert [(example["id"], example["reason"]) for example in written.examples] == [
            ("s/k1", "empty"), ("s/k3", "non_finite_vector"),
        ]  # fmt: skip
    failed = ChunkHead(shard_id="b" * 16, shard_name="t", prefix="t", error="t: cut short")
    (row,) = write(row_of(failed, samples([], shape), vectors(1)))["head"]
    assert ChunkHead.from_json(row) == failed
    assert [entry.path for entry in store.list_files()] == [part_path("space", shape.layout_id, head.part)]


def test_pixels_and_reasons_that_disagree_stop_the_job() -> None:
    with pytest.raises(AssertionError):
        make_part(HEAD, samples([None, "empty", "empty"], layout()), vectors(2), layout())


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([None, None, "empty"]), max_size=20), st.sampled_from(["float32", "float16"]), st.integers(1, 40)
)
def test_encoding_is_repeatable_and_exact(reasons: list[str | None], vector_type: str, dimension: int) -> None:
    shape = layout(vector_type=vector_type, carry=CARRY)
    good = reasons.count(None)
    head = ChunkHead(shard_id="5", shard_name="s", prefix="s", good=good)
    values = vectors(max(good, 1), dimension)
    one, two = (to_parquet(make_part(head, samples(reasons, shape), values.copy(), shape)) for _ in range(2))
    assert one == two
    read = pq.read_table(io.BytesIO(one))
    rows = [row for row, reason in zip(read.column("embedding").to_pylist(), reasons, strict=True) if reason is None]
    np.testing.assert_array_equal(np.array(rows, vector_type).reshape(good, dimension), values[:good].astype(vector_type))
    if reasons:
        column = pq.read_metadata(io.BytesIO(one)).row_group(0).column(1)
        assert column.path_in_schema == "embedding.list.element"
        assert ("BYTE_STREAM_SPLIT" in column.encodings) == (vector_type == "float32")
