"""A folder as img2dataset writes it is an input as it is."""

import json
from pathlib import Path

import pytest

from lora_embed.shards.listing import list_input, list_shards
from samples import parquet_of, png, tar_of


def write_folder(folder: Path, shards: int = 2) -> None:
    folder.mkdir()
    for shard in range(shards):
        keys = [f"{shard:05d}{number:04d}" for number in range(3)]
        members = [
            (f"{k}.{kind}", data) for k in keys for kind, data in (("jpg", png()), ("txt", b"a"), ("json", b'{"key": 1}'))
        ]
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(members))
        rows = {"url": ["https://example.org/a.jpg"] * 3, "key": keys, "caption": ["a"] * 3, "status": ["success"] * 3}
        (folder / f"{shard:05d}.parquet").write_bytes(parquet_of(rows))
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 3, "successes": 3}))


@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_tars_are_read_and_their_metadata_is_counted_as_passed_over(tmp_path: Path, pattern: str) -> None:
    write_folder(tmp_path / "in")
    listing = list_input((f"{tmp_path}/in{pattern}",), {})
    assert [shard.name for shard in listing.shards] == ["00000.tar", "00001.tar"]
    assert listing.passed_over == {".json": 2, "img2dataset's .parquet": 2}


def test_folders_of_files_are_read_likewise(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    for number in range(2):
        (tmp_path / "in" / f"{number:05d}.tar").unlink()
        (tmp_path / "in" / f"{number:05d}").mkdir()
        (tmp_path / "in" / f"{number:05d}" / "a.jpg").write_bytes(png())
    assert [shard.prefix for shard in list_shards((f"{tmp_path}/in",), {})] == ["00000", "00001"]


def test_other_parquet_files_beside_tars_are_inputs(tmp_path: Path) -> None:
    """Without statistics, or named outright, a file of the same name may hold images of its own."""
    write_folder(tmp_path / "in", 1)
    assert len(list_shards((f"{tmp_path}/in/{{00000.tar,00000.parquet}}",), {})) == 2
    (tmp_path / "in" / "00000_stats.json").unlink()
    assert [shard.kind for shard in list_shards((f"{tmp_path}/in",), {})] == ["parquet", "tar"]
