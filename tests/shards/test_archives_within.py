"""Archives in the place of images: each is named as such, with what helps."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from lora_embed.errors import ConfigError, ShardError
from lora_embed.schema import Sample
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from samples import layout, png, tar_of


def read(folder: Path, name: str, data: bytes) -> list[Sample]:
    (folder / name).write_bytes(data)
    (shard,) = list_shards((str(folder / name),), {})
    return list(read_samples(shard, layout(), {}, lambda number: True))


@pytest.mark.parametrize(
    "inner", ["0001.tar", "0001.tar.gz", "0001.tgz", "a/0001.zip", "0001.parquet", "0001.2024.TAR", "0001.7z"]
)
def test_an_archive_in_a_tar_is_a_reject_that_says_so(tmp_path: Path, inner: str) -> None:
    samples = read(tmp_path, "outer.tar", tar_of([(inner, tar_of([("a.png", png(1))])), ("b.png", png(2))]))
    assert [sample.data is None for sample in samples] == [True, False]
    assert "is an archive (." in samples[0].missing
    assert "Unpack the tar, and name what it holds as input" in samples[0].missing


def test_a_sample_without_an_image_says_what_it_has(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, "a.tar", tar_of([("a.json", b"{}"), ("a.cls", b"1")]))
    assert sample.missing == "the sample has no image, but cls, json"


@pytest.mark.parametrize("name", ["a.zip", "a.7z", "a.rar", "a.tar.lzma", "b.gz"])
def test_a_folder_or_file_of_archives_says_what_helps(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4" + bytes(100))
    for pattern in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match=r"Of archives, only tars are read .* pack its files into a tar"):
            list_shards((str(pattern),), {})


PLAIN = tar_of([("a.png", png(1))])


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.tar.gz", PLAIN, "begins with a tar. Give its name the ending .tar"),
        ("a.tgz", PLAIN, "is not gzip data"),
        ("a.tar.zst", PLAIN, "is not zstd data"),
        ("a.tar.lz4", gzip.compress(PLAIN), "is not lz4 data, .* begins with gzip data"),
        ("a.tar.xz", bz2.compress(PLAIN), "is not xz data, .* begins with bzip2 data"),
        ("a.tar.bz2", lzma.compress(PLAIN), "is not bz2 data, .* begins with xz data"),
        ("a.tar", gzip.compress(PLAIN), "the ending .tar.gz"),
        ("a.tar", bz2.compress(PLAIN * 9) * 9, "the ending .tar.bz2"),
        ("a.tar", b"PK\3\4" + bytes(999), "Unpack it, and pack its files into a tar"),
    ],
)
def test_a_sound_archive_of_another_name_is_not_to_be_uploaded_again(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    with pytest.raises(ShardError, match=says) as error:
        read(tmp_path, name, data)
    assert "Upload it again" not in str(error.value)


def test_a_damaged_compressed_tar_is(tmp_path: Path) -> None:
    assert [sample.key for sample in read(tmp_path, "a.tar.gz", gzip.compress(PLAIN))] == ["a"]
    with pytest.raises(ShardError, match="Upload it again, or make it again if the original has the same fault"):
        read(tmp_path, "b.tar.gz", gzip.compress(PLAIN)[:-20])
