"""Rows of metadata.csv, .jsonl or .parquet, which hold fields of images of a folder: a table of many images is read once."""

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from lora_embed.entries import Entry
from lora_embed.errors import ShardError
from lora_embed.shards.checked_parquet import ParquetFile
from lora_embed.shards.columns import ROWS
from lora_embed.shards.fields import MOST_FIELD, values_of
from lora_embed.store.store import Store
from lora_embed.text import in_one_line

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # the key by which a row of metadata names its image, below the folder of the metadata
MOST_KEPT = 2**28  # bytes, about, of a file's rows that are kept in memory; one with more is read for each shard
FILES_KEPT = 2  # one beside the images, and one above
_ROW_BYTES = 150  # of a row, beside its texts
_NONE = object()  # in place of a value that a row does not have

Rows = dict[str, tuple[Any, ...]]  # values of the fields by image
_KEPT: dict[tuple[str, Entry, tuple[str, ...]], Rows | None] = {}  # of the last files; None: too many to keep


def is_metadata(path: str) -> bool:
    """May a file hold the fields of many images of its folder, and of the folders below?"""
    return posixpath.basename(path).lower() in METADATA


def fields_by_image(
    store: Store, entry: Entry, fields: tuple[str, ...], images: Collection[str]
) -> Callable[[str], dict[str, Any]]:
    """A function: the path of one of these images → its fields in a file of metadata.

    A thousand shards of a folder may ask for the same file one after the other. Raises ShardError for one that cannot be read.
    """
    key = (store.uri, entry, fields)
    if key not in _KEPT:
        kept = _read(store, entry, fields, None)
        for older in list(_KEPT)[: 1 - FILES_KEPT]:
            _KEPT.pop(older, None)
        _KEPT[key] = kept
    rows = _KEPT.get(key)
    if rows is None:
        rows = _read(store, entry, fields, images) or {}

    def fields_of(image: str) -> dict[str, Any]:
        values = rows.get(image, ())
        return {name: value for name, value in zip(fields, values, strict=False) if value is not _NONE}

    return fields_of


def _read(store: Store, entry: Entry, fields: tuple[str, ...], images: Collection[str] | None) -> Rows | None:
    """The rows of these images, or of all: then None where they are too many to keep. A later row of an image comes first."""
    folder, rows, size = posixpath.dirname(entry.path), Rows(), 0
    for row in _rows(store, entry, fields, store.name(entry.path)):
        path = _image_of(row, folder)
        if path is None or (images is not None and path not in images):
            continue
        values = tuple(row.get(name, _NONE) for name in fields)
        size += _ROW_BYTES + len(path) + sum(map(_size, values))
        if images is None and size > MOST_KEPT:
            return None
        if path in rows:
            values = tuple(old if new is _NONE else new for old, new in zip(rows[path], values, strict=True))
        rows[path] = values
    return rows


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else len(str(value)) if isinstance(value, list | dict) else 0


def _image_of(row: dict[str, Any], folder: str) -> str | None:
    """The path of the image that a row of a folder's metadata names."""
    name = row.get(FILE_NAME)
    if isinstance(name, bytes):  # text in Parquet without the mark of text
        name = name.decode("utf-8", "replace")
    return posixpath.normpath(posixpath.join(folder, name.replace("\\", "/"))) if isinstance(name, str) else None


def _rows(store: Store, entry: Entry, fields: Collection[str], where: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of metadata, which may have further columns."""
    ending = posixpath.splitext(entry.path)[1].lower()
    with store.explained(entry.path), store.open(entry.path) as file:
        if ending == ".parquet":
            yield from _parquet(file, entry.size, fields, where)
            return
        lines = _lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), where)
        try:
            yield from _csv(lines) if ending == ".csv" else _json(lines)
        except UnicodeDecodeError:
            raise ShardError(f"{where}: is not UTF-8, expected text in UTF-8. Save it as UTF-8.") from None
        except (ValueError, csv.Error, RecursionError) as error:
            raise ShardError(f"{where}: cannot be read ({error}). Correct it, or leave carry out of the job.") from None


def _parquet(file: BinaryIO, size: int, fields: Collection[str], where: str) -> Iterator[dict[str, Any]]:
    try:
        source = ParquetFile(file, size, where)
        names = [name for name in (FILE_NAME, *fields) if name in source.schema.names]
        for group in range(len(source.rows)) if FILE_NAME in names else ():
            for batch in source.batches(group, names, ROWS):
                columns = [values_of(batch.column(name)) for name in names]
                yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    except pa.ArrowException as error:
        raise ShardError(f"{where}: cannot be read ({in_one_line(str(error))}). Write it again.") from None


def _csv(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table with a line of names; its values are separated by commas, semicolons or tabs."""
    head = next(lines, "")
    csv.field_size_limit(MOST_FIELD)
    delimiter = max(",;\t", key=head.count)
    return ({name: value for name, value in row.items() if value is not None} for row in
            csv.DictReader(itertools.chain([head], lines), delimiter=delimiter))  # fmt: skip


def _json(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip() and isinstance(row := json.loads(line), dict):
            yield row


def _lines(text: io.TextIOWrapper, where: str) -> Iterator[str]:
    while line := text.readline(MOST_FIELD + 1):
        if len(line) > MOST_FIELD:
            raise ShardError(f"{where}: has a line of more than {MOST_FIELD} characters. Write shorter values.")
        yield line
