"""Lists of references: what becomes a row, a reject or a message, and which ranges a change makes stale."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lists import images_in, write_list
from lora_embed.errors import ConfigError
from lora_embed.schema import Sample, Shard
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import list_shards
from lora_embed.shards.lists import FEWEST_ROWS, MOST_ROWS
from lora_embed.shards.read import count_samples, read_samples
from samples import layout, png

URL = References(column="url")


def shards_of(path: Path, references: References = URL) -> list[Shard]:
    return list_shards((str(path),), {}, references=references)


def samples_of(path: Path, references: References = URL, **changes: Any) -> list[Sample]:
    carry = tuple((name, "string") for name in references.fields)
    read = [
        read_samples(shard, layout(carry=carry, **changes), {}, lambda number: True) for shard in shards_of(path, references)
    ]
    return list(itertools.chain.from_iterable(read))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.ndjson", "A.CSV"])
def test_each_row_of_a_list_is_a_row_or_a_reject(tmp_path: Path, name: str) -> None:
    """Relative paths count from the list's folder, wherever it lies below the input."""
    paths = images_in(tmp_path / "below")
    absolute = str(tmp_path / "below" / "images" / "0.png")
    named = [
        *paths,
        absolute,
        f"file://{absolute}",
        "images/../images/1.png",
        "images/gone.png",
        None,
        "images",
        "images/0.png/x",
    ]
    labels = [f"label {number}" for number in range(len(named))]
    write_list(tmp_path / "below" / name, {"url": named, "label": labels})
    samples = samples_of(tmp_path, References(column="url", fields=("label",)))
    assert [sample.key for sample in samples] == [reference or "0000000008" for reference in named]
    assert [sample.fields["label"] for sample in samples] == labels
    seeds = [0, 1, 2, 3, 0, 0, 1]
    assert [sample.data for sample in samples] == [*map(png, seeds), None, None, None, None]
    assert [sample.problem for sample in samples[7:]] == [
        ("no_image", "images/gone.png does not exist"), ("no_image", "the row names no image"),
        ("no_image", "images does not exist"), ("no_image", "images/0.png/x does not exist"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["images/0.png", "images/1.png"], pa.large_string()),
        pa.array([b"images/0.png", b"images/1.png"]),
        pa.array(["images/0.png", "images/1.png"]).dictionary_encode(),
        pa.array([{"bytes": None, "path": "images/0.png"}, {"bytes": None, "path": "images/1.png"}]),
        pa.array([{"path": "images/0.png"}, {"path": "images/1.png"}]),
        pa.array([["images/0.png", "images/1.png"]]),
        pa.array([["images/0.png"], ["images/1.png"]], pa.large_list(pa.string())),
    ],
    ids=lambda values: str(values.type),
)
def test_a_column_of_any_type_that_holds_paths_is_read(tmp_path: Path, values: pa.Array) -> None:
    """Also the struct that Hugging Face datasets write, and lists, whose images are rows of their own."""
    images_in(tmp_path)
    write_list(tmp_path / "a.parquet", {"url": values})
    assert [sample.data for sample in samples_of(tmp_path / "a.parquet")] == [png(0), png(1)]


def test_a_list_of_several_images_in_a_row_makes_several_keys(tmp_path: Path) -> None:
    one, two, three = images_in(tmp_path, 3)
    for name in ("a.parquet", "b.jsonl"):
        path = write_list(tmp_path / name, {"id": [7, 8, 9], "url": [[one, two], [three], []]})
        samples = samples_of(path)
        assert [sample.key for sample in samples] == ["7#0", "7#1", "8", "9"]
        assert [sample.data for sample in samples] == [png(0), png(1), png(2), None]


def test_the_key_is_a_column_or_the_reference(tmp_path: Path) -> None:
    """A usual name of a key column is found; what may be a signature does not reach the table."""
    paths = images_in(tmp_path, 2)
    path = write_list(tmp_path / "a.csv", {"url": paths, "sku": ["x", ""], "file_name": ["m", "n"]})
    assert [sample.key for sample in samples_of(path)] == ["m", "n"]
    assert [sample.key for sample in samples_of(path, References(column="url", key_column="sku"))] == ["x", paths[1]]
    secret = "s3://bucket/a.png?X-Amz-Signature=abcdef"
    path = write_list(tmp_path / "b.csv", {"url": [secret, f"{secret}0"]})
    keys = [s.key for s in shards_keys(path, References(column="url", roots=("s3://bucket",)))]
    assert len(set(keys)) == 2
    assert not any("abcdef" in key for key in keys)


def shards_keys(path: Path, references: References) -> list[Sample]:
    shards = shards_of(path, references)
    return [sample for shard in shards for sample in read_samples(shard, layout(), {}, lambda number: False)]


