"""The names of the fields that the first samples of a shard have, for a message about a field that they lack."""

import contextlib
import itertools
import json
import posixpath
from collections.abc import Iterator
from typing import Any, BinaryIO, assert_never

import pyarrow as pa

from lora_embed.schema import Shard
from lora_embed.shards.checked_parquet import ParquetFile
from lora_embed.shards.metadata import METADATA
from lora_embed.shards.tar_groups import looks_like_image, split_name
from lora_embed.shards.tar_headers import open_headers, read_members
from lora_embed.store.store import Store

MOST_FILES, MOST_BYTES = 16, 2**16  # files of fields that are opened, and bytes of each
_TEXT = ("txt", "cls", "text", "caption", "label")  # endings of files that are fields themselves


def known_fields(shard: Shard, options: dict[str, Any]) -> list[str]:
    """Sorted names; none for a shard that cannot be read."""
    names: set[str] = set()
    with contextlib.suppress(Exception):  # this is for a message alone, and the run itself says what is wrong with a shard
        names.update(itertools.islice(_names(shard, Store(shard.root, options, follows_links=True)), 1000))
    return sorted(names)


def _names(shard: Shard, store: Store) -> Iterator[str]:
    if shard.kind == "images":
        for entry in itertools.islice(shard.sidecars, MOST_FILES):
            with store.open(entry.path, MOST_BYTES) as file:
                if entry.path.lower().endswith(".parquet"):
                    yield from ParquetFile(file, entry.size, entry.path).schema.names
                    continue
                yield from _names_in(posixpath.basename(entry.path).lower(), file.read(MOST_BYTES))
        return
    with store.open(next(iter(shard.files)).path, MOST_BYTES) as file:
        if shard.kind == "parquet":
            for column in ParquetFile(file, shard.size, shard.name).schema:
                parts = column.type if pa.types.is_struct(column.type) else []
                yield from (column.name, *(f"{column.name}.{part.name}" for part in parts))
        elif shard.kind == "tar":
            yield from _names_in_tar(file, shard)
        elif shard.kind != "references":
            assert_never(shard.kind)


def _names_in_tar(file: BinaryIO, shard: Shard) -> Iterator[str]:
    tar, headers = open_headers(file, shard.name)
    with tar:
        for member in itertools.islice(read_members(tar, headers, None), MOST_FILES):
            extension = split_name(member.name)[1]
            if member.isreg() and member.size <= MOST_BYTES and not looks_like_image(extension):
                yield from _names_in(f"x.{extension}", headers.content(tar, member))


def _names_in(name: str, data: bytes) -> Iterator[str]:
    """The fields of a file: columns of a table, keys of an object, or its ending."""
    text = data.decode("utf-8-sig", "ignore")
    if name == METADATA[0]:
        head = text.partition("\n")[0].strip()
        yield from head.split(max(",;\t", key=head.count))
    elif name == METADATA[1] or name.endswith(".json"):
        found = json.loads(text.partition("\n")[0] if name == METADATA[1] else text)
        yield from found if isinstance(found, dict) else ()
    elif (extension := posixpath.splitext(name)[1][1:]) in _TEXT:
        yield extension
