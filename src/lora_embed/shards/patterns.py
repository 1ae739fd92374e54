"""A pattern of an input → the files that it names: a file, a folder, a glob or a brace range."""

import fnmatch
import math
import posixpath
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from glob import escape
from typing import Any

from lora_embed.entries import Entries
from lora_embed.errors import ConfigError
from lora_embed.monitor.progress import say
from lora_embed.store.local import correct_the_path
from lora_embed.store.store import Store
from lora_embed.text import agree, number_of

MOST_NAMES = 10_000_000  # files that the braces of one pattern may name
NAMED_LINKS = 10  # ignored links that a message names
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPAN = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_WILD, _WILD_OR_BRACE = re.compile(r"[*?\[]"), re.compile(r"[*?\[{]")
_ESCAPED = re.compile(r"\[([*?\[{}])\]")  # a character in brackets stands for itself
_KEPT = {"[{]": "\0<", "[}]": "\0>"}  # how escaped braces are kept while others are expanded; no path holds a NUL


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files that a pattern names."""

    pattern: str
    root: str  # URI of the folder from which the paths of the entries count
    entries: Entries
    named: frozenset[str] = frozenset()  # paths of files that are named outright, not by a folder or a wildcard
    shown: frozenset[str] = frozenset()  # hidden files that a wildcard names with their dot or underscore
    linked_folders: int = 0  # links to folders elsewhere that were not followed
    left_out: int = 0  # files that the job leaves out
    looked_at: int  # files among which they were searched
    others: Entries = field(default_factory=Entries)  # the rest of these files


def find_files(pattern: str, options: dict[str, Any], *, follows: bool) -> Files:
    """The files of one input. A path that exists as it is written is that path, also if it could be read as a pattern.

    Raises ConfigError where there is no such file, or a range names files that do not exist.
    """
    path = re.sub(r"(?<=[^/:])/+$", "", pattern)
    if not _WILD_OR_BRACE.search(pattern) or _exists(path, options):
        return _files_at(path, options, follows)
    root = _folder_of(_WILD_OR_BRACE.split(pattern)[0])  # the longest folder without wildcards
    store = Store(root, options, follows_links=True)
    store.check_reachable()
    listed, linked_folders = _list(store, follows)
    named, folders, globs = _read_names(expand_braces(pattern[len(root) :].lstrip("/")), listed)
    entries, others, shown = Entries(), Entries(), set[str]()
    for state in listed.states():
        path = state[0]
        fitting = [glob[-1][:1] for glob in globs if _fits(path.split("/"), glob)]
        if fitting or path in named or not folders.isdisjoint(_folders_above(path)):
            entries.add(*state)
        else:
            others.add(*state)
        if posixpath.basename(path)[:1] in {"_", "."}.intersection(fitting):
            shown.add(path)
    missing = sorted(named.difference(entries.paths()))
    if missing and len(entries):
        raise ConfigError(
            f"input {pattern}: {len(missing):,} of the {number_of(len(named), 'file')} that it names "
            f"{agree(len(missing), 'does', 'do')} not "
            "exist; the first is "
            f"{root.rstrip('/')}/{missing[0]}. Correct the range, or use * to take all files that exist."
        )
    return Files(
        pattern=pattern,
        root=root,
        entries=entries,
        named=frozenset(named),
        shown=frozenset(shown),
        linked_folders=linked_folders,
        looked_at=len(listed),
        others=others,
    )


def leave_out(files: Files, patterns: Collection[str]) -> tuple[Files, set[str]]:
    """The files without those that a pattern names, by its file, its folder or its wildcards; and the patterns that name any.

    A pattern is a whole path or URI, as messages show it.
    """
    plain = {pattern.removeprefix("file://").rstrip("/"): pattern for pattern in patterns}
    globs = {name: name.split("/") for name in plain if _WILD.search(name)}
    root = files.root.removeprefix("file://")
    root += "" if root.endswith("/") else "/"
    entries, used = Entries(), set[str]()
    for state in files.entries.states():
        path = root + state[0]
        naming = {path, *_folders_above(path)}.intersection(plain) | {
            name for name, glob in globs.items() if _fits(path.split("/"), glob)
        }
        used |= {plain[name] for name in naming}
        if not naming:
            entries.add(*state)
    return replace(files, entries=entries, left_out=len(files.entries) - len(entries)), used


def _read_names(names: list[str], listed: Entries) -> tuple[set[str], set[str], list[list[str]]]:
    """The names of a pattern's braces → files that are named outright, folders, and globs, folder by folder."""
    possible = {plain for name in names for plain in (name, _without_wildcards(name))}
    paths = possible.intersection(listed.paths())
    inside = {folder for path in listed.paths() for folder in _folders_above(path)}
    named, folders, globs = set[str](), set[str](), list[list[str]]()
    for name in names:
        plain = name if name in paths else _without_wildcards(name)
        if plain is None:
            globs.append(_with_existing(name.split("/"), inside))
        else:
            (folders if plain in inside else named).add(plain)
    return named, folders, globs


