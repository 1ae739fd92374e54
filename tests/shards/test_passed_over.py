"""What an input lists is a sample, a reject or counted as passed over: loose files, broken links, hidden files, named files."""

import io
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from lora_embed.errors import ConfigError, ShardError
from lora_embed.schema import ChunkHead
from lora_embed.shards.listing import Listing, list_input, list_shards
from lora_embed.shards.read import read_samples
from samples import encoded, layout, noise, parquet_of, png, samples_of, tar_of, touch_files


def listing(*patterns: object) -> Listing:
    return list_input(tuple(map(str, patterns)), {})


def ids(listed: Listing) -> list[str]:
    heads = [(ChunkHead(shard_id=shard.id, shard_name=shard.name, prefix=shard.prefix), shard) for shard in listed.shards]
    return sorted(head.sample_id(sample.key) for head, shard in heads for sample in samples_of(shard))


def test_every_file_of_a_folder_is_a_sample_or_counted(tmp_path: Path) -> None:
    images = (
        "a.jpg", "b.JFIF", "c.jpe", "d.avif", "e.HEIC", "f.jp2", "g.tga", "h.svg", "i.psd", "j.CR2", "k.jxl", "deep/l.ico",
        "m.jif", "n.heif", "o.j2k", "p.nef", "q.dcm", "two.dots.jfif",
    )  # fmt: skip
    others = ("a.txt", "b.txt", "c.JSON", "d.mp4", "README", "e.tar.bak", "deep/.DS_Store", "x." + "y" * 40)
    hidden = (".m.jpg", "_n.jpg", "_o.PNG", "._a.jpg", "deep/._l.ico", "_p.tar")
    touch_files(tmp_path, *images, *others, *hidden)
    listed = listing(tmp_path)
    assert ids(listed) == sorted(images)
    assert listed.passed_over == {
        "none": 3, ".txt": 2, "hidden .jpg": 2, "macOS ._": 2, ".bak": 1, ".json": 1, ".mp4": 1, "hidden .png": 1,
        "hidden .tar": 1,
    }  # fmt: skip
    assert len(images) + sum(listed.passed_over.values()) == sum(len(files) for _, _, files in os.walk(tmp_path))
    assert listed.describe().startswith("14 files (none 3, .txt 2, hidden .jpg 2, macOS ._ 2, .bak 1")
    assert listed.hidden_share == 4 / (4 + len(images))  # what macOS adds is no image
    assert Listing(shards=[]).describe() == "0 files"


def test_many_kinds_are_counted_together(tmp_path: Path) -> None:
    touch_files(tmp_path, "a.png", *(f"x.kind{number}" for number in range(50)))
    passed = listing(tmp_path).passed_over
    assert (len(passed), sum(passed.values()), passed["others"]) == (21, 50, 30)


@pytest.mark.parametrize(
    ("pattern", "taken", "passed"),
    [
        ("*.jpg", ["a.jpg"], {"hidden .jpg": 1, "macOS ._": 1}),
        ("{*,_*}", ["_DSC1.jpg", "a.jpg", "b.png"], {".txt": 1, "hidden .png": 1, "macOS ._": 1}),
        ("_*.jpg", ["_DSC1.jpg"], {}),
        (".[!_]*", [".c.png"], {}),
        ("_DSC1.jpg", ["_DSC1.jpg"], {}),
        ("{a.jpg,.c.png}", [".c.png", "a.jpg"], {}),
    ],
)
def test_a_pattern_that_begins_like_a_hidden_name_takes_it(
    tmp_path: Path, pattern: str, taken: list[str], passed: dict[str, int]
) -> None:
    touch_files(tmp_path, "a.jpg", "b.png", "_DSC1.jpg", ".c.png", "._a.jpg", "n.txt")
    listed = listing(f"{tmp_path}/{pattern}")
    assert (ids(listed), listed.passed_over) == (taken, passed)


