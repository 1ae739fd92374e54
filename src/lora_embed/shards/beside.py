"""Fields of loose images from files beside them: x.json and x.txt beside x.jpg, metadata.csv above it."""

import csv
import io
import itertools
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_embed.entries import Entries, Entry, State
from lora_embed.errors import ShardError
from lora_embed.schema import Shard
from lora_embed.shards import kinds
from lora_embed.shards.checked_parquet import ParquetFile
from lora_embed.shards.columns import ROWS
from lora_embed.shards.fields import MOST_FIELD, fields_of_file, values_of
from lora_embed.store.store import Store
from lora_embed.text import in_one_line

Group = tuple[int, int]  # n of m of a folder's images: those with hash % m == n, where m is a power of two
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # the key by which a row of metadata names its image, below the folder of the metadata


class FilesBeside:
    """Files that may hold fields of loose images, by folder. Few of a million images may have any, or each may have two."""

    def __init__(self, fields: Collection[str]) -> None:
        self.fields = fields
        self.passed = Counter[str]()  # kinds of the input's files that were offered and hold fields of no image
        self._metadata: dict[str, list[Entry]] = defaultdict(list)
        self._own: dict[bool, dict[str, Entries]] = {True: defaultdict(Entries), False: defaultdict(Entries)}
        self._has_images = set[str]()  # folders of metadata with images below
        self._further = list[Entry]()  # metadata of the input

    def add(self, state: State, *, is_input: bool = True) -> None:
        """Offer a file of the input, or another one among which the input was searched."""
        path, *_, broken = state
        if broken or not self.fields or not _may_hold_fields(path, self.fields):
            self.passed[kinds.BROKEN if broken else kinds.counted_as(path)] += is_input
        elif is_metadata(path):
            self._metadata[posixpath.dirname(path)].append(Entry(*state[:3]))
            self._further += [Entry(*state[:3])] * is_input
        else:
            self._own[is_input][posixpath.dirname(path)].add(*state)

    def metadata_above(self, folder: str) -> list[Entry]:
        """Metadata of a folder with images, and of the folders above it."""
        if not self._metadata:
            return []
        above = [place for place in folders_above(folder) if place in self._metadata]
        self._has_images.update(above)
        return [entry for place in above for entry in self._metadata[place]]

    def deal(self, folder: str, groups: Mapping[Group, Entries]) -> dict[Group, Entries]:
        """The files beside a folder's images, for each group of these images. A folder is dealt once."""
        dealt: dict[Group, Entries] = defaultdict(Entries)
        own = {is_input: files for is_input, of in self._own.items() if (files := of.pop(folder, None))}
        if own:
            names, by_path, by_stem = list(groups), _Places(groups, str), _Places(groups, _stem)
            for is_input, files in own.items():
                stems = np.fromiter((hash(_stem(path)) for path in files.paths()), np.int64)
                for state, same, beside in zip(files.states(), by_path.of(stems), by_stem.of(stems), strict=True):
                    places = same or beside
                    for place in places:
                        dealt[names[place]].add(*state)
                    self.passed[kinds.counted_as(state[0])] += is_input and not places
        return dealt

    def finish(self) -> Counter[str]:
        """After all folders with images were dealt: `passed`, with the files of the others."""
        rest = [path for files in self._own[True].values() for path in files.paths()]
        rest += [entry.path for entry in self._further if posixpath.dirname(entry.path) not in self._has_images]
        self.passed.update(map(kinds.counted_as, rest))
        return +self.passed


class _Places:
    """Numbers of the groups that hold a name, found by its hash at 16 bytes an image."""

    def __init__(self, groups: Mapping[Group, Entries], name_of: Callable[[str], str]) -> None:
        hashes = np.fromiter((hash(name_of(path)) for files in groups.values() for path in files.paths()), np.int64)
        numbers = np.repeat(np.arange(len(groups), dtype=np.uint32), [len(files) for files in groups.values()])
        order = np.argsort(hashes)
        self._hashes, self._numbers = hashes[order], numbers[order]

    def of(self, hashes: NDArray[np.int64]) -> Iterator[set[int]]:
        """For each name with one of these hashes."""
        firsts, lasts = np.searchsorted(self._hashes, hashes, "left"), np.searchsorted(self._hashes, hashes, "right")
        return (set(self._numbers[first:last].tolist()) for first, last in zip(firsts, lasts, strict=True))


def is_metadata(path: str) -> bool:
    """May a file hold the fields of many images of its folder, and of the folders below?"""
    return posixpath.basename(path).lower() in METADATA


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _may_hold_fields(path: str, fields: Collection[str]) -> bool:
    """May a file hold one of these fields of images beside it, by its name?"""
    return is_metadata(path) or posixpath.splitext(path)[1][1:].lower() in {"json", *fields}


def folders_above(folder: str) -> list[str]:
    """`a/b` → `a/b`, `a` and the root, which is empty."""
    parents = [str(parent) for parent in PurePosixPath(folder).parents]
    return list(dict.fromkeys([folder, *("" if parent == "." else parent for parent in parents)]))


def assign(images: Collection[str], others: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Path of an image, or of a folder with images, → the files that hold its fields, of these other files."""
    metadata: dict[str, list[Entry]] = defaultdict(list)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_stem[_stem(image)].append(image)
    paths, beside = set(images), defaultdict[str, list[Entry]](list)
    for other in others:
        if is_metadata(other.path):
            metadata[posixpath.dirname(other.path)].append(other)
            continue
        stem = _stem(other.path)
        for path in [stem] if stem in paths else by_stem.get(stem, []):
            beside[path].append(other)
    for folder in {posixpath.dirname(image) for image in images} if metadata else ():
        beside[folder] = [other for place in folders_above(folder) for other in metadata.get(place, ())]
    return beside


def read_beside(
    store: Store, shard: Shard, fields: Collection[str], check: Callable[[Entry], None]
) -> Callable[[Entry], dict[str, Any]]:
    """A function: an image of the shard → its fields, from its own files first, then from the nearest metadata.

    `check` raises an error if a file has changed. Raises ShardError for metadata that cannot be read.
    """
    wanted = {entry.path for entry in shard.files}
    by_image = assign(wanted, shard.sidecars)
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    metadata = [entry for entry in shard.sidecars if is_metadata(entry.path)]
    for entry in sorted(metadata, key=lambda entry: (entry.path.count("/"), entry.path)):
        check(entry)
        for row in _rows(store, entry, fields, f"{shard.root}/{entry.path}"):
            path = _image_of(row, posixpath.dirname(entry.path))
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
