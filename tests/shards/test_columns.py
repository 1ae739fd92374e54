"""Parquet as people write it: images as base64, in lists and dictionaries; keys that repeat; columns of something else."""

import base64
import datetime
import decimal
import os
import resource
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.errors import ShardError
from lora_embed.schema import Sample
from lora_embed.shards import checked_parquet, pages
from lora_embed.shards.read import count_samples, read_samples
from samples import PREPROCESSING, layout, parquet_of, png, samples_of, shard_at

PNGS = [png(number) for number in range(6)]


def text_of(number: int) -> str:
    return base64.b64encode(PNGS[number]).decode()


def pairs(samples: list[Sample]) -> list[tuple[str, bytes | None]]:
    return [(sample.key, sample.data) for sample in samples]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), "dictionary", "struct"])
def test_base64_text_is_an_image(tmp_path: Path, kind: Any) -> None:
    folded = base64.encodebytes(PNGS[2]).decode()
    url_safe = base64.urlsafe_b64encode(PNGS[3]).decode().rstrip("=")
    texts = [text_of(0), f"data:image/png;base64,{text_of(1)}", folded, url_safe, None, "not base64!"]
    if kind == "dictionary":
        column = pa.array(texts).dictionary_encode()
    elif kind == "struct":
        column = pa.array([None if text is None else {"bytes": text, "path": None} for text in texts])
    else:
        column = pa.array([text if text is None or kind != pa.binary() else text.encode() for text in texts], kind)
    samples = samples_of(shard_at(tmp_path / "a.parquet", parquet_of({"image": column}, row_group_size=9)))
    assert [sample.data for sample in samples] == [*PNGS[:4], None, b"not base64!"]


def test_base64_counts_by_the_bytes_that_it_stands_for(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": [text_of(0), text_of(1) * 2]}))
    first, second = samples_of(shard, max_bytes=len(PNGS[0]) + 10)
    assert (first.data, second.data, second.excess > len(PNGS[0]) + 10) == (PNGS[0], None, True)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.binary()), pa.large_list(pa.large_binary()), pa.list_(pa.string()), pa.list_view(pa.binary()),
        pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ],
    ids=str,
)  # fmt: skip
def test_a_list_of_images_is_several_samples(tmp_path: Path, kind: Any) -> None:
    def value(number: int) -> Any:
        if pa.types.is_struct(kind.value_type):
            return {"bytes": PNGS[number], "path": "x"}
        return text_of(number) if pa.types.is_string(kind.value_type) else PNGS[number]

    rows = [[value(0), value(1)], None, [value(2)], [], [value(3), None, value(0)]]
    data = parquet_of({"id": list("abcde"), "images": pa.array(rows, kind), "label": [1, 2, 3, 4, 5]}, row_group_size=2)
    shard = shard_at(tmp_path / "a.parquet", data)
    samples = samples_of(shard, carry=(("label", "int64"),))
    assert pairs(samples) == [
        ("a#0", PNGS[0]), ("a#1", PNGS[1]), ("b", None), ("c#0", PNGS[2]), ("d", None),
        ("e#0", PNGS[3]), ("e#1", None), ("e#2", PNGS[0]),
    ]  # fmt: skip
    assert [sample.fields["label"] for sample in samples] == [1, 1, 2, 3, 4, 5, 5, 5]
    assert count_samples(shard, layout(), {}, most=99) == 8
    chunks = list(decode_shard(WorkItem(shard=shard), layout(), PREPROCESSING, {}))
    assert [chunk.head.samples or chunk.samples.num_rows for chunk in chunks] == [4, 4]
    (second,) = decode_shard(WorkItem(shard=shard, done=frozenset([0])), layout(), PREPROCESSING, {})
    assert second.samples == chunks[1].samples


