"""Fields of loose images from files beside them: x.json and x.txt beside x.jpg, metadata.csv or metadata.jsonl above it."""

import csv
import io
import itertools
import json
import posixpath
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from lora_embed.entries import Entry
from lora_embed.errors import ShardError
from lora_embed.schema import Shard
from lora_embed.shards.fields import MOST_FIELD, fields_of_file
from lora_embed.store.store import Store

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the key by which a row of metadata names its image, below the folder of the metadata


def may_hold_fields(path: str, fields: Collection[str]) -> bool:
    """May a file hold one of these fields of images beside it, by its name?"""
    name = posixpath.basename(path).lower()
    return name in METADATA or posixpath.splitext(name)[1][1:] in {"json", *fields}


def assign(images: Iterable[str], others: Iterable[Entry], fields: Collection[str]) -> dict[str, list[Entry]]:
    """Paths of images → for an image, or a folder with images, the files that hold its fields, of these other files.

    What is held in memory grows with these files, and not with the images: few of a million may have any.
    """
    metadata: dict[str, list[Entry]] = defaultdict(list)
    own = list[tuple[str, Entry]]()  # with the path without its last ending
    for other in others:
        if other.broken or not may_hold_fields(other.path, fields):
            continue
        if posixpath.basename(other.path).lower() in METADATA:
            metadata[posixpath.dirname(other.path)].append(other)
        else:
            own.append((posixpath.splitext(other.path)[0], other))
    if not metadata and not own:
        return {}
    by_stem, folders = defaultdict[str, list[str]](list), set[str]()
    stems, paths = {stem for stem, _ in own}, set[str]()
    for image in images:
        folders.add(posixpath.dirname(image))
        if image in stems:
            paths.add(image)
        if (stem := posixpath.splitext(image)[0]) in stems:
            by_stem[stem].append(image)
    beside: dict[str, list[Entry]] = defaultdict(list)
    for stem, other in own:
        for path in [stem] if stem in paths else by_stem.get(stem, []):
            beside[path].append(other)
    for folder in folders if metadata else ():
        above = [folder, *(str(parent) if str(parent) != "." else "" for parent in PurePosixPath(folder).parents)]
        beside[folder] = [other for parent in dict.fromkeys(above) for other in metadata.get(parent, ())]
    return beside


def read_beside(
    store: Store, shard: Shard, fields: Collection[str], check: Callable[[Entry], None]
) -> Callable[[Entry], dict[str, Any]]:
    """A function: an image of the shard → its fields, from its own files first, then from the nearest metadata.

    `check` raises an error if a file has changed. Raises ShardError for metadata that cannot be read.
    """
    wanted = {entry.path for entry in shard.files}
    by_image = assign(wanted, shard.sidecars, fields)
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    metadata = [entry for entry in shard.sidecars if posixpath.basename(entry.path).lower() in METADATA]
    for entry in sorted(metadata, key=lambda entry: (entry.path.count("/"), entry.path)):
        check(entry)
        for path, row in _rows(store, entry, f"{shard.root}/{entry.path}"):
            if path in wanted:
                rows[path].update({name: value for name, value in row.items() if name in fields})

    def fields_of(image: Entry) -> dict[str, Any]:
        found = dict(rows.get(image.path, {}))
        for entry in by_image.get(image.path, []):
            if entry.size <= MOST_FIELD:
                check(entry)
                extension = posixpath.splitext(entry.path)[1][1:].lower()
                found |= fields_of_file(extension, store.read(entry.path) or b"", fields)
        return found

    return fields_of


def _rows(store: Store, entry: Entry, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path of an image → its row in a file of metadata."""
    folder = posixpath.dirname(entry.path)
    with store.explained(entry.path), store.open(entry.path) as file:
        lines = _lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), where)
        try:
            for row in _csv(lines) if entry.path.lower().endswith(".csv") else _json(lines):
                if isinstance(name := row.get(FILE_NAME), str):
                    yield posixpath.normpath(posixpath.join(folder, name.replace("\\", "/"))), row
        except UnicodeDecodeError:
            raise ShardError(f"{where}: is not UTF-8, expected text in UTF-8. Save it as UTF-8.") from None
        except (ValueError, csv.Error, RecursionError) as error:
            raise ShardError(f"{where}: cannot be read ({error}). Correct it, or leave carry out of the job.") from None


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
