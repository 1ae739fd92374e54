"""The Arrow schemas of parts and tables, and the records that the stages pass to each other."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import pyarrow as pa

from lora_embed.entries import Entries, Entry

FORMAT = 1  # the format of tables, manifests and parts, and a part of the layout id; see docs/format.md
Reason = Literal[  # of a reject
    "no_image", "empty", "not_an_image", "corrupt_image", "decoder_crashed", "too_many_pixels", "too_many_bytes",
    "duplicate_id", "non_finite_vector", "forgotten",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)
NON_FINITE: Reason = "non_finite_vector"
FORGOTTEN: Reason = "forgotten"
ShardKind = Literal["tar", "parquet", "images", "references"]
MAX_BYTES = 2**30  # of an encoded image: 100 megapixels with 16 bits of red, green, blue and alpha have 0.8 GB
MOST_KINDS, OTHER_KINDS = 20, "others"
TAKEN = "lora_embed.taken"  # a column of samples on their way: the vector that a version has of the same image
FEATURES = b"huggingface"  # the key of a schema's metadata under which Hugging Face `datasets` describes columns
_PART = re.compile(r"([0-9a-f]+)-([0-9]{8})(-last)?\.parquet")
VECTOR_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
CARRY_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One input unit: a tar, a Parquet file, a group of loose image files, or consecutive rows of a list of references."""

    id: str  # 16 hex digits: a hash of root name, shard name, size and etag
    name: str  # path below the root; distinct within a table
    prefix: str  # the part of a sample's id before its key
    kind: ShardKind
    root: str  # URI of the store that holds the files
    files: tuple[Entry, ...] | Entries  # one file, or the files of a group of loose images
    sidecars: tuple[Entry, ...] | Entries = ()  # files that hold carried fields of loose images
    rows: "Rows | None" = None  # of references

    @property
    def size(self) -> int:
        """Bytes."""
        return self.files.size if isinstance(self.files, Entries) else sum(entry.size for entry in self.files)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of a list of references, packed by `shards.lists`: a worker needs them, and not the list."""

    folder: str  # that relative paths count from, a local path or a URI
    packed: bytes = field(default=b"", repr=False)
    repeated: frozenset[int] = frozenset()  # rows whose key an earlier row of the list has
    roots: tuple[str, ...] = ()  # the job's `reference_roots`
    has_local: bool = False  # a row names a file of a local disk
    rejects_unreachable: bool = False  # a web server that fails for `retry_s` makes rejects, not an incomplete shard


Wanted = Callable[[int], bool]  # number of a sample in its shard → True if its bytes must be read


@dataclass
class Sample:
    """One image of a shard. `data` is None where there is no image, it was not asked for, or it is too large (`excess`)."""

    key: str
    data: bytes | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    class_labels: dict[str, dict[str, Any]] = field(default_factory=dict)  # of fields that are numbers of classes with names
    excess: int = 0  # size in bytes of an image that is larger than allowed
    problem: tuple[Reason, str] | None = None  # reason and detail of a reject that the reader found
    missing: str = ""  # why there is no image, if more is known than that
    passed: dict[str, int] = field(default_factory=dict)  # images beside it in a tar that were passed over, by kind
    begin: int | None = None  # byte of its first header in a tar; None where a reader could not begin there
    end: int | None = None  # byte where the next sample, or the tar's closing blocks, begin


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes [begin, end) of a tar; sample number `first` begins there. Without `end`: up to the tar's end, which is checked."""

    first: int = 0
    begin: int = 0
    end: int | None = None


WHOLE = Span()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All settings that shape a part, other than the encoder. Their hash keeps parts of different shape apart."""

    precision: str
    batch_size: int
    chunk_size: int = 512
    vector_type: str = "float32"
    carry: tuple[tuple[str, str], ...] = ()  # (name, type)
    max_pixels: int = 100_000_000
    image_column: str | None = None
    key_column: str | None = None
    limit: int | None = None
    format: int = FORMAT
    max_bytes: int = MAX_BYTES
    image_member: tuple[str, ...] = ()  # extensions of the members of a tar that are images; none: see `shards.tar_groups`

    @functools.cached_property  # it is asked for with each part
    def layout_id(self) -> str:
        """12 hex digits."""
        settings = asdict(self)
        if self.max_bytes == MAX_BYTES:  # left out, so that parts made before this setting existed keep their names
            del settings["max_bytes"]
        if not self.image_member:
            del settings["image_member"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def pins(self) -> dict[str, Any]:
        """The settings that all rows of a version share."""
        return self.numeric | {"carry": [list(pair) for pair in self.carry]}

    @property
    def numeric(self) -> dict[str, str]:
        """Those of `pins` that shape a vector: with another carried field, the vectors are the same."""
        return {"precision": self.precision, "vector_type": self.vector_type}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A committed chunk, described by its file name: `<shard_id>-<chunk>[-last].parquet`."""

    shard_id: str
    chunk: int
    last: bool

    @property
    def name(self) -> str:
        return f"{self.shard_id}-{self.chunk:08d}{'-last' if self.last else ''}.parquet"

    @classmethod
    def parse(cls, name: str) -> "Part | None":
        """None for a name that is not a part's."""
        match = _PART.fullmatch(name)
        return cls(shard_id=match[1], chunk=int(match[2]), last=match[3] is not None) if match else None