def test_a_name_without_a_file_behind_it_is_a_reject_that_says_why(tmp_path: Path) -> None:
    touch_files(tmp_path, "blobs/0a", "set/real.jpg")
    folder = tmp_path / "set"
    (folder / "whole.jpg").symlink_to("../blobs/0a")
    (folder / "pruned.jpg").symlink_to("../blobs/0b")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "through.webp").symlink_to("real.jpg/x")
    (folder / "long.jpg").symlink_to("x" * 300)
    (folder / "odd.gif").symlink_to(os.fsdecode(b"caf\xe9\n.gif"))
    (folder / "data").symlink_to("/nowhere/at/all")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        server.bind("socket.png")
        os.chdir(here)
    listed = listing(folder)
    (shard,) = listed.shards
    missing = {sample.key: sample.missing for sample in samples_of(shard)}
    device = "neither a file nor a folder, but a pipe, socket or device"
    assert missing == {
        "real.jpg": "", "whole.jpg": "", "pruned.jpg": "a link to ../blobs/0b, which does not exist",
        "circle.png": "a link to circle.png, which does not exist",
        "through.webp": "a link to real.jpg/x, which does not exist",
        "long.jpg": f"a link to {'x' * 300}, which does not exist", "pipe.jpg": device, "socket.png": device,
        "odd.gif": "a link to caf\\udce9\\n.gif, which does not exist",
    }  # fmt: skip
    assert listed.passed_over == {"broken link": 1}

    touch_files(tmp_path, "blobs/0b")
    with pytest.raises(ShardError, match=r"pruned.jpg: changed since it was listed"):
        samples_of(shard)
    assert len(list(read_samples(shard, layout(), {}, lambda number: False))) == 9
    (again,) = listing(folder).shards
    assert again.id != shard.id
    assert samples_of(again)[[file.path for file in again.files].index("pruned.jpg")].data == b"x"


@pytest.mark.parametrize("name", ["a.tar", "b.parquet", "blob"])
def test_a_shard_whose_link_is_broken_stops_the_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/gone/0b")
    touch_files(tmp_path, "c.jpg")
    with pytest.raises(ConfigError, match=f"{name} is a link to /gone/0b, which does not exist. Fetch the file again"):
        listing(tmp_path / name if name == "blob" else tmp_path)


def test_a_file_that_is_named_outright_is_read_by_its_content(tmp_path: Path) -> None:
    old_tar = bytearray(tar_of([("y.png", png())]))
    old_tar[257:265] = bytes(8)  # as tars were before 1988: without a mark
    total = sum(old_tar[:148]) + 8 * 32 + sum(old_tar[156:512])
    old_tar[148:156] = b"%06o\0 " % total
    content = {
        "shards.dat": (tar_of([("x.png", png())]), "tar"),
        "old": (bytes(old_tar), "tar"),
        "table.bin": (parquet_of({"image": [png()], "id": ["x"]}), "parquet"),
        "0f3a": (encoded(noise(), "JPEG"), "images"),
        "photo.bak": (png(), "images"),
        "x.webp.tmp": (encoded(noise(), "WEBP"), "images"),
    }
    for name, (data, kind) in content.items():
        (tmp_path / name).write_bytes(data)
        (shard,) = list_shards((f"{tmp_path}/{name}",), {})
        (sample,) = samples_of(shard)
        assert shard.kind == kind
        assert Image.open(io.BytesIO(sample.data or b"")).size == (12, 9)
    assert [shard.kind for shard in list_shards((f"{tmp_path}/{{old,0f3a}}",), {})] == ["images", "tar"]
    with pytest.raises(ConfigError, match=r"It passes over 6 files \(none 2, .bak 1, .bin 1, .dat 1, .tmp 1\)"):
        listing(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "has 0 bytes"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip data"),
        (b"PK\3\4" + bytes(99), "a zip archive"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"ordinary words", "text, not an image: 'ordinary words'"),
        (bytes(600), "all of them zeros"),
    ],
)
def test_a_named_file_that_cannot_be_read_is_refused_with_what_it_is(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "named").write_bytes(content)
    with pytest.raises(ConfigError, match=f"named .*{found}.* Expected a tar, a Parquet file or an image"):
        listing(tmp_path / "named")
