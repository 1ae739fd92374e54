"""Loose images → groups, each of which is a shard: by folder and by a hash of their names, so that a new image changes one."""

import hashlib
import math
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from lora_embed.entries import Entries
from lora_embed.schema import Shard
from lora_embed.shards.beside import FilesBeside, Group, assign

IMAGES_PER_GROUP = 1024  # of a folder that a table does not hold yet: at most, on average
MOST_GROWTH = 2  # times as many images may come into a group before it is divided in two
_MOST_GROUPS = 2**32  # of a folder, so that what a faulty store or manifest names cannot be divided endlessly
_NAME = re.compile(r"(.*)/#(\d{4,10})of(\d{4,10})", re.DOTALL)


def divided_groups(names: Iterable[str]) -> dict[str, set[Group]]:
    """Names of a version's shards → by folder, the groups in whose place it has smaller ones.

    A folder whose images two inputs hold, each with groups of its own, is left out.
    """
    divided: dict[str, set[Group]] = defaultdict(set)
    named: dict[str, set[Group]] = defaultdict(set)
    for match in filter(None, map(_NAME.fullmatch, names)):
        place, number, of = match[1], int(match[2]), int(match[3])
        named[place].add((number, of))
        while 1 < of <= _MOST_GROUPS and (group := (number % (of // 2), of // 2)) not in divided[place]:
            divided[place].add(group)
            of //= 2
    return {place: divided[place] for place, groups in named.items() if groups.isdisjoint(divided[place])}


def may_share(name: str, other: str) -> bool:
    """Whether a folder's groups of these names, or a group and an older one, may hold images of the same names.

    True for shards that are no groups of loose images.
    """
    first, second = _NAME.fullmatch(name), _NAME.fullmatch(other)
    if first is None or second is None:
        return True
    fewer = min(int(first[3]), int(second[3]))
    return int(first[2]) % fewer == int(second[2]) % fewer


def image_groups(
    root: str, folders: dict[str, Entries], beside: FilesBeside, divided: dict[str, set[Group]]
) -> Iterator[Shard]:
    """The shards of loose images. `folders`: each folder's images; it is emptied meanwhile.

    A folder that is in `divided` keeps the groups that it has, and only a group that has grown too large is divided.
    """
    root_name = folder_name(root)
    for folder in sorted(folders):
        place, metadata = folder or ".", beside.metadata_above(folder)
        groups = _deal(folders.pop(folder), divided.get(place))
        own = beside.deal(folder, groups)
        for group in sorted(groups):
            by_path = {state[0]: state for state in groups.pop(group).states()}  # a faulty store may list a file twice
            states = [by_path[path] for path in sorted(by_path)]
            others = sorted(own.pop(group, ()), key=lambda entry: entry.path)
            of_image = assign(by_path, [*metadata, *others]) if metadata or others else {}
            sidecars = Entries(entry.state for path in (folder, *sorted(by_path)) for entry in of_image.get(path, ()))
            name = f"{place}/#{group[0]:04d}of{group[1]:04d}"
            yield Shard(
                id=hash_of(root_name, name, *(state[:3] for state in (*states, *sidecars.states()))),
                name=name,
                prefix=folder,
                kind="images",
                root=root,
                files=Entries(states),
                sidecars=sidecars,
            )


def _deal(files: Entries, divided: set[Group] | None) -> dict[Group, Entries]:
    """A folder's images by group; only the groups that hold an image."""
    fewest = 1
    if divided is None:
        fewest = 2 ** max(0, math.ceil(math.log2(len(files) / IMAGES_PER_GROUP)))
    while divided and all((number, fewest) in divided for number in range(fewest)):
        fewest *= 2
    groups: dict[Group, Entries] = defaultdict(Entries)
    if fewest == 1:
        groups[0, 1] = files
    else:
        for state in files.states():
            name, of = _hash_of_name(state[0]), fewest
            while divided and (name % of, of) in divided:
                of *= 2
            groups[name % of, of].add(*state)
    most = MOST_GROWTH * IMAGES_PER_GROUP
    while large := [group for group, images in groups.items() if len(images) > most and group[1] < _MOST_GROUPS]:
        for group in large:
            of = 2 * group[1]
            for state in groups.pop(group).states():
                groups[_hash_of_name(state[0]) % of, of].add(*state)
    return groups


def _hash_of_name(path: str) -> int:
    return int(hash_of(path.rpartition("/")[2]), 16)


def folder_name(root: str) -> str:
    """The last part of a root: what the ids of its shards have of it, so that a moved folder keeps them."""
    return posixpath.basename(root.rstrip("/"))


def hash_of(*parts: Any) -> str:
    """16 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
