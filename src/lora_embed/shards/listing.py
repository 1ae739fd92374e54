"""Inputs → shards, by listing alone; no file is opened."""

import fnmatch
import functools
import hashlib
import itertools
import math
import posixpath
import re
from collections import defaultdict
from typing import Any

from lora_embed.errors import ConfigError
from lora_embed.monitor.progress import say
from lora_embed.schema import Entry, Shard
from lora_embed.shards.compressed import COMPRESSED_TAR
from lora_embed.shards.img2dataset import without_metadata
from lora_embed.shards.list_rows import LISTS, References
from lora_embed.shards.lists import hint, list_ranges, without_listed
from lora_embed.store.store import Store

TAR, PARQUET = (".tar",), (".parquet", ".pq")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES_PER_GROUP = 1024
MOST_NAMES = 10_000_000  # files that the braces of one pattern may name
NAMED_LINKS = 10  # ignored links that a message names
_BRACES = re.compile(r"\{([^{}]*)\}")
_WILD, _WILD_OR_BRACE = re.compile(r"[*?\[]"), re.compile(r"[*?\[{]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python holds bytes of a local name that are not UTF-8


def list_shards(
    patterns: tuple[str, ...], options: dict[str, Any], *, follows: bool = False, references: References | None = None
) -> list[Shard]:
    """All shards of the inputs, sorted by name. With `references`, tables are lists of references: each gives several shards.

    A pattern is a file, a directory (searched to any depth), a glob or a brace range such as `{00..41}` or `{a,b}`. Links
    to folders outside of an input are followed only if `follows`; otherwise a message says that they are ignored.
    Raises ConfigError for a pattern that matches nothing, and for inputs whose samples could get
    equal ids.
    """
    are_lists = references is not None
    shards = [shard for pattern in patterns for shard in _shards_of(pattern, options, follows, are_lists=are_lists)]
    shards.sort(key=lambda shard: shard.name)
    _refuse_shared_names(shards)
    if references is None:
        return shards
    if not any(shard.kind == "references" for shard in shards):
        raise ConfigError(
            f"input {patterns[0]}: reference_column is {references.column!r}, but there is no list of references "
            f"({', '.join(LISTS)}). Name one, or remove reference_column if the input holds the images themselves."
        )
    if not (parts := [part for shard in shards for part in _parts_of(shard, references, options)]):
        raise ConfigError(f"input {patterns[0]}: its lists name no image: they have no rows. Write them again.")
    return parts


def _parts_of(shard: Shard, references: References, options: dict[str, Any]) -> list[Shard]:
    return list_ranges(shard, references, options) if shard.kind == "references" else [shard]


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}b` → a0b, a1b, a2b (zero-padded as written); `{x,y}` → both; several braces multiply."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if (count := math.prod(_values(inside) for inside in _BRACES.findall(pattern))) > MOST_NAMES:
        raise ConfigError(
            f"input {pattern[:200]}: its braces name {count:,} files, expected at most {MOST_NAMES:,}. Use * instead."
        )
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if span:
        first, last, width = int(span[1]), int(span[2]), len(span[1])
        values = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        values = match[1].split(",")
    filled = [pattern[: match.start()] + value + pattern[match.end() :] for value in values]
    return list(dict.fromkeys(expanded for pattern in filled for expanded in expand_braces(pattern)))


def _values(inside: str) -> int:
    """How many values a pair of braces stands for."""
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    return max(0, int(span[2]) - int(span[1]) + 1) if span else inside.count(",") + 1


def _shards_of(pattern: str, options: dict[str, Any], follows: bool, *, are_lists: bool) -> list[Shard]:
    if not _WILD_OR_BRACE.search(pattern):
        return _shards_at(re.sub(r"(?<=[^/:])/+$", "", pattern), options, follows, are_lists=are_lists)
    root = _folder_of(_WILD_OR_BRACE.split(pattern)[0])  # the longest folder without wildcards
    expanded = expand_braces(pattern[len(root) :].lstrip("/"))
    named = frozenset(name for name in expanded if not _WILD.search(name))
    globs = [name.split("/") for name in expanded if name not in named]
    store = Store(root, options, follows_links=True)
    store.check_reachable()
    listed = _list(store, follows)
    entries = [e for e in listed if e.path in named or any(_fits(e.path.split("/"), glob) for glob in globs)]
    missing = sorted(named - {entry.path for entry in entries})
    if missing and entries:
        raise ConfigError(
            f"input {pattern}: {len(missing)} of the {len(named)} files that it names do not exist; the first is "
            f"{root.rstrip('/')}/{missing[0]}. Correct the range, or use * to take all files that exist."
        )
    return _group(root, entries, named, f"input {pattern}", looked_at=len(listed), are_lists=are_lists)


def _shards_at(uri: str, options: dict[str, Any], follows: bool, *, are_lists: bool) -> list[Shard]:
    """A file's shard, or those of a directory."""
    store = Store(uri, options, follows_links=True)
    store.check_reachable()
    if store.is_directory():
        entries = _list(store, follows)
        return _group(uri, entries, frozenset(), f"input {uri}", looked_at=len(entries), are_lists=are_lists)
    root, name = _folder_of(uri), posixpath.basename(uri)
    entry = Store(root, options, follows_links=True).info(name)
    if entry is None:
        raise ConfigError(f"input {uri}: no such file or directory. Correct the path.")
    return _group(root, [entry], frozenset([name]), f"input {uri}", looked_at=1, are_lists=are_lists)


def _list(store: Store, follows: bool) -> list[Entry]:
    entries, ignored_links = store.list_input(follows=follows)
    if ignored_links:
        named = ", ".join(f"{path} (to {target})" for path, target in list(ignored_links.items())[:NAMED_LINKS])
        more = f" and {len(ignored_links) - NAMED_LINKS} more" if len(ignored_links) > NAMED_LINKS else ""
        say(
            f"input {store.uri}: links to folders outside of it are ignored: {named}{more}. To read those folders, set "
            "follow_folder_links to true in the job, or name the folders as input."
        )
    return entries


def _folder_of(uri: str) -> str:
    folder = uri.rpartition("/")[0]
    return f"{folder}/" if folder == "" or folder.endswith(":/") else folder  # "/" and "memory://" keep their slashes


def _fits(path: list[str], glob: list[str]) -> bool:
    """True if a glob matches a path, folder by folder. `*` stays within a folder; `**` is any number of folders, even none."""
    if not glob or not path:
        return glob in ([], ["**"]) and not path
    if glob[0] == "**":
        return _fits(path, glob[1:]) or _fits(path[1:], glob)
    return fnmatch.fnmatchcase(path[0], glob[0]) and _fits(path[1:], glob[1:])


def _group(
    root: str, entries: list[Entry], named: frozenset[str], where: str, *, looked_at: int, are_lists: bool
) -> list[Shard]:
    """Entries → shards. Hidden files and other kinds of files are ignored, unless their full names are in `named`."""
    shards, images = [], []
    leave_out = functools.partial(without_listed, images=IMAGES) if are_lists else without_metadata
    entries = leave_out(entries, named, where=where)
    for entry in entries:
        name = entry.path.lower()
        if entry.path not in named and posixpath.basename(name).startswith((".", "_")):
            continue
        if are_lists and name.endswith(LISTS):
            shards.append(_single(root, entry, "references"))
        elif name.endswith(TAR + COMPRESSED_TAR):
            shards.append(_single(root, entry, "tar"))
        elif name.endswith(PARQUET):
            shards.append(_single(root, entry, "parquet"))
        elif name.endswith(IMAGES):
            images.append(entry)
        elif entry.path in named:
            raise ConfigError(
                f"{where}: {entry.path} is not a .tar, .parquet or image file ({', '.join(IMAGES)}). Name such files."
                + hint(name)
            )
    if not shards and not images:
        raise ConfigError(
            f"{where}: matches no tar, Parquet or image file among {looked_at} files below {root}. Correct the pattern."
            + next(filter(None, (hint(entry.path.lower()) for entry in entries)), "")
        )
    for entry in [*images, *(shard.files[0] for shard in shards)]:
        if _NOT_UTF8.search(entry.path):
            raise ConfigError(f"{where}: the file name {entry.path!r} is not UTF-8, but ids must be. Rename the file.")
    return shards + _image_groups(root, images)


def _single(root: str, entry: Entry, kind: Any) -> Shard:
    state = _hash(posixpath.basename(root.rstrip("/")), entry.path, entry.size, entry.etag)
    return Shard(id=state, name=entry.path, prefix=entry.path, kind=kind, root=root, files=(entry,))


def _image_groups(root: str, entries: list[Entry]) -> list[Shard]:
    """Group loose images by directory and by a hash of their names, so that a new image changes only one group.

    The number of a directory's groups is a power of two, so images change their group only when the directory's size doubles.
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
    """An id is a shard's name and a key: equal names, or a name that begins with another's, could give two images one id."""
    for first, second in itertools.pairwise(shards):
        if first.name == second.name and first.kind == second.kind == "images":
            raise ConfigError(
                f"duplicate ids: two inputs hold loose images of one folder, {first.prefix or '.'} below {first.root} and "
                f"below {second.root}. Name one input for both, a directory or a pattern such as {{a,b}}, or use two tables."
            )
        if first.name == second.name and first.root == second.root:
            raise ConfigError(f"duplicate ids: two inputs both name {first.root}/{first.name}. Name it in one of them.")
        if first.name == second.name:
            raise ConfigError(
                f"duplicate ids: {first.root} and {second.root} both hold {first.name}, whose images would get the same ids. "
                "Name the folder above both as input, or give each its own table."
            )
    images = [file.path for shard in shards if shard.kind == "images" for file in shard.files]
    if len(set(images)) != len(images):
        raise ConfigError(
            "duplicate ids: two inputs hold images with the same relative path. Name the folder above both as input."
        )
    files = {shard.name: shard.root for shard in shards if shard.kind != "images"}
    for shard in shards:
        folder = shard.prefix if shard.kind == "images" else posixpath.dirname(shard.name)
        for above in itertools.accumulate(folder.split("/"), "{}/{}".format):
            if above in files:
                raise ConfigError(
                    f"duplicate ids: {files[above]}/{above} is a file, but below {shard.root} there is a folder of that name, "
                    "so their images could get the same ids. Rename one of them, or give each its own table."
                )


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
