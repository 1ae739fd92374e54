"""Reading: every sample in order to a proven end, or an error that says incomplete; never silently short."""

import gzip
import io
import os
import re
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_embed.entries import Entry
from lora_embed.errors import ShardError
from lora_embed.schema import Shard, ShardKind
from lora_embed.shards.kinds import Kind
from lora_embed.shards.known_fields import known_fields
from lora_embed.shards.listing import list_shards
from lora_embed.shards.parquet import read_parquet
from lora_embed.shards.read import CANNOT, count_samples, read_samples
from lora_embed.shards.tar import read_tar
from samples import layout, parquet_of, samples_of, shard_at, tar_of, tar_shard, touch_files

THREE = [("a.jpg", b"A" * 700), ("a.json", b'{"x": 1}'), ("b.jpg", b""), ("c.jpg", b"C" * 512)]


def keys_of(shard: Shard) -> list[str]:
    return [sample.key for sample in samples_of(shard)]


class Counting(io.BytesIO):
    """Counts the bytes that are read of it."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_every_kind_of_shard_has_its_words_and_but_for_references_is_a_kind_of_file() -> None:
    assert set(CANNOT) == set(get_args(ShardKind)) == {*get_args(Kind), "references"}


def test_a_kind_without_a_reader_is_read_by_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CANNOT, "zip", "no zip")
    shard = replace(tar_shard(tmp_path, THREE), kind="zip")
    with pytest.raises(ShardError, match=r"no zip .*Expected code to be unreachable"):
        samples_of(shard)
    assert known_fields(tar_shard(tmp_path, THREE), {}) == ["x"]
    assert known_fields(shard, {}) == []


def test_members_of_a_name_are_one_sample(tmp_path: Path) -> None:
    members = [
        ("./x/a.JPG", b"1"), ("x/a.json", b'{"label": 3, "other": 4}'), ("x/a.txt", b" caption\n"), ("x/a.seg.png", b"mask"),
        ("y/a.png", b"2"), ("y/a.jpg", b"second image"), ("y.z/b.c.d.webp", b"?"), ("c.cls", b"7"), ("README", b"-"),
    ]  # fmt: skip
    samples = samples_of(tar_shard(tmp_path, members), carry=(("label", "int64"), ("txt", "string"), ("cls", "int64")))
    assert [(sample.key, sample.data, sample.fields) for sample in samples] == [
        ("x/a", b"1", {"label": 3, "txt": "caption"}),
        ("y/a", b"2", {}),
        ("y.z/b.c.d", b"?", {}),  # no y.z/b.webp stands beside it
        ("c", None, {"cls": "7"}),
        ("README", None, {}),
    ]


def test_a_member_twice_is_two_samples(tmp_path: Path) -> None:
    """Else one of the images would be neither a vector nor a reject."""
    samples = samples_of(tar_shard(tmp_path, [("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4")]))
    assert [(sample.key, sample.data) for sample in samples] == [("a", b"1"), ("a", b"2"), ("b", b"3"), ("a", b"4")]


def test_files_that_macos_adds_are_no_samples(tmp_path: Path) -> None:
    members = [("./._a.jpg", b"fork"), ("./a.jpg", b"1"), ("./._a.json", b"fork"), ("./a.json", b"{}"), (".DS_Store", b"")]
    assert [(sample.key, sample.data) for sample in samples_of(tar_shard(tmp_path, members))] == [("a", b"1")]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_links_and_directories(tmp_path: Path, kind: int) -> None:
    long = "é/" * 60 + "n" * 120
    buffer = io.BytesIO(tar_of([(f"{long}.jpg", b"1"), ("b.jpg", b"22")], kind=kind))
    with tarfile.open(fileobj=buffer, mode="a", format=kind, pax_headers={"comment": "x"}) as tar:
        for name, type_ in (("d.jpg", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type_, "b.jpg"
            tar.addfile(member)
    samples = samples_of(shard_at(tmp_path / "a.tar", buffer.getvalue()))
    assert [(sample.key, sample.data) for sample in samples] == [(long, b"1"), ("b", b"22"), ("s", b"22"), ("h", b"22")]


def test_names_that_are_not_utf8_become_keys_that_are(tmp_path: Path) -> None:
    data = tar_of([("caf\xe9.jpg", b"1"), ("caf\xe8.jpg", b"2")], encoding="latin-1")
    assert keys_of(shard_at(tmp_path / "a.tar", data)) == ["caf\\xe9", "caf\\xe8"]


def test_an_empty_tar_has_a_proven_end(tmp_path: Path) -> None:
    assert samples_of(tar_shard(tmp_path, [])) == []
    assert samples_of(shard_at(tmp_path / "least.tar", bytes(1024))) == []


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    """In a member, in a header, between members, between the closing blocks; wanted or skipped; from its end to nothing."""
    data = tar_of(THREE)
    end = -(-len(data.rstrip(b"\0")) // 512) * 512  # of the members
    assert end < len(data) - 1024
    for length in range(1, end + 1024):
        if length == end + 512:  # one closing block, and the file ends with it
            continue
        cut = io.BytesIO(data[:length])
        shard = Shard(id="0", name="a.tar", prefix="a.tar", kind="tar", root="r", files=(Entry("a.tar", length, "1"),))
        for wanted in (True, False):
            with pytest.raises(ShardError, match=r"^r/a.tar: incomplete"):
                list(read_tar(cut, shard, layout(), lambda number, wanted=wanted: wanted))
    path = tmp_path / "a.tar"
    for length in (1, 100, 512, 900, 1024, end - 512, end, end + 511, end + 513, end + 1023):
        with pytest.raises(ShardError, match=r"a.tar: incomplete"):
            samples_of(shard_at(path, data[:length]))
    with pytest.raises(ShardError, match="incomplete tar"):  # fewer bytes come than were listed, though none of a member
        list(read_tar(io.BytesIO(data[:-1]), shard_at(path, data), layout(), lambda number: True))
    for length in (end + 512, end + 1024, end + 1100, len(data)):  # past the two closing blocks nothing is missing
        assert keys_of(shard_at(path, data[:length])) == ["a", "b", "c"]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=1200)), max_size=4), st.randoms(use_true_random=False))
def test_no_prefix_of_any_tar_is_short(members: list[tuple[str, bytes]], random: Any) -> None:
    data = tar_of([(f"{number}{name}.jpg", content) for number, (name, content) in enumerate(members)])
    length = random.randrange(1, len(data))
    shard = Shard(id="0", name="a.tar", prefix="a.tar", kind="tar", root="r", files=(Entry("a.tar", length, "1"),))
    try:
        samples = list(read_tar(io.BytesIO(data[:length]), shard, layout(), lambda number: number % 2 == 0))
    except ShardError as error:
        assert "incomplete" in str(error)  # noqa: PT017
    else:
        assert len(samples) == len(members)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", b"", "has 0 bytes, but even an empty tar has"),
        ("a.tar", b"\x89PNG" * 500, "is not a tar, although its name says so"),
        (
            "a.tar",
            tar_of(THREE) + tar_of(THREE),
            "holds two tars, one after the other: the second begins at byte 10240 of 20480",
        ),
        ("a.tar", tar_of(THREE) + b"more" * 128, "incomplete or damaged tar: its members end at byte .* Upload it again"),
        (
            "a.tar",
            gzip.compress(tar_of([("a.jpg", os.urandom(2000))])),
            "is not a tar, .*: it begins with gzip data. .* the ending .tar.gz",
        ),
        ("a.tar", b"<!DOCTYPE html><html>" + b" " * 600, "is not a tar, .*: it begins with an HTML page"),
        ("a.tar", tar_of(THREE).replace(b"c.jpg", b"c.jpx"), "incomplete or damaged tar: its members end at byte"),
        ("a.tar", tar_of(THREE)[:4096] + bytes(2**21), "only zeros follow, as if the file was never written"),
        ("a.parquet", b"", "cannot be read as Parquet to its end"),
        ("a.parquet", b"<!DOCTYPE html><html>", "is not Parquet, although its name says so. It has 21 bytes of an HTML page"),
        ("a.parquet", b"PAR1 and then" + b"PARE", "is encrypted Parquet, which is not read. Write it without encryption"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as Parquet to its end"),
        ("a.parquet", parquet_of({"image": [b"x" * 99] * 9})[:-1], "cannot be read as Parquet to its end"),
        ("a.parquet", parquet_of({"image": [b"x" * 99] * 9})[:200], "cannot be read as Parquet to its end"),
        (
            "a.parquet",
            parquet_of({"label": [1]}),
            r"expected one of image, .* of binary type, found \['label'\]\. No column can hold an image\. Leave",
        ),
        (
            "a.parquet",
            parquet_of({"image": [{"bytes": 1}]}),
            "column 'image' is of type struct<bytes: int64>, expected the bytes",
        ),
    ],
)
def test_damaged_shards(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        samples_of(shard_at(tmp_path / name, data))


def test_a_declared_size_takes_no_memory(tmp_path: Path) -> None:
    data = bytearray(tar_of(THREE))
    data[124:136] = b"77777777777\0"  # 8 GB
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    shard = shard_at(tmp_path / "a.tar", bytes(data))
    tracemalloc.start()
    with pytest.raises(ShardError, match="incomplete tar, cut short at 10240 bytes"):
        samples_of(shard)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 1e6


def test_parquet_columns_and_row_groups(tmp_path: Path) -> None:
    columns = {"image": [b"1", None, b"3", b"4", b"5"], "label": [1, 2, None, 4, 5]}
    numbered = samples_of(shard_at(tmp_path / "a.parquet", parquet_of(columns)), carry=(("label", "int64"), ("no", "string")))
    assert [(sample.key, sample.data, sample.fields["label"]) for sample in numbered] == [
        (f"{row:010d}", columns["image"][row], columns["label"][row]) for row in range(5)
    ]
    keyed = parquet_of(columns | {"key": ["k", None, "b", "", "k"], "id": [1, 2, 3, 4, 5], "raw": [b"caf\xe9"] * 5})
    shard = shard_at(tmp_path / "b.parquet", keyed)
    assert keys_of(shard) == ["k", "0000000001", "b", "", "k"]
    assert [sample.key for sample in samples_of(shard, key_column="id")] == ["1", "2", "3", "4", "5"]
    assert [sample.key for sample in samples_of(shard, key_column="raw")] == ["caf\\xe9"] * 5
    with pytest.raises(ShardError, match="has no key column 'nope'"):
        samples_of(shard, key_column="nope")
    with pytest.raises(ShardError, match="column 'label' is of type int64, expected the bytes of image files"):
        samples_of(shard, image_column="label")
    assert samples_of(shard_at(tmp_path / "empty.parquet", parquet_of({"image": pa.array([], pa.binary())}))) == []


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), "struct"])
def test_parquet_types_that_hold_bytes(tmp_path: Path, kind: Any) -> None:
    if kind == "struct":  # of Hugging Face datasets
        images = pa.array([{"bytes": b"1", "path": "a.jpg"}, {"bytes": None, "path": "b"}, None])
    else:
        images = pa.array([b"1", None, None], kind)
    samples = samples_of(shard_at(tmp_path / "a.parquet", parquet_of({"photo": images})), image_column="photo")
    assert [sample.data for sample in samples] == [b"1", None, None]


def test_parquet_text_that_is_no_utf8_is_damage(tmp_path: Path) -> None:
    raw = pa.array([b"caf\xe9"]).view(pa.string())
    with pytest.raises(ShardError, match=r"cannot be read as Parquet to its end .*utf-8"):
        samples_of(shard_at(tmp_path / "a.parquet", parquet_of({"image": [b"1"], "key": raw})))


def test_skipped_samples_are_not_read(tmp_path: Path) -> None:
    big = os.urandom(200_000)
    for name, data in (("a.tar", tar_of([(f"{number}.jpg", big) for number in range(4)])),
                       ("a.parquet", parquet_of({"key": list("0123"), "image": [big] * 4}, row_group_size=1))):  # fmt: skip
        shard = shard_at(tmp_path / name, data)
        reader: Any = read_tar if name == "a.tar" else read_parquet
        counts = []
        for wanted in (set(), {2}, {0, 1, 2, 3}):
            file = Counting(data)
            samples = list(reader(file, shard, layout(), wanted.__contains__))
            assert [sample.key for sample in samples] == list("0123")
            assert [number for number, sample in enumerate(samples) if sample.data == big] == sorted(wanted)
            counts.append(file.count)
        assert counts[0] < 70_000  # pyarrow reads a Parquet file's last 64 KiB at once
        assert counts[1] < 300_000
        assert count_samples(shard, layout(), {}, most=9) == 4
        assert count_samples(shard, layout(), {}, most=3) == 3


def test_loose_images_are_read_whole_and_in_order(tmp_path: Path) -> None:
    touch_files(tmp_path, "b.jpg", "a.jpg", "é c.png")
    (shard,) = list_shards((str(tmp_path),), {})
    samples = list(read_samples(shard, layout(), {}, lambda number: number != 1))
    assert [(sample.key, sample.data) for sample in samples] == [("a.jpg", b"x"), ("b.jpg", None), ("é c.png", b"x")]


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jpg"])
def test_a_shard_that_changes_after_it_was_listed(tmp_path: Path, name: str) -> None:
    data = {"a.tar": tar_of(THREE), "a.parquet": parquet_of({"image": [b"1"] * 3}), "a.jpg": b"x"}[name]
    path = tmp_path / name
    shard = shard_at(path, data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(ShardError, match=r"a\.\w+: changed since it was listed with \d+ bytes and etag \d+: now it has"):
        samples_of(shard)
    shard = shard_at(path, data)
    path.write_bytes(data + b"more")
    with pytest.raises(ShardError, match="changed since it was listed"):
        samples_of(shard)
    path.unlink()
    with pytest.raises(ShardError, match=r"it is gone\. Run the same command again"):
        samples_of(shard)
    if name != "a.jpg":  # replaced while it is read: the end is not proven
        samples = read_samples(shard_at(path, data), layout(), {}, lambda number: True)
        next(samples)
        path.write_bytes(data + bytes(512))
        with pytest.raises(ShardError, match="changed since it was listed"):
            list(samples)


def test_a_disk_that_fails_is_not_called_damage(tmp_path: Path) -> None:
    class Failing(Counting):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    parquet = parquet_of({"image": [b"1"]})
    for name, data, reader in (("a.tar", tar_of(THREE), read_tar), ("b.parquet", parquet, read_parquet)):
        with pytest.raises(OSError, match=re.escape("[Errno 5] Input/output error")):
            list(reader(Failing(data), shard_at(tmp_path / name, data), layout(), lambda number: True))