def test_lists_of_a_fixed_size_and_one_image_a_thousand_times(tmp_path: Path) -> None:
    fixed = pa.array([[PNGS[0], PNGS[1]], [PNGS[2], None]], pa.list_(pa.binary(), 2))
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": fixed}))
    assert [data for _, data in pairs(samples_of(shard))] == [*PNGS[:3], None]
    large = os.urandom(500_000)
    shard = shard_at(tmp_path / "b.parquet", parquet_of({"image": pa.array([[large] * 1000])}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(sample.data == large for sample in read_samples(shard, layout(), {}, lambda number: True)) == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB; unpacked it would be 500 MB


def test_images_in_a_dictionary(tmp_path: Path) -> None:
    column = pa.array([PNGS[0], PNGS[1], None, PNGS[0]]).dictionary_encode()
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": column}))
    assert [data for _, data in pairs(samples_of(shard))] == [PNGS[0], PNGS[1], None, PNGS[0]]


def test_a_plain_column_comes_before_one_of_text(tmp_path: Path) -> None:
    columns = {"image": ["a.png", "b.png"], "bytes": PNGS[:2]}
    shard = shard_at(tmp_path / "a.parquet", parquet_of(columns))
    assert [data for _, data in pairs(samples_of(shard))] == PNGS[:2]


def test_keys_that_repeat_are_numbered_when_asked(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"id": [7, 7, 8], "image": PNGS[:3]}))
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(), PREPROCESSING, {})
    assert chunk.samples.column("reason").to_pylist() == [None, "duplicate_id", None]
    assert "Set key_column to a column of distinct values, or to none to number the rows" in chunk.samples["detail"][1].as_py()
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(key_column="none"), PREPROCESSING, {})
    assert chunk.samples.column("key").to_pylist() == ["0000000000", "0000000001", "0000000002"]
    assert chunk.samples.column("reason").null_count == 3
    named = shard_at(tmp_path / "b.parquet", parquet_of({"none": ["x", "y"], "image": PNGS[:2]}))
    assert [key for key, _ in pairs(samples_of(named, key_column="none"))] == ["x", "y"]  # as before `none` had a meaning


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({"image": ["images/a.jpg", "images/b.jpg"]}, {}, "column 'image' holds paths, such as 'images/a.jpg'"),
        ({"image": ["https://x.org/1", "https://x.org/2"]}, {}, "column 'image' holds URLs, such as 'https://x.org/1'"),
        ({"image": ["a cat", "a dog"]}, {}, "holds text, such as 'a cat', not the bytes of images or base64"),
        ({"images": [["a/b", "c/d"], []]}, {}, "column 'images' holds paths, such as 'a/b'"),
        ({"image": ["s3://b/k.png"], "photo": PNGS[:1]}, {}, "holds URLs.* Set image_column to 'photo', which is binary"),
        ({"image": [[1, 2], [3]]}, {}, "column 'image' is of type list<.*int64>, expected the bytes of image files"),
        ({"image": [{"path": "a.png"}]}, {}, "column 'image' is of type struct<path: string>, expected the bytes"),
        ({"photo": PNGS[:1], "label": [1]}, {}, "has no image column.* Set image_column in the job, for example to 'photo'"),
        ({"text": ["a"], "n": [1]}, {}, "No column is binary. If one of text is base64 text of images, set image_column"),
        ({"image": PNGS[:1]}, {"image_column": "photo"}, "has no image column 'photo', found .'image'.. Correct image_column"),
        ({"image": PNGS[:1]}, {"key_column": "name"}, "Correct key_column in the job, or set it to none to number the rows"),
    ],
)  # fmt: skip
def test_a_column_of_something_else_says_what_it_holds(
    tmp_path: Path, columns: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShardError, match=message) as error:
        samples_of(shard_at(tmp_path / "a.parquet", parquet_of(columns)), **changes)
    assert "Upload it again" not in str(error.value)


DAY = datetime.datetime(2024, 5, 1, 12, 30, 15)
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pa.array([b"cat"]), "cat"), (pa.array([b"caf\xe9"]), None), (pa.array([b"cat"], pa.binary(3)), "cat"),
        (pa.array([b"caf\xc3\xa9"]).dictionary_encode(), "café"), (pa.array([DAY]), "2024-05-01T12:30:15"),
        (pa.array([DAY], pa.timestamp("ms", "UTC")), "2024-05-01T12:30:15+00:00"),
        (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"), (pa.array([DAY.date()]), "2024-05-01"),
        (pa.array([DAY.time()]), "12:30:15"), (pa.array([decimal.Decimal("1.50")]), "1.50"),
        (pa.array([decimal.Decimal("1E+3")], pa.decimal128(5, -3)).cast(pa.decimal128(10, 0)), "1000"),
        (pa.array([ID.bytes], pa.uuid()), str(ID)), (pa.array([True]), "true"), (pa.array([3]), "3"), (pa.array([0.5]), "0.5"),
        (pa.array(['say "a"']), 'say "a"'), (pa.array([["a", "b"]]), '["a", "b"]'),
        (pa.array([[DAY.date()]]), '["2024-05-01"]'),
        (pa.array([{"a": b"x", "b": decimal.Decimal("2.0")}]), '{"a": "x", "b": "2.0"}'),
        (pa.array(["x"]).cast(pa.large_string()), "x"), (pa.array([datetime.timedelta(seconds=90)]), "0:01:30"),
    ],
    ids=str,
)  # fmt: skip
def test_a_carried_value_is_plain_text(tmp_path: Path, value: pa.Array, text: str | None) -> None:
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": PNGS[:1], "label": value}))
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(carry=(("label", "string"),)), PREPROCESSING, {})
    assert chunk.samples.column("label").to_pylist() == [text]


def test_a_long_value_in_a_list_costs_no_other_row_its_value(tmp_path: Path) -> None:
    tags = [["a", "b"], ["x" * 9_000_000], ["a", "b", "a"], ["x" * 9_000_000] * 2]
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": PNGS[:4], "tags": tags}, row_group_size=4))
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(carry=(("tags", "string"),)), PREPROCESSING, {})
    found = chunk.samples.column("tags").to_pylist()
    assert (found[0], found[2], found[3]) == ('["a", "b"]', '["a", "b", "a"]', None)
    assert len(found[1]) == 9_000_004


