"""Fields that the place of a sample tells: `label=cat/…` of a Hive partition, and the folder that it lies in."""

import posixpath
import urllib.parse
from collections.abc import Collection, Iterator
from typing import Any

from lora_embed.schema import Sample, Shard

FOLDER = "folder"  # the field that is the name of the folder, such as `cat` of cat/0001.jpg
_NULL = "__HIVE_DEFAULT_PARTITION__"


def with_places(samples: Iterator[Sample], shard: Shard, fields: Collection[str]) -> Iterator[Sample]:
    """The samples, with those of these fields that only their place tells. A field of its own comes first."""
    if not fields:
        yield from samples
        return
    parts = _folders(shard.root) + _folders(shard.name if shard.kind != "images" else f"{shard.prefix}/")
    for sample in samples:
        folders = parts + _folders(posixpath.dirname(sample.key) + "/")
        told = {name: value for name, value in _partitions(folders) if name in fields}
        if FOLDER in fields and folders:
            told.setdefault(FOLDER, folders[-1])
        sample.fields = told | sample.fields
        yield sample


def _folders(path: str) -> list[str]:
    """The names of the folders in a path or URI; what follows the last slash of a path is a file."""
    place = path.partition("://")[2] if "://" in path else path
    names = place.split("/") if "://" in path or path.startswith("/") else posixpath.dirname(place).split("/")
    return [name for name in names if name not in ("", ".", "..")]


def _partitions(folders: list[str]) -> Iterator[tuple[str, Any]]:
    for folder in folders:
        name, equals, value = folder.partition("=")
        if equals and name:
            yield urllib.parse.unquote(name), None if value == _NULL else urllib.parse.unquote(value)
