"""What the chain is given: shards to embed, which of their chunks are committed, and the settings of all its stages."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lora_embed.config.models import JobConfig
from lora_embed.images.decode import Prepare
from lora_embed.images.preprocess import Joint, Pixels, Preprocessing
from lora_embed.model.description import Description
from lora_embed.schema import Layout, Shard, encoder_path, part_schema
from lora_embed.store.store import Store
from lora_embed.table.known import KnownRows


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """A shard to embed: all chunks that are not yet committed or, in a trial run, its first samples."""

    shard: Shard
    done: frozenset[int] = frozenset()
    limit: int | None = None
    staged: "Staged | None" = None  # None: reading begins at the shard's start
    known: KnownRows | None = None  # rows of a version that may be of the same images


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Where the parts of a shard's committed chunks are, and the number of its last chunk if that is known."""

    store: Store
    space_id: str
    last: int | None


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one worker gets at a time: one large work item, or several small ones."""

    items: tuple[WorkItem, ...]


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """Where an actor loads an encoder from, and the heads that it puts on the encoder's models."""

    uri: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # of the store that holds it
    description: Description
    base: str | None = None  # the place of the base that the user named, for an encoder that is kept as an adapter
    heads: tuple[tuple[int, str], ...] = ()  # number of the model in the encoder, path of the head in the pass's store

    @classmethod
    def on(
        cls, store: Store, encoder: Description, base: str | None = None, heads: tuple[tuple[int, str], ...] = ()
    ) -> "EncoderSource":
        """An encoder in its folder on a store."""
        uri = f"{store.uri}/{encoder_path(encoder.space_id)}"
        return cls(uri=uri, options=store.options, description=encoder, base=base, heads=heads)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What all stages of one pass over the images share. All encoders of a pass use the same `preprocess.decoding`."""

    encoders: tuple[EncoderSource, ...]
    layout: Layout
    input_options: dict[str, Any] = field(repr=False)
    store: Store  # to write parts to and read heads from
    writes_parts: bool = False  # of its only encoder; else the vectors go back to the driver

    @classmethod
    def of(cls, job: JobConfig, store: Store, encoder: Description, layout: Layout, base: str | None = None) -> "Pass":
        """The pass of a job whose encoder and parts are on its table's storage."""
        source = EncoderSource.on(store, encoder, base)
        return cls(encoders=(source,), layout=layout, input_options=job.input_storage_options, store=store, writes_parts=True)

    @property
    def encoder(self) -> Description:
        """The only encoder of a pass that writes parts."""
        (source,) = self.encoders
        return source.description

    @property
    def part_schema(self) -> pa.Schema:
        """The columns of the parts that it writes."""
        return part_schema(self.encoder.dimension, self.layout.vector_type, self.layout.carry)

    @property
    def preparations(self) -> tuple[Preprocessing, ...]:
        """The distinct ways in which an image is prepared."""
        return tuple(dict.fromkeys(source.description.preprocessing for source in self.encoders))

    @property
    def prepare(self) -> Prepare:
        """The preparation of an image, done once for all encoders."""
        return self.preparations[0] if len(self.preparations) == 1 else Joint(parts=self.preparations)

    def split(self, prepared: Pixels) -> dict[Preprocessing, Pixels]:
        """The output of `prepare` for n images → pixels of its `shape` for each preparation."""
        prepare = self.prepare
        parts = prepare.split(prepared) if isinstance(prepare, Joint) else [prepared]
        return dict(zip(self.preparations, parts, strict=True))
