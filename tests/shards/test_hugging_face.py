"""Parquet as Hugging Face `datasets` writes it: file names as keys, names of classes, and what the table keeps of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.errors import ColumnError
from lora_embed.schema import Sample, Shard
from lora_embed.shards.class_names import class_labels, namings_of
from lora_embed.shards.known_fields import known_fields
from lora_embed.store.store import Store
from lora_embed.table.compact import Source, compact, plan_compactions
from lora_embed.table.manifest import ShardCounts
from lora_embed.table.parts import make_part, write_part
from lora_embed.table.staging import part_paths
from samples import PREPROCESSING, layout, parquet_of, png, samples_of, shard_at

PETS = ["cat", "dog", "hen"]


def images(*paths: str | None) -> pa.Array:
    """A column of images as `datasets` writes it."""
    return pa.array([{"bytes": png(number), "path": path} for number, path in enumerate(paths)])


def keys(shard: Shard, **changes: Any) -> list[str]:
    return [sample.key for sample in samples_of(shard, **changes)]


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """A file that `datasets` itself wrote."""
    import datasets

    folder = tmp_path_factory.mktemp("pets")
    label = datasets.ClassLabel(names=PETS)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": label,
            "labels": datasets.Sequence(label),
            "objects": datasets.Sequence({"category": label, "area": datasets.Value("int64")}),
            "about": {"kind": label, "year": datasets.Value("int32")},
        }
    )
    rows = {
        "image": [{"bytes": png(number), "path": f"{number}.png"} for number in range(4)],
        "label": [0, 2, None, 1],
        "labels": [[0, 1], [], [2], None],
        "objects": [{"category": [1, 1], "area": [7, 8]}] * 4,
        "about": [{"kind": 2, "year": 2024}] * 4,
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "a.parquet"))
    return shard_at(folder / "a.parquet")


def carried(shard: Shard, field: str, kind: str = "string") -> list[Any]:
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(carry=((field, kind),)), PREPROCESSING, {})
    return list(chunk.samples.column(field).to_pylist())


def test_a_column_of_text_has_the_names_of_classes(pets: Shard) -> None:
    assert carried(pets, "label") == ["cat", "hen", None, "dog"]
    assert carried(pets, "about.kind") == ["hen"] * 4
    assert carried(pets, "about.year") == ["2024"] * 4
    assert [value and json.loads(value) for value in carried(pets, "labels")] == [["cat", "dog"], [], ["hen"], None]
    assert json.loads(carried(pets, "about")[0]) == {"kind": "hen", "year": 2024}
    (objects,) = set(carried(pets, "objects"))
    both = [{"category": "dog", "area": 7}, {"category": "dog", "area": 8}], {"category": ["dog", "dog"], "area": [7, 8]}
    assert json.loads(objects) in both  # by release


def test_a_column_of_numbers_has_the_numbers(pets: Shard) -> None:
    assert carried(pets, "label", "int64") == [0, 2, None, 1]
    assert carried(pets, "about.year", "int64") == [2024] * 4


def test_a_number_without_a_name_is_null(tmp_path: Path) -> None:
    features = {"label": {"names": PETS, "_type": "ClassLabel"}}
    schema = pa.schema([("label", pa.int64())], {"huggingface": json.dumps({"info": {"features": features}})})
    naming = namings_of(schema, ["label"])["label"]
    assert [naming(value) for value in (-1, 0, 3, None, "cat", 1.0)] == [None, "cat", None, None, None, None]


@pytest.mark.parametrize(
    "told",
    [
        b"", b"[", b"null", b"[]", b'{"info": 3}', b'{"info": {"features": []}}', b'{"info": {"features": {"label": 3}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": "abc"}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
        b'{"info": {"features": {"label": {"_type": "Value"}}}}', b"[" * 100_000,
        b'{"info": {"features": {"label": ' + b'{"a":' * 900 + b"0" + b"}" * 900 + b"}}}",
        b'{"info": {"features": {"label": ' + b'{"_type":"List","feature":' * 900 + b"0" + b"}" * 900 + b"}}}",
    ],
    ids=range(13),
)  # fmt: skip
def test_strange_metadata_give_no_names(told: bytes) -> None:
    schema = pa.schema([("label", pa.int64())], {"huggingface": told})
    assert namings_of(schema, ["label", "a.b"]) == {}
    assert class_labels(schema, ["label", "a.b"]) == {}


def test_the_path_of_an_image_is_its_key(pets: Shard, tmp_path: Path) -> None:
    assert keys(pets) == ["0.png", "1.png", "2.png", "3.png"]
    assert keys(pets, key_column="none") == [f"{number:010d}" for number in range(4)]
    assert keys(pets, key_column="about.year") == ["2024"] * 4
    assert carried(pets, "image.path") == ["0.png", "1.png", "2.png", "3.png"]
    plain = {"image": images("x.png", "y.png"), "id": ["a", "b"]}
    assert keys(shard_at(tmp_path / "b.parquet", parquet_of(plain))) == ["a", "b"]  # a column of keys comes first


def test_paths_that_repeat_or_are_absent_lose_no_image(tmp_path: Path) -> None:
    """Class folders that were pushed to a hub: `datasets` keeps only the last part of each path."""
    paths = ["1.png", "1.png", None, "", "1.png", "1.png#2", "0000000002"]
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": images(*paths)}, row_group_size=3))
    expected = ["1.png", "1.png#2", "0000000002", "0000000003", "1.png#3", "1.png#2#2", "0000000002#2"]
    assert keys(shard) == expected
    chunks = list(decode_shard(WorkItem(shard=shard, done=frozenset({0})), layout(), PREPROCESSING, {}))
    assert [key for chunk in chunks for key in chunk.samples.column("key").to_pylist()] == expected[4:]
    assert not any(chunk.samples.column("reason").null_count < chunk.samples.num_rows for chunk in chunks)
    same = shard_at(tmp_path / "b.parquet", parquet_of({"image": images(*["x"] * 5000)}, row_group_size=500))
    assert keys(same)[-1] == "x#5000"


def test_a_key_column_that_was_named_may_not_repeat(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": images("1.png", "1.png")}))
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(key_column="image.path"), PREPROCESSING, {})
    assert chunk.samples.column("reason").to_pylist() == [None, "duplicate_id"]


def test_a_part_that_a_struct_lacks_is_named(pets: Shard, tmp_path: Path) -> None:
    with pytest.raises(ColumnError, match=r"has no key column 'image\.file'"):
        samples_of(pets, key_column="image.file")
    twice = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["path", "path"])
    table = pa.table({"jpg": [png()], "about": twice})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(ColumnError, match=r"has no key column 'about\.path'"):
        samples_of(shard_at(tmp_path / "b.parquet"), key_column="about.path")
    assert {"label", "about.kind", "image.path"} <= set(known_fields(pets, {}))


def test_a_column_with_a_dot_in_its_name_comes_first(tmp_path: Path) -> None:
    columns = {"image": images("x.png"), "image.path": ["own"]}
    samples: list[Sample] = samples_of(shard_at(tmp_path / "a.parquet", parquet_of(columns)), carry=(("image.path", "string"),))
    assert [(sample.key, sample.fields) for sample in samples] == [("own", {"image.path": "own"})]


def written(folder: Path, shards: list[Shard], kind: str) -> Path:
    """One data file of these shards, with the field `label`."""
    store, how, sources = Store(str(folder)), layout(carry=(("label", kind),)), []
    for shard in shards:
        chunks = list(decode_shard(WorkItem(shard=shard), how, PREPROCESSING, {}))
        for chunk in chunks:
            vectors = np.ones((chunk.head.good, 3), np.float32)
            write_part(store, "space", how, chunk.head, make_part(chunk.head, chunk.samples, vectors, how))
        count = sum(chunk.head.good for chunk in chunks)
        record = ShardCounts(id=shard.id, name=shard.name, samples=count, vectors=count, rejects=0)
        sources.append(Source(shards=(record,), parts=part_paths("space", how, [chunk.head.part for chunk in chunks])))
    (task,) = plan_compactions(sources, how, "space", 3)
    entry, _ = compact(store, task)
    again, _ = compact(store, plan_compactions([Source(shards=entry.shards, data=entry.path)], how, "space", 3)[0])
    assert again.sha256 == entry.sha256  # a file that is rewritten keeps what it tells
    return folder / entry.path


def test_a_table_of_numbers_tells_datasets_their_names(pets: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.load_dataset("parquet", data_files=str(written(tmp_path / "numbers", [pets], "int64")), split="train")
    assert rows.features["label"] == datasets.ClassLabel(names=PETS)
    assert rows["label"][:] == [0, 2, None, 1]
    assert len(rows[0]["embedding"]) == 3
    rows = datasets.load_dataset("parquet", data_files=str(written(tmp_path / "names", [pets], "string")), split="train")
    assert (rows.features["label"], rows["label"][:]) == (datasets.Value("string"), ["cat", "hen", None, "dog"])


def test_numbers_with_different_names_get_none(pets: Shard, tmp_path: Path) -> None:
    """Of two datasets with other classes, or of one without names, a number says nothing by itself."""
    features = {"label": {"names": PETS[::-1], "_type": "ClassLabel"}}
    others = {"other": {"huggingface": json.dumps({"info": {"features": features}})}, "without": {}}
    for name, told in others.items():
        table = pa.table({"image": images("z.png"), "label": [1]}).replace_schema_metadata(told)
        pq.write_table(table, tmp_path / f"{name}.parquet")
        path = written(tmp_path / name, [pets, shard_at(tmp_path / f"{name}.parquet")], "int64")
        assert b"huggingface" not in (pq.read_schema(path).metadata or {})
