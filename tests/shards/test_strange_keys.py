"""Names with the characters of patterns: what exists as it is written is meant, on a disk and on a real S3 server."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_embed.errors import ConfigError
from lora_embed.schema import Sample, Shard
from lora_embed.shards.listing import list_shards
from lora_embed.shards.patterns import expand_braces
from lora_embed.shards.read import read_samples
from lora_embed.store.store import Store
from s3 import S3Server, s3_server
from samples import layout, png, tar_of

STRANGE = (
    "a::b.tar", "photos[1].tar", "set{1,2}.tar", "what?.tar", "no#1.tar", "star*.tar", "50%25.tar", "a+b c.tar", "é.tar",
    "x[!a].tar", "simplecache::x.tar", "}{.tar", "dir[1]/in::side.tar", "zip:__x.tar",
    "a?x=1.tar", "a?x=1&y=2.tar", "a;v=1.tar", "a#n=1.tar",
)  # fmt: skip
DECOYS = ("photos1.tar", "set1.tar", "set2.tar", "whatX.tar", "star1.tar", "xb.tar", "dir1/in::side.tar")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("strange")
        yield server


@pytest.fixture(params=["disk", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """A folder that holds a tar of each name; the image's key tells which tar it is."""
    if request.param == "s3":
        root, options = "s3://strange/folder", request.getfixturevalue("server").options()
    else:
        root, options = (str(tmp_path), {}) if request.param == "disk" else (f"memory://{tmp_path.name}", {})
    store = Store(root, options)
    for number, name in enumerate((*STRANGE, *DECOYS)):
        store.create(name, tar_of([(f"{number}.png", png(number))]))
    return root, options


def test_a_strange_name_is_found_and_read_where_it_is_named_outright(place: tuple[str, dict[str, Any]]) -> None:
    root, options = place
    for name in STRANGE:
        shards = list_shards((f"{root}/{name}",), options)
        assert [shard.name for shard in shards] == [name.rpartition("/")[2]]
    for number, name in enumerate(STRANGE[:4]):
        (shard,) = list_shards((f"{root}/{name}",), options)
        assert shard.size == len(tar_of([(f"{number}.png", png(number))]))
    names = {shard.name for shard in list_shards((root,), options)}
    assert names == {*STRANGE, *DECOYS}
    assert {shard.name for shard in list_shards((f"{root}/dir[1]",), options)} == {"in::side.tar"}


def test_patterns_beside_strange_names(place: tuple[str, dict[str, Any]]) -> None:
    root, options = place

    def names(pattern: str) -> set[str]:
        return {shard.name for shard in list_shards((f"{root}/{pattern}",), options)}

    assert names("photos?.tar") == {"photos1.tar"}
    assert names("photos[0-9].tar") == {"photos1.tar"}
    assert names("photos*.tar") == {"photos1.tar", "photos[1].tar"}
    assert names("photos[[]*.tar") == {"photos[1].tar"}
    assert names("set[{]*.tar") == {"set{1,2}.tar"}
    assert names("{photos[1].tar,set2.tar}") == {"photos[1].tar", "set2.tar"}  # in braces too, what exists is meant
    assert names("{set[{]1[}]*,set1.tar}") == {"set1.tar"}
    assert names("set[{]1,2[}].tar") == {"set{1,2}.tar"}
    assert (
        names("dir[1]/*.tar") == names("dir[1]/in::*.tar") == {"dir[1]/in::side.tar"}
    )  # as it is written, before the wildcard
    assert names("dir[0-9]/*.tar") == {"dir1/in::side.tar"}
    assert names("what[?].tar") == {"what?.tar"}
    assert names("star[*].tar") == {"star*.tar"}
    assert names("{dir1,dir[[]1]}") == {"dir1/in::side.tar", "dir[1]/in::side.tar"}  # braces may name folders
    with pytest.raises(ConfigError, match="1 of the 2 files that it names does not exist"):
        names("{set1.tar,set[{]3.tar}")


def test_images_of_strange_keys_are_read(server: S3Server) -> None:
    store = Store("s3://strange/images", server.options())
    for number, name in enumerate(("a::b.png", "c[1].png", "d?e.png", "f#g.png", "{h}.png", "i*.png")):
        store.create(name, png(number))
        (shard,) = list_shards((f"{store.uri}/{name}",), server.options())
        (sample,) = samples_with(server, shard)
        assert (sample.key, sample.data) == (name, png(number))
    (shard,) = list_shards((store.uri,), server.options())
    assert len(samples_with(server, shard)) == 6


def samples_with(server: S3Server, shard: Shard) -> list[Sample]:
    return list(read_samples(shard, layout(), server.options(), lambda number: True))


def test_chains_of_file_systems_stay_chains(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/x.png", png())
    (shard,) = list_shards((f"zip://in::{tmp_path}/a.zip",), {})
    assert [entry.path for entry in shard.files] == ["x.png"]


def test_escaped_braces() -> None:
    assert expand_braces("a[{]1,2[}]{x,y}") == ["a[{]1,2[}]x", "a[{]1,2[}]y"]
