"""Inputs → shards: what a run reads, found by listing alone."""

import fnmatch
import hashlib
import itertools
import math
import posixpath
import re
from collections import defaultdict
from typing import Any

from lora_embed.errors import ConfigError
from lora_embed.schema import Shard
from lora_embed.storage import Entry, Store

TAR, PARQUET = (".tar",), (".parquet", ".pq")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
IMAGES_PER_GROUP = 1024
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAGIC = re.compile(r"[*?\[]")


def list_shards(patterns: tuple[str, ...], options: dict[str, Any]) -> list[Shard]:
    """All shards of the inputs, sorted by name.

    A pattern is a file, a directory (searched to any depth), a glob or a brace range such as `{00..41}` or `{a,b}`.
    Raises ConfigError for a pattern that matches nothing, for compressed tars, and for inputs whose samples could get
    equal ids.
    """
    shards = [shard for pattern in patterns for shard in _shards_of(pattern, options)]
    shards.sort(key=lambda shard: shard.name)
    _refuse_shared_names(shards)
    return shards


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}b` → a0b, a1b, a2b (zero-padded as written); `{x,y}` → both; several braces multiply."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last, width = int(span[1]), int(span[2]), len(span[1])
        values = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        values = match[1].split(",")
    filled = [pattern[: match.start()] + value + pattern[match.end() :] for value in values]
    return [expanded for one in filled for expanded in expand_braces(one)]


def _shards_of(pattern: str, options: dict[str, Any]) -> list[Shard]:
    root = _fixed_prefix(pattern)
    store = Store(root, options)
    if root == pattern:
        if not store.is_directory():
            root, _, name = pattern.rpartition("/")
            entry = Store(root, options).info(name)
            if entry is None:
                raise ConfigError(f"input {pattern}: no such file or directory")
            return _group(root, [entry], pattern, every_file=True)
        entries = store.list_files()
    else:
        tail = pattern[len(root) :].lstrip("/")
        wanted = expand_braces(tail)
        entries = [entry for entry in store.list_files() if any(_fits(entry.path, name) for name in wanted)]
        missing = [name for name in wanted if not _MAGIC.search(name) and name not in {entry.path for entry in entries}]
        if missing and len(missing) < len(wanted):
            raise ConfigError(
                f"input {pattern}: {len(missing)} of the {len(wanted)} files it names are not there, first "
                f"{root}/{missing[0]}. Correct the range, or use * to take what is there."
            )
    shards = _group(root, entries, pattern, every_file=False)
    if not shards:
        raise ConfigError(
            f"input {pattern}: matches no tar, Parquet or image file ({len(entries)} files looked at below {root})"
        )
    return shards


def _fixed_prefix(pattern: str) -> str:
    """The longest folder of a pattern without wildcards: the input's root."""
    match = re.search(r"[*?\[{]", pattern)
    return pattern.rstrip("/") if match is None else pattern[: match.start()].rpartition("/")[0]


def _fits(path: str, pattern: str) -> bool:
    """A glob in which `*` stays within a folder and `**` does not."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(path, pattern.replace("**/", "*"))
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def _group(root: str, entries: list[Entry], pattern: str, *, every_file: bool) -> list[Shard]:
    shards, images = [], []
    for entry in entries:
        name = entry.path.lower()
        if posixpath.basename(name).startswith((".", "_")):
            continue
        if name.endswith(COMPRESSED_TAR):
            raise ConfigError(f"input {pattern}: {entry.path} is a compressed tar, which cannot be resumed. Unpack it to .tar.")
        if name.endswith(TAR):
            shards.append(_single(root, entry, "tar"))
        elif name.endswith(PARQUET):
            shards.append(_single(root, entry, "parquet"))
        elif name.endswith(IMAGES):
            images.append(entry)
        elif every_file:
            raise ConfigError(f"input {pattern}: is no .tar, .parquet or image file ({', '.join(IMAGES)})")
    return shards + _image_groups(root, images)


def _single(root: str, entry: Entry, kind: Any) -> Shard:
    state = _hash(posixpath.basename(root.rstrip("/")), entry.path, entry.size, entry.etag)
    return Shard(id=state, name=entry.path, prefix=entry.path, kind=kind, root=root, files=(entry,))


def _image_groups(root: str, entries: list[Entry]) -> list[Shard]:
    """Loose images by directory and bucket of their name's hash, so that a new image touches one group.

    A directory's bucket count is a power of two, so groups are dealt anew only when its size doubles.
    """
    folders: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        folders[posixpath.dirname(entry.path)].append(entry)
    shards = []
    for folder, files in sorted(folders.items()):
        buckets = 2 ** max(0, math.ceil(math.log2(len(files) / IMAGES_PER_GROUP)))
        groups: dict[int, list[Entry]] = defaultdict(list)
        for file in files:
            groups[int(_hash(posixpath.basename(file.path)), 16) % buckets].append(file)
        for bucket, group in sorted(groups.items()):
            name = f"{folder or '.'}/#{bucket:04d}of{buckets:04d}"
            state = _hash(posixpath.basename(root.rstrip("/")), name, *((f.path, f.size, f.etag) for f in group))
            shards.append(Shard(id=state, name=name, prefix=folder, kind="images", root=root, files=tuple(group)))
    return shards


def _refuse_shared_names(shards: list[Shard]) -> None:
    """Ids are name + key: equal names, or one name inside another's, could give two images one id."""
    for one, other in itertools.pairwise(shards):
        if one.name == other.name:
            raise ConfigError(
                f"duplicate ids: {one.root} and {other.root} both hold {one.name}, whose images would get the same ids. "
                "Name the folder above both as input, or give each its own table."
            )
    images = [file.path for shard in shards if shard.kind == "images" for file in shard.files]
    if len(set(images)) != len(images):
        raise ConfigError(
            "duplicate ids: two inputs hold images of the same relative path; name the folder above both as input"
        )


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