def test_numbers_and_flags_from_bytes_and_decimals(tmp_path: Path) -> None:
    columns = {
        "image": PNGS[:2],
        "n": [b"7", b"x"],
        "d": [decimal.Decimal("2.0"), decimal.Decimal("2.5")],
        "b": [b"true", b"0"],
    }
    shard = shard_at(tmp_path / "a.parquet", parquet_of(columns))
    carry = (("n", "int64"), ("d", "int64"), ("b", "bool"))
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(carry=carry), PREPROCESSING, {})
    assert [chunk.samples.column(name).to_pylist() for name, _ in carry] == [[7, None], [2, None], [True, False]]


def write_large(path: Path, sizes: list[int], **options: Any) -> None:
    """A file of one row group with images of these sizes."""
    noise = os.urandom(max(sizes))
    images = pa.chunked_array([pa.array([noise[:size]]) for size in sizes])
    table = pa.table({"key": [str(number) for number in range(len(sizes))], "image": images})
    with pq.ParquetWriter(path, table.schema, use_dictionary=False, **options) as writer:
        writer.write_table(table, row_group_size=len(sizes))


MEASURE = """
import resource, sys
from pathlib import Path
from samples import layout, shard_at
from lora_embed.shards.read import read_samples
shard = shard_at(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sizes = [len(sample.data or b"") for sample in read_samples(shard, layout(), {}, lambda number: True)]
print(len(sizes), sum(sizes), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_large_row_group_is_read_in_little_memory(tmp_path: Path, compression: str) -> None:
    sizes = [20_000] * 300 + [17_000_000] * 20 + [5] * 10  # its end shows what its beginning does not
    write_large(tmp_path / "a.parquet", sizes, compression=compression)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.parquet")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where it finds what tests share
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    count, total, taken = map(int, done.stdout.split())
    assert (count, total) == (len(sizes), sum(sizes))
    assert taken < 250, "MB; the row group has 346"


CODECS = ("none", "snappy", "gzip", "brotli", "zstd", "lz4")


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize("nested", ["flat", "list", "struct"])
def test_images_in_a_large_dictionary_are_read_many_at_once(tmp_path: Path, compression: str, nested: str) -> None:
    """As pyarrow writes distinct images by default: all are in a dictionary, of which a batch might repeat the largest."""
    images = [os.urandom(60_000) for _ in range(200)]
    cells: list[Any] = [{"flat": image, "list": [image], "struct": {"bytes": image, "path": "a"}}[nested] for image in images]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": cells}), path, compression=compression)
    with path.open("rb") as file:
        opened = checked_parquet.ParquetFile(file, path.stat().st_size, str(path))
        assert [batch.num_rows for batch in opened.batches(0, ["image"], 64)] == [64, 64, 64, 8]
    assert [sample.data for sample in samples_of(shard_at(path))] == images


def test_a_large_image_in_a_dictionary_is_repeated_a_few_times_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    three = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2] * 100), pa.array([b"small", os.urandom(20_000_000), b""]))
    pq.write_table(pa.table({"image": three}), path)
    with path.open("rb") as file:
        opened = checked_parquet.ParquetFile(file, path.stat().st_size, str(path))
        assert max(batch.num_rows for batch in opened.batches(0, ["image"], 64)) == checked_parquet.MOST_REPEATED // 20_000_000


def test_a_row_group_is_read_the_same_in_windows_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [os.urandom(number * 37 % 5000) for number in range(400)]
    lists = [images[number : number + number % 3] for number in range(400)]
    path = tmp_path / "a.parquet"
    for options in ({}, {"data_page_version": "2.0"}, {"data_page_size": 500}, {"compression": "zstd"}):
        pq.write_table(pa.table({"image": images, "label": lists}), path, row_group_size=300, **options)
        whole = samples_of(shard_at(path), carry=(("label", "string"),))
        assert [sample.data for sample in whole] == images
        for window, batch in ((1, 2**26), (1000, 2000), (2**20, 100), (50_000, 2**26)):
            monkeypatch.setattr(pages, "WINDOW", window)
            monkeypatch.setattr(checked_parquet, "MOST_BATCH", batch)
            assert samples_of(shard_at(path), carry=(("label", "string"),)) == whole, (options, window, batch)
        monkeypatch.undo()


def test_a_page_that_is_damaged_beyond_the_first_window_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    write_large(path, [3000] * 100, compression="none", data_page_size=3000, write_batch_size=1)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    monkeypatch.setattr(pages, "WINDOW", 10_000)
    places = [place for place in range(column.data_page_offset, len(data) - 5000) if data[place : place + 2] == b"\x15\x00"]
    data[places[70] : places[70] + 12] = b"\xff" * 12
    with pytest.raises(ShardError, match="cannot be read as Parquet to its end"):
        samples_of(shard_at(path, bytes(data)))
