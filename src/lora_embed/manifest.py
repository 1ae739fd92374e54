"""A version of a table as JSON: its files, their shards and counts, and how releases read each other's."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_embed.errors import TableError
from lora_embed.schema import FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCounts:
    """A shard in a manifest, or as much of it as one data file holds; samples = vectors + rejects."""

    id: str
    name: str
    samples: int
    vectors: int
    rejects: int
    start: int = 0  # number of the first sample, above 0 where an earlier file holds those before it; written only then

    @property
    def place(self) -> tuple[str, int]:
        """Tells a shard's records in several files apart."""
        return self.id, self.start

    def joined(self, other: "ShardCounts") -> "ShardCounts":
        """This record and another one of the same shard as one."""
        return ShardCounts(
            id=self.id,
            name=self.name,
            samples=self.samples + other.samples,
            vectors=self.vectors + other.vectors,
            rejects=self.rejects + other.rejects,
            start=min(self.start, other.start),
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "start" or self.start}


def join_records(records: Iterable[ShardCounts]) -> dict[str, ShardCounts]:
    """By shard id, in the order in which the shards come first."""
    joined: dict[str, ShardCounts] = {}
    for record in records:
        before = joined.get(record.id)
        joined[record.id] = record if before is None else before.joined(record)
    return joined


def prefix_of(shard_name: str) -> str:
    """What stands before `/` and key in ids of a shard: its name, or for a group of loose images their folder."""
    group = re.fullmatch(r"(.*)/#\d+of\d+", shard_name)
    return shard_name if group is None else group[1] if group[1] != "." else ""


def prefixes_of_ids(ids: Iterable[str]) -> set[str]:
    """All that can stand before `/` and key in these ids, "" included: whose shards may hold one of them."""
    return {id_[: cut.start()] for id_ in ids for cut in re.finditer("/", id_)} | {""}


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A published Parquet file; `shards` are those whose rows it holds, each once, empty ones included."""

    path: str
    rows: int
    bytes: int
    sha256: str
    shards: tuple[ShardCounts, ...]

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"shards": [shard.to_dict() for shard in self.shards]}

    @classmethod
    def from_dict(cls, found: dict[str, Any], newer: set[str]) -> "FileEntry":
        """`newer` takes the names of fields that this release does not know."""
        shards = tuple(ShardCounts(**known_fields(ShardCounts, shard, newer)) for shard in found["shards"])
        return cls(**known_fields(cls, found, newer) | {"shards": shards})


def known_fields(cls: type, found: dict[str, Any], newer: set[str]) -> dict[str, Any]:
    """What a record holds of this release's fields; the names of others are added to `newer`."""
    if others := found.keys() - _names(cls):
        newer |= others
        return {name: value for name, value in found.items() if name not in others}
    return found


@cache
def _names(cls: type) -> frozenset[str]:
    return frozenset(one.name for one in fields(cls))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One version of a table."""

    version: int
    space_id: str
    dimension: int
    created: str  # UTC, ISO 8601
    files: tuple[FileEntry, ...]
    rejects: tuple[FileEntry, ...]
    counts: dict[str, int]
    gates: dict[str, dict[str, Any]]
    pins: dict[str, Any]
    lineage: dict[str, Any]
    held: dict[str, str] = field(default_factory=dict)  # spaces that a rollback holds back → why
    forgotten: tuple[str, ...] = ()  # ids that stay out
    format: int = field(default=FORMAT)
    newer: tuple[str, ...] = ()  # fields that only a newer release knows; not written

    @cached_property
    def shards(self) -> dict[str, ShardCounts]:
        """By shard id; one whose rows are spread over several files is there once, with its whole counts."""
        return join_records(shard for entry in self.files for shard in entry.shards)

    def to_json(self) -> bytes:
        assert not self.newer, "what a newer release knows would be lost"
        written = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "newer"}
        written |= {kind: [entry.to_dict() for entry in written[kind]] for kind in ("files", "rejects")}
        return (json.dumps(written, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Raises TableError, naming `where`, for a damaged manifest or one of another format."""
        found = parse_manifest(data, where)
        newer: set[str] = set()
        found = known_fields(cls, found, newer)
        found["forgotten"] = tuple(found.get("forgotten", ()))
        for kind in ("files", "rejects"):
            found[kind] = tuple(FileEntry.from_dict(entry, newer) for entry in found[kind])
        return cls(**found | {"newer": tuple(sorted(newer))})


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """A manifest as plain data. Raises TableError, naming `where`, for a damaged one or one of another format."""
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise TableError(f"{where}: is damaged ({error}). Remove it to return to the version before.") from None
    refuse_other_format(found, where)
    return found


def refuse_other_format(found: Any, where: str) -> None:
    """Raises TableError, naming `where`, unless the JSON found there is of this release's format."""
    number = found.get("format") if isinstance(found, dict) else None
    if number != FORMAT:
        raise TableError(
            f"{where}: is of format {number}, and this release of lora-embed ({release()}) knows format {FORMAT}. Use a newer "
            "release, or the one that wrote it."
        )


def release() -> str:
    """This release's number."""
    try:
        return version("lora-embed")
    except PackageNotFoundError:  # the package alone went to a cluster
        return "not installed"
