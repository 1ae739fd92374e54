"""A version's manifest as JSON: its files, their shards and counts, and how one release reads another release's manifest."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any, Required

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lora_embed.config.foreign import Count, SpaceId, read_json
from lora_embed.config.messages import first_wrong
from lora_embed.config.values import VectorType
from lora_embed.errors import TableError
from lora_embed.installed import release
from lora_embed.schema import FORMAT, check_carried


class _Counts(TypedDict):
    shards: int
    samples: int
    vectors: int
    rejects: int


class _Gate(TypedDict, total=False):
    value: Required[float | None]
    limit: Required[float]
    direction: str
    says: str
    holds: bool
    accepted: str


class _Pins(TypedDict):
    precision: str
    vector_type: VectorType
    carry: list[Annotated[list[str], AfterValidator(check_carried)]]


class _Forgot(TypedDict, total=False):
    held_by: list[int]


class _Lineage(TypedDict, total=False):
    input: list[str]
    layout: dict[str, Any]
    retain: dict[str, Any]
    figures: dict[str, Any] | None
    forgot: _Forgot


def _fits(kind: Any) -> AfterValidator:
    """Validate those keys of a dictionary that `kind` names, and leave the dictionary as it is."""
    adapter = TypeAdapter(kind)

    def check(value: Any) -> Any:
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(first_wrong(error)) from None
        return value

    return AfterValidator(check)


HexId = Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DataPath = Annotated[str, Field(pattern=r"^(data|rejects)/[0-9a-f]{12}/[0-9a-f]{32}\.parquet$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardCounts:
    """A shard in a manifest, or the part of it that one data file holds; samples = vectors + rejects."""

    id: HexId
    name: str
    samples: Count
    vectors: Count
    rejects: Count
    start: Count = 0  # number of the first sample; above 0 (and only then written) if an earlier file holds those before it

    @property
    def place(self) -> tuple[str, int]:
        """Distinguishes the records of one shard in several files."""
        return self.id, self.start

    def joined(self, other: "ShardCounts") -> "ShardCounts":
        """Combine this record with another record of the same shard."""
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
    """Records by shard id, those of one shard combined, in the order in which each shard first appears."""
    joined: dict[str, ShardCounts] = {}
    for record in records:
        before = joined.get(record.id)
        joined[record.id] = record if before is None else before.joined(record)
    return joined


_PART = re.compile(r"/#(\d+of\d+|[0-9a-f]{16})\Z")  # names of groups of loose images, and of ranges of a list, end like this


def place_of(shard_name: str) -> str:
    """A shard's name; for a group of loose images its folder, and for a range of a list that list, since these change."""
    return _PART.sub("", shard_name)


def prefix_of(shard_name: str) -> str:
    """The part of a shard's sample ids before `/` and key."""
    place = place_of(shard_name)
    return "" if place == "." else place


def prefixes_of_ids(ids: Iterable[str]) -> set[str]:
    """Every prefix (also "") that these ids can have before `/` and key; shards with such a prefix may hold the samples."""
    return {id_[: slash.start()] for id_ in ids for slash in re.finditer("/", id_)} | {""}


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A published Parquet file; `shards` lists each shard whose rows it holds once, and also empty shards."""

    path: DataPath
    rows: Count
    bytes: Count
    sha256: Sha256
    shards: Annotated[tuple[ShardCounts, ...], Field(min_length=1)]

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"shards": [shard.to_dict() for shard in self.shards]}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One version of a table."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    version: Annotated[int, Field(ge=1, le=99_999_999)]
    space_id: SpaceId
    dimension: Annotated[int, Field(ge=1, le=2**20)]
    created: str  # UTC, ISO 8601
    files: tuple[FileEntry, ...]
    rejects: tuple[FileEntry, ...]
    counts: Annotated[dict[str, Count], _fits(_Counts)]
    gates: dict[str, Annotated[dict[str, Any], _fits(_Gate)]]
    pins: Annotated[dict[str, Any], _fits(_Pins)]
    lineage: Annotated[dict[str, Any], _fits(_Lineage)]
    held: dict[SpaceId, str] = field(default_factory=dict)  # spaces that a rollback holds back → reason
    forgotten: tuple[str, ...] = ()  # ids of images that were forgotten and must not come back
    newer: tuple[str, ...] = ()  # names of fields that only a newer release knows; not written

    @property
    def carry(self) -> tuple[tuple[str, str], ...]:
        """Name and type of each carried field."""
        return tuple((name, kind) for name, kind in self.pins["carry"])

    @cached_property
    def shards(self) -> dict[str, ShardCounts]:
        """Shards by id; a shard whose rows are in several files appears once, with its total counts."""
        return join_records(shard for entry in self.files for shard in entry.shards)

    def to_json(self) -> bytes:
        assert not self.newer, "the fields of a newer release would be lost"
        content = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "newer"}
        content |= {kind: [entry.to_dict() for entry in content[kind]] for kind in ("files", "rejects")}
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Raises TableError, naming `where`, for a damaged manifest or one of another format."""
        try:
            return _MANIFEST.validate_json(data, strict=True, extra="forbid")
        except ValidationError as error:
            newer = {str(item["loc"][-1]) for item in error.errors() if item["type"] == "unexpected_keyword_argument"}
        refuse_other_format(read_json(data, where, "Remove it to return to the version before."), where)
        try:
            manifest = _MANIFEST.validate_json(data, strict=True, extra="ignore")
        except ValidationError as error:
            raise TableError(
                f"{where}: {first_wrong(error)}. The file is damaged, or lora-embed did not write it. Find out who wrote it, "
                "or remove it to return to the version before."
            ) from None
        return replace(manifest, newer=tuple(sorted(newer)))


_MANIFEST = TypeAdapter(Manifest)


def refuse_other_format(content: Any, where: str) -> None:
    """Raises TableError, naming `where`, unless the JSON content read there has this release's format."""
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT:
        raise TableError(
            f"{where}: has format {number}, but this release of lora-embed ({release()}) reads format {FORMAT} only. Use a "
            "newer release, or the release that wrote it."
        )
