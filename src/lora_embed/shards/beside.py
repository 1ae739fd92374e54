"""Fields of loose images from files beside them: x.json and x.txt beside x.jpg, metadata.csv above it."""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_embed.entries import Entries, Entry, State
from lora_embed.schema import Shard
from lora_embed.shards import kinds
from lora_embed.shards.fields import MOST_FIELD, fields_of_file
from lora_embed.shards.metadata import fields_by_image, is_metadata
from lora_embed.store.store import Store

Group = tuple[int, int]  # n of m of a folder's images: those with hash % m == n, where m is a power of two


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
    metadata = [entry for entry in shard.sidecars if is_metadata(entry.path)]
    tables = []
    for entry in sorted(metadata, key=lambda entry: (entry.path.count("/"), entry.path)):
        check(entry)
        tables.append(fields_by_image(store, entry, tuple(sorted(fields)), wanted))

    def fields_of(image: Entry) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for table in tables:
            found |= table(image.path)
        for entry in by_image.get(image.path, []):
            if entry.size <= MOST_FIELD:
                check(entry)
                extension = posixpath.splitext(entry.path)[1][1:].lower()
                found |= fields_of_file(extension, store.read(entry.path) or b"", fields)
        return found

    return fields_of
