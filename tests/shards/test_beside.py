"""Fields of loose images, partitions and folders; a changed file of fields makes its shard stale; an absent field is said."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lora_embed.entries import Entries
from lora_embed.errors import ShardError
from lora_embed.schema import Shard
from lora_embed.shards import image_groups, metadata
from lora_embed.shards.beside import FilesBeside, assign
from lora_embed.shards.listing import list_input
from lora_embed.shards.look import absent_fields
from lora_embed.shards.read import read_samples
from samples import layout, parquet_of, png, tar_of

Carry = tuple[tuple[str, str], ...]
OF_IMAGES = {"file_name": ["a.jpg", "sub\\b.jpg", "sub/c.jpg", "gone.jpg"], "label": ["cat", "dog, big", "", "x"]}


def write(folder: Path, **files: bytes | str) -> None:
    """Files by name; `__` stands for a slash, `_DOT_` for a dot."""
    for name, data in files.items():
        put(folder / name.replace("__", "/").replace("_DOT_", "."), data)


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    os.utime(path, (1_700_000_000, 1_700_000_000))


def shards_of(*places: Path | str, fields: tuple[str, ...] = ("label",)) -> list[Shard]:
    return list_input(tuple(map(str, places)), {}, fields=fields).shards


def fields_of(*places: Path | str, fields: tuple[str, ...] = ("label",)) -> dict[str, dict[str, Any]]:
    carry = tuple((name, "string") for name in fields)
    return {
        (f"{shard.prefix}/" if shard.prefix else "") + sample.key: sample.fields
        for shard in shards_of(*places, fields=fields)
        for sample in read_samples(shard, layout(carry=carry), {}, lambda number: True)
    }


def test_files_beside_an_image_hold_its_fields(tmp_path: Path) -> None:
    for name in ("x.jpg", "y.1.jpg", "z.PNG", "alone.jpg"):
        put(tmp_path / name, png())
    put(tmp_path / "x.json", '{"label": "cat", "other": 1}')
    put(tmp_path / "y.1.jpg.json", b"\xef\xbb\xbf" + b'{"label": 7}')
    put(tmp_path / "z.label", " dog\n")
    put(tmp_path / "none.label", "nobody's")
    put(tmp_path / "x.txt", "a caption")
    listing = list_input((str(tmp_path),), {}, fields=("label",))
    assert listing.passed_over == {".label": 1, ".txt": 1}  # what gives no field is counted
    assert fields_of(tmp_path) == {
        "x.jpg": {"label": "cat"},
        "y.1.jpg": {"label": 7},
        "z.PNG": {"label": "dog"},
        "alone.jpg": {},
    }
    assert fields_of(tmp_path, fields=("txt",))["x.jpg"] == {"txt": "a caption"}
    assert fields_of(f"{tmp_path}/*.jpg")["x.jpg"] == {"label": "cat"}  # a pattern of images alone finds them too


def test_text_in_other_encodings_loses_its_mark(tmp_path: Path) -> None:
    for name, data in (("a", "chat é".encode("utf-16")), ("b", "\ufeffé".encode()), ("c", b"caf\xe9")):
        put(tmp_path / f"{name}.jpg", png())
        put(tmp_path / f"{name}.label", data)
    assert [found["label"] for found in fields_of(tmp_path).values()] == ["chat é", "é", "caf\ufffd"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label,n\na.jpg,cat,1\n./sub/b.jpg,\"dog, big\",2\nsub\\c.jpg,,3\ngone.jpg,x,4\n"),
        ("metadata.csv", "\ufefffile_name;label;n\r\na.jpg;cat;1\r\nsub/b.jpg;dog, big;2\r\nsub/c.jpg;;3\r\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "label": "cat"}\n\n{"file_name": "sub/b.jpg", "label": "dog, big"}\n'
            '{"file_name": "sub/c.jpg", "label": ""}\n["no row"]\n{"label": "no name"}\n',
        ),
        ("metadata.parquet", parquet_of(OF_IMAGES)),
        ("METADATA.PARQUET", parquet_of({**OF_IMAGES, "file_name": pa.array(OF_IMAGES["file_name"]).cast(pa.binary())})),
        ("metadata.parquet", parquet_of({**OF_IMAGES, "file_name": ["a.jpg", "./sub/b.jpg", "sub/c.jpg", None]})),
    ],
)  # fmt: skip
def test_metadata_of_an_image_folder(tmp_path: Path, name: str, text: bytes | str) -> None:
    for path in ("a.jpg", "sub/b.jpg", "sub/c.jpg", "sub/d.jpg"):
        put(tmp_path / path, png())
    put(tmp_path / name, text)
    assert list_input((str(tmp_path),), {}, fields=("label",)).passed_over == {}
    assert fields_of(tmp_path) == {
        "a.jpg": {"label": "cat"}, "sub/b.jpg": {"label": "dog, big"}, "sub/c.jpg": {"label": ""}, "sub/d.jpg": {},
    }  # fmt: skip


def test_a_table_is_metadata_only_where_images_lie_at_it_or_below(tmp_path: Path) -> None:
    """A Parquet file of that name may hold images itself; and one that is named outright is read."""
    put(tmp_path / "images" / "a.jpg", png())
    put(tmp_path / "images" / "metadata.parquet", parquet_of(OF_IMAGES))
    put(tmp_path / "tables" / "metadata.parquet", parquet_of({"image": [png()]}))
    listing = list_input((str(tmp_path),), {})
    assert [shard.name for shard in listing.shards] == ["images/#0000of0001", "tables/metadata.parquet"]
    assert listing.passed_over == {".parquet": 1}
    named = list_input((f"{tmp_path}/images/metadata.parquet",), {})
    assert [shard.kind for shard in named.shards] == ["parquet"]
    (tmp_path / "images" / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ShardError, match=r"metadata.parquet"):
        fields_of(tmp_path / "images")


def test_the_nearest_metadata_and_an_image_s_own_file_come_first(tmp_path: Path) -> None:
    for path in ("train/a.jpg", "train/b.jpg", "train/c.jpg"):
        put(tmp_path / path, png())
    put(tmp_path / "metadata.csv", "file_name,label,extra\ntrain/a.jpg,far,1\ntrain/b.jpg,far,2\ntrain/c.jpg,far,3\n")
    put(tmp_path / "train/metadata.jsonl", '{"file_name": "b.jpg", "label": "near"}\n{"file_name": "c.jpg", "label": "near"}\n')
    put(tmp_path / "train/c.json", '{"label": "own"}')
    found = fields_of(tmp_path, fields=("label", "extra"))
    assert [fields["label"] for fields in found.values()] == ["far", "near", "own"]
    assert [fields["extra"] for fields in found.values()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("metadata.csv", b"file_name,label\na.jpg,caf\xe9\n", "is not UTF-8, expected text in UTF-8. Save it as UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.jpg"\n', "cannot be read .*Correct it, or leave carry out of the job"),
        ("metadata.csv", b'file_name,label\na.jpg,"' + b"x" * 17_000_000 + b'"\n', "a line of more than 16777216 characters"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    put(tmp_path / "a.jpg", png())
    put(tmp_path / name, data)
    with pytest.raises(ShardError, match=message):
        fields_of(tmp_path)


def test_a_changed_file_of_fields_makes_its_shard_stale_where_fields_are_carried(tmp_path: Path) -> None:
    for path in ("a/x.jpg", "b/y.jpg"):
        put(tmp_path / path, png())
    plain, bare = [shard.id for shard in shards_of(tmp_path, fields=())], [shard.id for shard in shards_of(tmp_path)]
    assert plain == bare, "without files of fields, ids are those of before"
    put(tmp_path / "a/x.json", '{"label": 1}')
    assert [shard.id for shard in shards_of(tmp_path, fields=())] == plain
    first = [shard.id for shard in shards_of(tmp_path)]
    assert (first[0] != plain[0], first[1] == plain[1]) == (True, True)
    put(tmp_path / "a/x.json", '{"label": 22}')
    assert [old == new for old, new in zip(first, [shard.id for shard in shards_of(tmp_path)], strict=True)] == [False, True]
    (shard, _) = shards_of(tmp_path)
    put(tmp_path / "a/x.json", '{"label": 333}')
    with pytest.raises(ShardError, match=r"x\.json: changed since it was listed"):
        list(read_samples(shard, layout(carry=(("label", "string"),)), {}, lambda number: True))


def test_partitions_and_folders_are_fields(tmp_path: Path) -> None:
    put(tmp_path / "label=cat/year=2024/part-0.parquet", parquet_of({"image": [png()], "id": ["k"]}))
    put(tmp_path / "label=a%20dog/t.tar", tar_of([("one/1.jpg", png()), ("2.jpg", png()), ("2.json", b'{"label": "own"}')]))
    put(tmp_path / "label=__HIVE_DEFAULT_PARTITION__/x.jpg", png())
    put(tmp_path / "bird/y.jpg", png())
    found = fields_of(tmp_path, fields=("label", "year", "folder"))
    assert found == {
        "label=cat/year=2024/part-0.parquet/k": {"label": "cat", "year": "2024", "folder": "year=2024"},
        "label=a%20dog/t.tar/one/1": {"label": "a dog", "folder": "one"},
        "label=a%20dog/t.tar/2": {"label": "own", "folder": "label=a%20dog"},
        "label=__HIVE_DEFAULT_PARTITION__/x.jpg": {"label": None, "folder": "label=__HIVE_DEFAULT_PARTITION__"},
        "bird/y.jpg": {"folder": "bird"},
    }
    assert fields_of(tmp_path / "label=cat")["year=2024/part-0.parquet/k"] == {"label": "cat"}  # of the root
    assert fields_of(tmp_path / "bird", fields=("folder",)) == {"y.jpg": {"folder": "bird"}}
    columns = parquet_of({"image": [png()], "label": ["column"]})
    put(tmp_path / "label=cat/own.parquet", columns)
    assert fields_of(tmp_path / "label=cat/own.parquet") == {"own.parquet/0000000000": {"label": "column"}}


def absent(folder: Path, *carry: tuple[str, str], **changes: Any) -> list[str]:
    shards = shards_of(folder, fields=tuple(name for name, _ in carry))
    return [absence.describe() for absence in absent_fields(shards, layout(carry=carry, **changes), {})]


def test_a_field_that_no_sample_has_is_found_without_reading_images(tmp_path: Path) -> None:
    texts = [json.dumps({"label": "cat", "n": None if number < 5 else 3}).encode() for number in range(9)]
    members = [pair for number, text in enumerate(texts) for pair in ((f"{number}.jpg", png()), (f"{number}.json", text))]
    put(tmp_path / "a.tar", tar_of(members))
    put(tmp_path / "b.parquet", parquet_of({"image": [png()] * 3, "day": ["x", None, "y"]}))
    assert absent(tmp_path, ("label", "string"), ("n", "int64"), ("day", "string")) == []
    (misspelt,) = absent(tmp_path, ("label", "string"), ("lable", "string"))
    assert "lable: of the first 12 samples of 2 shards, none has that field. a.tar has the fields label, n." in misspelt
    assert "Did you mean 'label'?" in misspelt
    put(tmp_path / "loose" / "x.jpg", png())
    put(tmp_path / "loose" / "metadata.csv", "file_name,label,hint\nx.jpg,a,b\n")
    assert "has the fields file_name, hint, label. Did you mean 'hint'?" in absent(tmp_path / "loose", ("hints", "string"))[0]
    put(tmp_path / "loose" / "metadata.parquet", parquet_of({"file_name": ["x.jpg"], "day": ["x"]}))
    assert "has the fields day, file_name, hint, label." in absent(tmp_path / "loose", ("hints", "string"))[0]
    (tmp_path / "loose" / "x.jpg").unlink()
    put(tmp_path / "only" / "b.parquet", parquet_of({"image": [png()], "Label": ["x"]}))
    assert "b.parquet has the fields Label, image. Did you mean 'Label'?" in absent(tmp_path / "only", ("label", "string"))[0]
    (tmp_path / "only" / "b.parquet").unlink()
    (other_type,) = absent(tmp_path, ("label", "int64"))
    assert "none has it as int64, but as 'cat', 'cat', 'cat'. Carry it as text: label" in other_type
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 99)
    assert absent(tmp_path, ("day", "string")) == []
    (tmp_path / "b.parquet").unlink()
    assert absent(tmp_path, ("day", "string")) == [], "the run itself says what is wrong with the shard"


@pytest.mark.parametrize(("kept", "times"), [(10**6, 2), (1000, 12)])
def test_metadata_of_many_shards_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, times: int) -> None:
    """Unless it is large. After a change, it is read again."""
    monkeypatch.setattr(image_groups, "IMAGES_PER_GROUP", 4)
    monkeypatch.setattr(metadata, "MOST_KEPT", kept)
    read, rows = list[str](), metadata._rows
    monkeypatch.setattr(metadata, "_rows", lambda store, entry, *rest: (read.append(entry.etag), rows(store, entry, *rest))[1])
    for number in range(16):
        put(tmp_path / f"{number}.jpg", png())
    for label in ("cat", "a dog"):
        lines = [f"{number}.jpg,{label} {number}" for number in range(16)]
        put(tmp_path / "metadata.csv", "\n".join(["file_name,label", *lines]))
        put(tmp_path / "none" / "x.jpg", png())
        found = fields_of(tmp_path)
        assert found.pop("none/x.jpg") == {}
        assert found == {f"{number}.jpg": {"label": f"{label} {number}"} for number in range(16)}
    assert len(shards_of(tmp_path)) == 5
    assert len(read) == times


@pytest.mark.parametrize(("files", "most"), [(1, 150), (50_000, 330)])
def test_files_beside_many_images_take_little_memory(files: int, most: int) -> None:
    """The listing of a million images, of which few or all have a file of fields, must not hold a million records at once."""
    groups = {(number, 2): Entries((f"{image:06d}.jpg", 1, "e", "") for image in range(number, 50_000, 2)) for number in (0, 1)}
    tracemalloc.start()
    try:
        beside = FilesBeside(["label"])
        for number in range(files):
            beside.add((f"{number + 7:06d}.json", 1, "e", ""))
        dealt = beside.deal("", groups)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (
        sorted(path for group in dealt.values() for path in group.paths())
        == [f"{n + 7:06d}.json" for n in range(files)][:49_993]
    )
    assert all(int(path[:6]) % 2 == number for (number, _), group in dealt.items() for path in group.paths())
    assert beside.finish() == ({} if files == 1 else {".json": 7})
    assert peak < most * 50_000


def test_files_beside_images_of_many_groups(tmp_path: Path) -> None:
    """Each image has the fields of its own files, and a copy of the folder, whose files come in another order, equal ids."""
    names, listings = [f"{number:04d}" for number in range(3000)], []
    for place, ordered in (("first", names), ("copy", names[::-1])):
        folder = tmp_path / place / "in"
        for name in ordered:
            put(folder / f"{name}.jpg", b"x")
            put(folder / f"{name}.json", json.dumps({"label": name}))
        put(folder / "0007.png", b"x")  # shares its file with an image of another group
        put(folder / "0008.jpg.label", "its own")
        put(folder / "lonely.json", "{}")
        listings.append(list_input((str(folder),), {}, fields=("label",)))
    first, copy = listings
    assert first.passed_over == {".json": 1}
    beside: dict[str, list[str]] = {}
    for shard in first.shards:
        files = assign({entry.path for entry in shard.files}, shard.sidecars)
        beside.update({path: [entry.path for entry in entries] for path, entries in files.items()})
    expected = {f"{name}.jpg": [f"{name}.json"] for name in names} | {"0007.png": ["0007.json"]}
    assert beside == expected | {"0008.jpg": ["0008.jpg.label", "0008.json"]}
    assert sum(len(shard.sidecars) for shard in first.shards) == 3002
    assert [shard.id for shard in first.shards] == [shard.id for shard in copy.shards]
