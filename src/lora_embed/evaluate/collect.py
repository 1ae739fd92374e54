"""Embed labelled shards with several encoders, decoding each image once, and keep the vectors for later evaluations."""

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lora_embed.chain import pipeline
from lora_embed.chain.actors import VectorChunk
from lora_embed.chain.cluster import Topology
from lora_embed.chain.items import EncoderSource, Pass, WorkItem
from lora_embed.errors import ConfigError, IncompleteRun
from lora_embed.images.preprocess import decoding
from lora_embed.monitor.progress import Progress, say
from lora_embed.monitor.stages import add_seconds
from lora_embed.schema import FORMAT, NON_FINITE, Layout, Shard, from_ipc, to_ipc
from lora_embed.shards.columns import READING
from lora_embed.shards.look import absent_fields
from lora_embed.store.store import Store
from lora_embed.table.rejects import count_reasons
from lora_embed.text import number_of

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An encoder to embed with, and the ids of its heads."""

    space_id: str
    encoder: EncoderSource
    heads: tuple[str, ...] = ()  # ids, in the order of `encoder.heads`


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One encoder's vectors and its heads' classes for all samples; rejects have NaN and −1."""

    vectors: Vectors  # (n, d)
    classes: dict[str, NDArray[np.int32]]  # head id → (n,) number of the largest output
    forward_s: float


