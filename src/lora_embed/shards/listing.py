"""Inputs → shards, by listing alone. A file is opened only where a user named it and its name does not tell what it is."""

import itertools
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_embed.entries import Entries, Entry
from lora_embed.errors import ConfigError
from lora_embed.images.recognise import name_of
from lora_embed.monitor.progress import say
from lora_embed.schema import Shard, add_kinds
from lora_embed.shards import kinds
from lora_embed.shards.beside import FilesBeside, Group, folders_above
from lora_embed.shards.image_groups import divided_groups, folder_name, hash_of, image_groups
from lora_embed.shards.img2dataset import without_metadata
from lora_embed.shards.kinds import Kind
from lora_embed.shards.list_rows import LISTS, References
from lora_embed.shards.lists import expand_lists, hint, without_listed
from lora_embed.shards.metadata import is_metadata
from lora_embed.shards.patterns import Files, find_files
from lora_embed.shards.patterns import leave_out as without
from lora_embed.store.store import Store
from lora_embed.text import number_of

_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # how Python holds bytes of a local name that are not UTF-8


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The shards of an input, and the listed files that are none, by kind: an ending, or why a file is no shard."""

    shards: list[Shard]
    passed_over: dict[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # of `leave_out`, what names no file

    @property
    def hidden_share(self) -> float:
        """The share of files that are passed over because their names hide them, of all that look like input."""
        hidden = self._hidden
        return hidden / max(1, hidden + sum(len(shard.files) for shard in self.shards))

    @property
    def _hidden(self) -> int:
        return sum(number for kind, number in self.passed_over.items() if kind.startswith(kinds.HIDDEN))

    def say_passed(self) -> None:
        """Say what the listing passes over, if anything, and what of `leave_out` names no file."""
        for name in self.unused:
            say(f"leave_out names {name}, but the input holds no such file", level="warning")
        if self.passed_over:
            say(f"Passed over: {self.describe()}")

    def describe(self) -> str:
        """`7 files (.txt 4, .mp4 2, none 1)`."""
        return describe_passed(self.passed_over)


def describe_passed(passed: Mapping[str, int]) -> str:
    """The files that were passed over, for a person."""
    by_kind = ", ".join(f"{kind} {number:,}" for kind, number in passed.items())
    total = sum(number for kind, number in passed.items() if kind != kinds.FOLDER)
    return number_of(total, "file") + (f" ({by_kind})" if passed else "")


def list_input(
    patterns: tuple[str, ...],
    options: dict[str, Any],
    *,
    fields: Collection[str] = (),
    follows: bool = False,
    references: References | None = None,
    leave_out: Collection[str] = (),
    known: Iterable[str] = (),
) -> Listing:
    """All shards of the inputs, sorted by name, and a count of the files that are passed over.

    A pattern is a file, a directory (searched to any depth), a glob or a brace range such as `{00..41}` or `{a,b}`. Links
    to folders outside of an input are followed only if `follows`; otherwise a message says that they are ignored. Files that
    may hold one of the `fields` of loose images beside them are a part of their shards. With `references`, tables are lists
    of references, each of which gives several shards. Files that `leave_out` names are passed over. `known`: names of the
    shards that a table holds; their groups of loose images are kept, so that a folder that grows past some number does not
    become new as a whole.
    Raises ConfigError for a pattern that matches nothing, for a file that the user named and that
    cannot be read, and for inputs whose samples could get equal ids.
    """
    shards: list[Shard] = []
    passed: Counter[str] = Counter()
    unused = set(leave_out)
    divided = divided_groups(known)
    inputs = Counter[str]()  # that hold loose images of a folder
    for pattern in patterns:
        files = find_files(pattern, options, follows=follows)
        if leave_out:
            files, used = without(files, leave_out)
            unused -= used
        select = without_metadata if references is None else without_listed
        files = select(files, passed)
        grouped = _group(files, options, fields, passed, divided, are_lists=references is not None)
        inputs.update({shard.prefix for shard in grouped if shard.kind == "images"})
        shards += grouped
    shards.sort(key=lambda shard: shard.name)
    _refuse_shared_names(shards, inputs)
    if references is not None:
        shards = expand_lists(shards, references, options, patterns[0])
    return Listing(shards=shards, passed_over=add_kinds({}, _most_first(passed)), unused=tuple(sorted(unused)))


def _most_first(passed: Counter[str]) -> dict[str, int]:
    return dict(sorted(passed.items(), key=lambda item: (-item[1], item[0])))


def list_shards(
    patterns: tuple[str, ...],
    options: dict[str, Any],
    *,
    fields: Collection[str] = (),
    references: References | None = None,
) -> list[Shard]:
    """The shards of `list_input` alone."""
    return list_input(patterns, options, fields=fields, references=references).shards


def _group(
    files: Files,
    options: dict[str, Any],
    fields: Collection[str],
    passed: Counter[str],
    divided: dict[str, set[Group]],
    *,
    are_lists: bool,
) -> list[Shard]:
    """Files → shards. Hidden files and files of other kinds are counted in `passed`, unless their full names are given."""
    root_name = folder_name(files.root)
    shards, beside = [], FilesBeside(fields)
    here = Counter({kinds.FOLDER: files.linked_folders, kinds.LEFT_OUT: files.left_out})
    images: dict[str, Entries] = defaultdict(Entries)  # by folder
    tables = Entries()  # that may be metadata of images
    for state in files.entries.states():
        path, *_, broken = state
        if kinds.is_hidden(path) and path not in files.named and path not in files.shown:
            here[kinds.counted_as(path, is_hidden=True)] += 1
            continue
        kind = _kind_of(files, path, broken, options, are_lists=are_lists)
        if kind == "parquet" and is_metadata(path) and path not in files.named:
            tables.add(*state)  # whether it describes images shows when all of them are known
        elif kind == "images":
            # A key of an object store may hold several slashes in a row.
            folder = posixpath.dirname(path) if "//" in path or path.startswith("/") else path.rpartition("/")[0]
            images[folder].add(*state)
        elif kind is not None:
            shards.append(_single(files.root, root_name, Entry(*state[:3]), kind))
        else:
            beside.add(state)
    described = {above for folder in images for above in folders_above(folder)} if len(tables) else set()
    for state in tables.states():
        if posixpath.dirname(state[0]) in described:
            beside.add(state)
        else:
            shards.append(_single(files.root, root_name, Entry(*state[:3]), "parquet"))
    for state in files.others.states() if fields and images else ():
        beside.add(state, is_input=False)
    shards.extend(image_groups(files.root, images, beside, divided))
    here += beside.finish()  # which also drops what is counted 0 times
    if not shards:
        raise _nothing_in(files, here)
    passed.update(here)
    return shards


def _nothing_in(files: Files, passed: Counter[str]) -> ConfigError:
    """The error for files of which none is a shard, or a part of one."""
    found = f" It passes over {describe_passed(_most_first(passed))}." if passed else ""
    among = f"{number_of(files.looked_at, 'file')} below {files.root}"
    return ConfigError(
        f"input {files.pattern}: matches no tar, Parquet or image file among {among}.{found} Correct the pattern, or name a "
        "file by its full name, which is then read whatever the name."
        + next(filter(None, map(hint, files.entries.paths())), "")
    )


def _kind_of(files: Files, path: str, broken: str, options: dict[str, Any], *, are_lists: bool) -> str | None:
    """The kind of shard that a file is or belongs to; None for another file. Raises ConfigError for one that cannot be read."""
    kind: str | None = kinds.kind_by_name(path)
    if are_lists and path.lower().endswith(LISTS):
        kind = "references"
    if kind is None and path in files.named:
        kind = _kind_of_named(files, path, broken, options)
    if kind is not None and not path.isascii() and _NOT_UTF8.search(path):
        raise ConfigError(f"input {files.pattern}: the file name {path!r} is not UTF-8, but ids must be. Rename the file.")
    if kind not in (None, "images") and broken:
        raise ConfigError(f"input {files.pattern}: {path} is {broken}. Fetch the file again, or remove the name.")
    return kind


def _kind_of_named(files: Files, path: str, broken: str, options: dict[str, Any]) -> Kind:
    """What a file that the user named is by its content. Raises ConfigError for what cannot be read."""
    where = f"input {files.pattern}: {path}"
    if broken:
        raise ConfigError(f"{where} is {broken}. Fetch the file again, or name another.")
    with Store(files.root, options, follows_links=True).open(path, kinds.HEAD_BYTES) as file:
        head = file.read(kinds.HEAD_BYTES)
    kind = kinds.kind_by_content(head)
    if kind is None:
        found = f"begins with {name_of(head)}" if head else "has 0 bytes"
        raise ConfigError(f"{where} {found}. Expected a tar, a Parquet file or an image.{hint(path, found)}")
    return kind


def _single(root: str, root_name: str, entry: Entry, kind: Any) -> Shard:
    state = hash_of(root_name, entry.path, entry.size, entry.etag)
    return Shard(id=state, name=entry.path, prefix=entry.path, kind=kind, root=root, files=(entry,))


def _refuse_shared_names(shards: list[Shard], inputs: Counter[str]) -> None:
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
    twice = [shard for shard in shards if shard.kind == "images" and inputs[shard.prefix] > 1]
    images = [file.path for shard in twice for file in shard.files]
    if len(set(images)) != len(images):
        raise ConfigError(
            f"duplicate ids: two inputs hold an image {Counter(images).most_common(1)[0][0]}. Name the folder "
            "above both as input, or give each its own table."
        )
    files = {shard.name: shard.root for shard in shards if shard.kind != "images"}
    folders = {shard.prefix if shard.kind == "images" else shard.name.rpartition("/")[0]: shard.root for shard in shards}
    for folder, root in folders.items():
        for above in itertools.accumulate(folder.split("/"), "{}/{}".format):
            if above in files:
                raise ConfigError(
                    f"duplicate ids: {files[above]}/{above} is a file, but below {root} there is a folder of that name, "
                    "so their images could get the same ids. Rename one of them, or give each its own table."
                )