def test_a_key_that_an_earlier_row_has_is_a_reject_in_any_range(tmp_path: Path) -> None:
    paths = images_in(tmp_path, 2)
    rows = 3 * MOST_ROWS
    path = write_list(tmp_path / "a.parquet", {"id": [*range(rows), 5], "url": [paths[0]] * rows + [paths[1]]})
    shards = shards_of(path)
    assert [len(shard.rows.repeated) for shard in shards if shard.rows] == [0] * (len(shards) - 1) + [1]
    last = list(read_samples(shards[-1], layout(), {}, lambda number: True))[-1]
    assert (last.key, last.problem) == ("5", ("duplicate_id", "an earlier row of the list has the same key"))


def rows_of_urls(count: int) -> list[str]:
    return [f"https://example.org/{number:09d}.jpg" for number in range(count)]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_a_change_makes_one_range_stale_wherever_it_is(tmp_path: Path, name: str) -> None:
    """A row put in, taken out or changed: all other ranges keep their ids, and so their vectors."""
    urls = rows_of_urls(10_000)

    def ids(*rows: str) -> set[str]:
        shards = shards_of(write_list(tmp_path / name, {"url": list(rows)}))
        sizes = [count_samples(shard, layout(), {}, 10**6) for shard in shards]
        assert sum(sizes) == len(rows)
        assert all(FEWEST_ROWS <= size <= MOST_ROWS for size in sizes[:-1])
        return {shard.id for shard in shards}

    before = ids(*urls)
    assert len(before) > 4
    assert ids(*urls) == before
    for place in (0, 5_555, 10_000):
        assert len(ids(*urls[:place], "https://example.org/new.jpg", *urls[place:]) - before) <= 2
    assert len(ids(*urls[:5_555], *urls[5_556:]) - before) <= 2
    assert len(before - ids(*urls[:7], urls[7] + "?", *urls[8:])) == 1


def test_a_range_is_stale_when_its_carried_field_changes_and_only_then(tmp_path: Path) -> None:
    (path,) = images_in(tmp_path, 1)
    carrying = References(column="url", fields=("label",))
    ids = {
        (label, seen): shards_of(write_list(tmp_path / "a.csv", {"url": [path], "label": [label], "seen": [seen]}), carrying)[
            0
        ].id
        for label in "ab"
        for seen in "cd"
    }
    assert ids["a", "c"] == ids["a", "d"] != ids["b", "c"] == ids["b", "d"]


def test_etags_of_objects_count_where_they_are_checked(tmp_path: Path) -> None:
    path = write_list(tmp_path / "a.csv", {"url": [*images_in(tmp_path, 2), "gone.png"]})

    def ids(*, checks: bool) -> list[str]:
        return [shard.id for shard in shards_of(path, References(column="url", checks=checks))]

    unchecked, checked = ids(checks=False), ids(checks=True)
    assert (ids(checks=False), ids(checks=True)) == (unchecked, checked)
    (tmp_path / "images" / "1.png").write_bytes(png(9))
    assert ids(checks=False) == unchecked
    changed = ids(checks=True)
    assert changed != checked
    (tmp_path / "gone.png").write_bytes(png(3))
    assert ids(checks=True) not in (checked, changed)


def test_only_wanted_rows_are_fetched(tmp_path: Path) -> None:
    path = write_list(tmp_path / "a.csv", {"url": images_in(tmp_path, 4)})
    (shard,) = shards_of(path)
    for gone in (0, 2):
        (tmp_path / "images" / f"{gone}.png").unlink()
    samples = list(read_samples(shard, layout(), {}, lambda number: number % 2 == 1))
    assert [sample.data for sample in samples] == [None, png(1), None, png(3)]
    assert all(sample.problem is None for sample in samples)


def test_an_object_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write_list(tmp_path / "a.csv", {"url": images_in(tmp_path, 1)})
    (sample,) = samples_of(path, max_bytes=100)
    assert (sample.data, sample.excess) == (None, len(png(0)))


BAD = [
    ("a.csv", "", r"its first line is \[\], expected the names"),
    ("a.csv", "url\n", "name no image"),
    ("a.jsonl", "", "name no image"),
    ("a.csv", "uri,label\na,b\n", r"has no column 'url', found \['uri', 'label'\]. Correct reference_column"),
    ("a.csv", "url,label\na,b\nc,d,e\n", "line 3 has 3 values, but the first line names 2 columns"),
    ("a.csv", "url,url\na,b\n", "expected the names of its columns, each once"),
    ("a.csv", 'url\n"a\n', "line 2 cannot be read as CSV"),
    ("a.csv", b"url\n\xff\xfe\n", "line .* is not UTF-8"),
    ("a.jsonl", '{"url": "a"}\nnope\n', "line 2 is not JSON"),
    ("a.jsonl", '["a"]\n', r'line 1 is \["a"\], expected one JSON object'),
    ("a.jsonl", '{"uri": "a"}\n', "has no column 'url', found"),
    ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ("a.parquet", "PAR1", "cannot be read as Parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(BAD)])
def test_a_list_that_cannot_be_read_is_one_message(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        shards_of(tmp_path / name)


def test_a_column_that_holds_no_paths_is_one_message(tmp_path: Path) -> None:
    write_list(tmp_path / "a.parquet", {"url": [1, 2]})
    with pytest.raises(ConfigError, match="column 'url' is of type int64, expected text"):
        shards_of(tmp_path / "a.parquet")