@dataclass(frozen=True, kw_only=True)
class ChunkHead:
    """Which chunk a row of the chain is, and its result. `error` says why the rest of its shard cannot be read."""

    shard_id: str
    shard_name: str
    prefix: str
    chunk: int = 0
    last: bool = False  # this chunk ends where the shard ends, and that end was checked
    good: int = 0  # samples with pixels
    taken: int = 0  # samples whose vectors are taken over from a version
    decoded: int = 0  # images given to the decoder, good or bad
    begin: int | None = None  # bytes [begin, end) of the chunk in a tar, if a reader can begin there
    end: int | None = None
    samples: int = 0  # good and bad samples, counted at the chain's end
    reasons: dict[str, int] = field(default_factory=dict)  # rejects by reason, counted with `samples`
    examples: list[dict[str, str]] = field(default_factory=list)  # id, reason and detail of a few rejects
    passed: dict[str, int] = field(default_factory=dict)  # images in a tar that were passed over, by kind
    lacking: dict[str, int] = field(default_factory=dict)  # carried field → samples that do not have it in its type
    image_bytes: int = 0  # size of the samples' encoded images
    retries: int = 0  # store requests that were repeated so far
    error: str = ""
    may_pass: bool = False  # the error may not occur in another try
    seconds: dict[str, float] = field(default_factory=dict, compare=False)  # time taken by each stage
    ended: dict[str, float] = field(default_factory=dict, compare=False)  # stage → its worker's time when it was done

    @property
    def rejects(self) -> int:
        return sum(self.reasons.values())

    @property
    def part(self) -> Part:
        return Part(shard_id=self.shard_id, chunk=self.chunk, last=self.last)

    def sample_id(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChunkHead":
        return cls(**json.loads(text))


def add_kinds(known: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Counts by kind, with more of them. Kinds beyond `MOST_KINDS` are counted together, since strangers name them."""
    counts = dict(known)
    for kind, number in more.items():
        name = kind if kind in counts or len(counts) < MOST_KINDS else OTHER_KINDS
        counts[name] = counts.get(name, 0) + number
    return counts


def encoder_path(space_id: str) -> str:
    """The folder of an encoder below the table."""
    return f"encoders/{space_id}"


def check_carried(pair: list[str]) -> list[str]:
    """Check a carried field's [name, type], as a manifest holds it. Raises ValueError for a type that cannot be carried."""
    if len(pair) != 2 or pair[1] not in CARRY_TYPES:
        raise ValueError(f"is {pair}, expected a name and one of {', '.join(CARRY_TYPES)}")
    return pair


def carry_fields(carry: tuple[tuple[str, str], ...]) -> list[pa.Field]:
    """Arrow fields of the carried columns."""
    return [pa.field(name, CARRY_TYPES[kind]) for name, kind in carry]


def sample_schema(carry: tuple[tuple[str, str], ...]) -> pa.Schema:
    """A chunk's samples between decoding and writing.

    `reason` is null for a sample that is no reject: it has pixels, or `TAKEN` holds the vector that a version has of its image.
    """
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("sha256", pa.binary(32)),
            *carry_fields(carry),
            pa.field("reason", pa.string()),
            pa.field("detail", pa.string()),
            pa.field(TAKEN, pa.binary()),
        ]
    )


def data_schema(dimension: int, vector_type: str, carry: tuple[tuple[str, str], ...]) -> pa.Schema:
    """The columns of a published data file, in plain Arrow types that any reader can open."""
    value = VECTOR_TYPES[vector_type]
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.field("element", value, nullable=False), dimension), nullable=False),
            pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("sha256", pa.binary(32)),
            *carry_fields(carry),
        ]
    )


def part_schema(dimension: int, vector_type: str, carry: tuple[tuple[str, str], ...]) -> pa.Schema:
    """The columns of a staged part: those of a data file, and the `reason` of a reject, whose vector is zeros."""
    reasons = [pa.field("reason", pa.string()), pa.field("detail", pa.string())]
    return pa.schema([*data_schema(dimension, vector_type, carry), *reasons])


REJECT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)


def described(schema: pa.Schema, features: Mapping[str, Any]) -> pa.Schema:
    """A schema whose metadata tell Hugging Face `datasets` what some columns are, beside what their Arrow types say."""
    return (
        schema.with_metadata({FEATURES: json.dumps({"info": {"features": features}}, sort_keys=True)}) if features else schema
    )


def to_ipc(batch: pa.RecordBatch) -> bytes:
    """A record batch as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_ipc(data: bytes) -> pa.RecordBatch:
    """The record batch that `to_ipc` wrote."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()