@dataclass(frozen=True, kw_only=True)
class Collected:
    """All samples, sorted by shard and position in it, and every encoder's vectors of them."""

    samples: pa.Table  # id, the carried fields, reason (null if the sample has vectors)
    embedded: dict[str, Embedded]  # by space id
    decoded: int  # images decoded by this call; 0 if all vectors had been kept
    seconds: dict[str, float] = field(default_factory=dict)  # seconds of this call's workers, by stage

    @property
    def rejects(self) -> dict[str, int]:
        """Samples without a vector, by reason."""
        return dict(Counter(reason for reason in self.samples.column("reason").to_pylist() if reason is not None))

    @property
    def good(self) -> NDArray[np.bool_]:
        """Mask (n,) of the samples that have a vector of every encoder."""
        return np.array(self.samples.column("reason").is_null().to_numpy(), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards to read, how to read them, and the store that keeps their vectors."""

    shards: tuple[Shard, ...]
    options: dict[str, Any]
    layout: Layout
    store: Store

    @property
    def folder(self) -> str:
        """The folder that keeps vectors; its name hashes the input and all settings of the layout that affect a vector."""
        layout = self.layout
        settings = [FORMAT, layout.precision, layout.batch_size, layout.max_pixels, layout.image_column, layout.key_column]
        settings += [layout.image_member] if layout.image_member else []
        settings += [READING] if any(shard.kind == "parquet" for shard in self.shards) else []
        return f"evaluated/{_hash([sorted(shard.id for shard in self.shards), settings])}"

    @property
    def samples_path(self) -> str:
        return f"{self.folder}/samples-{_hash(self.layout.carry)}.arrow"

    def vectors_path(self, encoder: Wanted) -> str:
        return f"{self.folder}/{encoder.space_id}-{_hash(encoder.heads)}.npz"


def check_fields(source: Source, options: Sequence[tuple[str, str]]) -> None:
    """Check, before anything is embedded, that the first samples of shards have the fields: pairs of option and field.

    Raises ConfigError for a field that none of these samples has.
    """
    absent = {absence.name: absence for absence in absent_fields(source.shards, source.layout, source.options)}
    for option, name in options:
        if name in absent:
            raise ConfigError(f"{option} {absent[name].describe()}. Correct the name.")


def collect(source: Source, encoders: Sequence[Wanted], topology: Topology) -> Collected:
    """The vectors of all encoders: those kept before, and for the others one pass over the images per way of decoding.

    Raises IncompleteRun if a shard cannot be read to its end.
    """
    raw = source.store.read(source.samples_path)
    samples = None if raw is None else pa.Table.from_batches([from_ipc(raw)])
    by_space = {encoder_wanted.space_id: _read_kept(source, encoder_wanted) for encoder_wanted in encoders}
    missing = [encoder_wanted for encoder_wanted in encoders if by_space[encoder_wanted.space_id] is None] or (
        list(encoders[:1]) if samples is None else []
    )
    seconds: dict[str, float] = {}
    decoded = 0
    for _, group in itertools.groupby(sorted(missing, key=_decoding), key=_decoding):
        in_pass = list(group)
        say(f"{number_of(len(source.shards), 'shard')}: embedding with {number_of(len(in_pass), 'encoder')} in one pass")
        shared = Pass(
            encoders=tuple(encoder_wanted.encoder for encoder_wanted in in_pass),
            store=source.store,
            input_options=source.options,
            layout=source.layout,
        )
        chunks = _in_order(_watched(source, shared, topology), source)
        decoded += sum(chunk.head.decoded for chunk in chunks)
        for chunk in chunks:
            add_seconds(seconds, chunk.seconds)
        if not any(chunk.samples.num_rows for chunk in chunks):
            raise ConfigError(
                f"none of {number_of(len(source.shards), 'shard')} holds a sample; the first is {source.shards[0].name}. "
                "Correct the input."
            )
        samples_of_pass = samples_table(chunks, source.layout.carry)
        samples = samples_of_pass if samples is None else _with_rejects(samples, samples_of_pass)
        for encoder_wanted, encoder_vectors in zip(in_pass, _embedded(chunks, in_pass), strict=True):
            by_space[encoder_wanted.space_id] = encoder_vectors
            source.store.replace(source.vectors_path(encoder_wanted), _to_bytes(encoder_vectors))
        source.store.replace(source.samples_path, to_ipc(samples.combine_chunks().to_batches()[0]))
    assert samples is not None
    embedded = {space_id: vectors for space_id, vectors in by_space.items() if vectors is not None}
    return Collected(samples=_mark_unsound(samples, embedded), embedded=embedded, decoded=decoded, seconds=seconds)


def _decoding(encoder_wanted: Wanted) -> str:
    return repr(decoding(encoder_wanted.encoder.description.preprocessing))


def _watched(source: Source, shared: Pass, topology: Topology) -> Iterator[VectorChunk]:
    """Run the chain, and show progress."""
    with Progress(list(source.shards), topology.workers) as progress:
        for chunk in pipeline.embed_with_each([WorkItem(shard=shard) for shard in source.shards], shared, topology):
            samples, reasons = chunk.samples.num_rows, count_reasons(chunk.samples)
            progress.add(replace(chunk.head, samples=samples, reasons=reasons, seconds=chunk.seconds))
            yield chunk


def _in_order(chunks: Iterable[VectorChunk], source: Source) -> list[VectorChunk]:
    """All chunks, sorted by shard and number. Raises IncompleteRun for shards that could not be read."""
    place = {shard.id: number for number, shard in enumerate(source.shards)}
    in_order = sorted(chunks, key=lambda chunk: (place[chunk.head.shard_id], chunk.head.chunk))
    failed = [chunk.head.error for chunk in in_order if chunk.head.error]
    if failed:
        of_all = f"{len(failed):,} of {number_of(len(place), 'shard')}"
        raise IncompleteRun(f"{of_all} cannot be read to the end:\n" + "\n".join(failed[:10]))
    return in_order


def samples_table(chunks: list[VectorChunk], carry: tuple[tuple[str, str], ...]) -> pa.Table:
    """The chunks' samples with their ids, carried fields and reasons."""
    tables, carried = [], [name for name, _ in carry]
    for chunk in chunks:
        ids = pa.array([chunk.head.sample_id(key) for key in chunk.samples.column("key").to_pylist()], pa.string())
        table = pa.Table.from_batches([chunk.samples]).select([*carried, "reason"])
        tables.append(table.add_column(0, "id", ids))
    return pa.concat_tables(tables)


def _with_rejects(samples: pa.Table, samples_of_pass: pa.Table) -> pa.Table:
    """A sample that is a reject in one pass is a reject in all."""
    reasons = pc.coalesce(samples.column("reason"), samples_of_pass.column("reason"))
    return samples.set_column(samples.schema.get_field_index("reason"), "reason", reasons)


def _embedded(chunks: list[VectorChunk], encoders: Sequence[Wanted]) -> list[Embedded]:
    """Split the chunks' vectors and classes by encoder, in order."""
    good = np.concatenate([np.array(c.samples.column("reason").is_null().to_numpy(zero_copy_only=False), bool) for c in chunks])
    by_encoder, column, class_column = [], 0, 0
    for number, encoder_wanted in enumerate(encoders):
        width, heads = encoder_wanted.encoder.description.dimension, {}
        vectors = np.full((len(good), width), np.nan, np.float32)
        if good.any():
            vectors[good] = np.concatenate([chunk.vectors[:, column : column + width] for chunk in chunks if chunk.head.good])
        column += width
        for head in encoder_wanted.heads:
            heads[head] = np.full(len(good), -1, np.int32)
            if good.any():
                heads[head][good] = np.concatenate([chunk.classes[:, class_column] for chunk in chunks if chunk.head.good])
            class_column += 1
        forward_s = sum(chunk.head.seconds.get(f"forward {number}", 0.0) for chunk in chunks)
        by_encoder.append(Embedded(vectors=vectors, classes=heads, forward_s=forward_s))
    return by_encoder


def _mark_unsound(samples: pa.Table, embedded: dict[str, Embedded]) -> pa.Table:
    """A sample whose vector of any encoder is not finite becomes a reject for all, as in a table."""
    all_finite = np.logical_and.reduce([np.isfinite(encoded.vectors).all(axis=1) for encoded in embedded.values()])
    reasons = [
        reason if reason or is_finite else NON_FINITE
        for reason, is_finite in zip(samples.column("reason").to_pylist(), all_finite, strict=True)
    ]
    return samples.set_column(samples.schema.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))


def _to_bytes(embedded: Embedded) -> bytes:
    buffer = io.BytesIO()
    heads = {f"head-{name}": classes for name, classes in embedded.classes.items()}
    np.savez(buffer, allow_pickle=False, vectors=embedded.vectors, forward_s=np.float64(embedded.forward_s), **heads)
    return buffer.getvalue()


def _read_kept(source: Source, encoder_wanted: Wanted) -> Embedded | None:
    raw = source.store.read(source.vectors_path(encoder_wanted))
    if raw is None:
        return None
    arrays = np.load(io.BytesIO(raw), allow_pickle=False)
    classes = {name: arrays[f"head-{name}"] for name in encoder_wanted.heads}
    return Embedded(vectors=arrays["vectors"], classes=classes, forward_s=float(arrays["forward_s"]))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=list).encode()).hexdigest()[:12]