def _with_existing(glob: list[str], folders: set[str]) -> list[str]:
    """A glob whose first folders are meant as they are written, as far as such folders exist: `photos[1]/*.jpg`."""
    exist = 0
    while exist < len(glob) - 1 and "/".join(glob[: exist + 1]) in folders:
        exist += 1
    return [escape(folder) for folder in glob[:exist]] + glob[exist:]


def _folders_above(path: str) -> Iterator[str]:
    """`a/b/c` → a, a/b."""
    end = path.find("/")
    while end >= 0:
        yield path[:end]
        end = path.find("/", end + 1)


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}b` → a0b, a1b, a2b (zero-padded as written); `{x,y}` → both; several braces multiply; `[{]` is a plain brace."""
    for escaped, kept in _KEPT.items():
        pattern = pattern.replace(escaped, kept)
    expanded = _expand(pattern)
    for escaped, kept in _KEPT.items():
        expanded = [name.replace(kept, escaped) for name in expanded]
    return expanded


def _expand(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if (count := math.prod(_values(inside) for inside in _BRACES.findall(pattern))) > MOST_NAMES:
        raise ConfigError(
            f"input {pattern[:200]}: its braces name {count:,} files, expected at most {MOST_NAMES:,}. Use * instead."
        )
    span = _SPAN.fullmatch(match[1])
    if span:
        first, last, width = int(span[1]), int(span[2]), len(span[1])
        values = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        values = match[1].split(",")
    filled = [pattern[: match.start()] + value + pattern[match.end() :] for value in values]
    return list(dict.fromkeys(expanded for pattern in filled for expanded in _expand(pattern)))


def _values(inside: str) -> int:
    """How many values a pair of braces stands for."""
    span = _SPAN.fullmatch(inside)
    return max(0, int(span[2]) - int(span[1]) + 1) if span else inside.count(",") + 1


def _without_wildcards(name: str) -> str | None:
    """The name that a pattern without wildcards stands for, its escaped characters as they are; None if it has wildcards."""
    return None if _WILD.search(_ESCAPED.sub("", name)) else _ESCAPED.sub(r"\1", name)


def _exists(path: str, options: dict[str, Any]) -> bool:
    """Is there a file or folder of exactly this path?"""
    folder, name = _folder_of(path), posixpath.basename(path)
    if _WILD_OR_BRACE.search(path.partition("://")[2].partition("/")[0]) or not name:  # in a bucket's name
        return False
    store = Store(folder, options, follows_links=True)
    store.check_reachable()
    return store.info(name) is not None or store.is_directory(name)


def _files_at(uri: str, options: dict[str, Any], follows: bool) -> Files:
    """A file, or the content of a folder."""
    store = Store(uri, options, follows_links=True)
    store.check_reachable()
    if store.is_directory():
        entries, linked_folders = _list(store, follows)
        return Files(pattern=uri, root=uri, entries=entries, linked_folders=linked_folders, looked_at=len(entries))
    root, name = _folder_of(uri), posixpath.basename(uri)
    entry = Store(root, options, follows_links=True).info(name)
    if entry is None:
        remedy = "Correct the path." if "://" in uri else correct_the_path(uri)
        raise ConfigError(f"input {uri}: no such file or directory. {remedy}")
    return Files(pattern=uri, root=root, entries=Entries([entry.state]), named=frozenset([name]), looked_at=1)


def _list(store: Store, follows: bool) -> tuple[Entries, int]:
    """The files of a folder, and the number of links to folders elsewhere that are not followed."""
    entries, ignored_links = store.list_input(follows=follows)
    if ignored_links:
        named = ", ".join(f"{path} (to {target})" for path, target in list(ignored_links.items())[:NAMED_LINKS])
        more = f" and {len(ignored_links) - NAMED_LINKS} more" if len(ignored_links) > NAMED_LINKS else ""
        say(
            f"input {store.uri}: links to folders outside of it are ignored: {named}{more}. To read those folders, set "
            "follow_folder_links to true in the job, or name the folders as input."
        )
    return entries, len(ignored_links)


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
