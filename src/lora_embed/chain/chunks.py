"""A block of work items → decoded chunks: read samples in order, decode their images, yield one whole chunk at a time."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lora_embed.chain.items import WorkItem
from lora_embed.chain.resume import find_stretches
from lora_embed.errors import ShardError, StorageError, StoreUnavailable, lack_of_machine
from lora_embed.images.arithmetic import check_once
from lora_embed.images.decode import BadImage, Decode, Prepare, decode_image
from lora_embed.images.isolate import IsolatedDecoder, decode_or_die, keep_freed_memory
from lora_embed.images.preprocess import Pixels
from lora_embed.monitor.stages import Stopwatch
from lora_embed.schema import TAKEN, ChunkHead, Layout, Sample, Shard, add_kinds, described, sample_schema, to_ipc
from lora_embed.shards.columns import NUMBERED
from lora_embed.shards.fields import typed
from lora_embed.shards.isolated import read_isolated, read_or_die
from lora_embed.shards.read import ReadSamples, read_samples
from lora_embed.store.retry import take_retries
from lora_embed.table.known import KnownImage, KnownReject, KnownVectors

MOST_TEXT = 2**29  # characters of a chunk's keys and carried fields; an Arrow column holds up to 2 GiB


@dataclass(frozen=True, kw_only=True)
class DecodedChunk:
    """One chunk's samples, of `schema.sample_schema`, and the pixels (good, *shape) of the good ones, in order."""

    head: ChunkHead
    samples: pa.RecordBatch
    pixels: Pixels


def decode_blocks(
    batch: dict[str, Any], layout: Layout, preprocessing: Prepare, options: dict[str, Any], was_tried: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Like `decode_items`, but in child processes if a process has died of this task before, or hung.

    An image or a shard that kills a process then kills only a child, and becomes a reject or the shard's error.
    Raises EncoderError if this process makes other pixels than the encoder was built with.
    """
    check_once(preprocessing)
    keep_freed_memory()
    isolated = IsolatedDecoder() if was_tried() else None
    with isolated or contextlib.nullcontext():
        decode: Decode = isolated or decode_or_die
        read = read_or_die if isolated is None else read_isolated
        yield from decode_items(batch, layout, preprocessing, options, read=read, decode=decode)


def decode_items(
    batch: dict[str, Any],
    layout: Layout,
    preprocessing: Prepare,
    options: dict[str, Any],
    *,
    read: ReadSamples = read_samples,
    decode: Decode = decode_image,
) -> Iterator[dict[str, Any]]:
    """Blocks of work items → one row per chunk: `head` (JSON), `samples` (Arrow IPC), `pixels` (1, n, *shape).

    A shard that cannot be read further becomes a row whose head holds the error; the other shards continue.
    """
    for item in (item for block in batch["block"] for item in block.items):
        try:
            for chunk in decode_shard(item, layout, preprocessing, options, read=read, decode=decode):
                yield _row(chunk.head, chunk.samples, chunk.pixels)
        except (ShardError, StorageError, StoreUnavailable, OSError) as error:
            shard = item.shard
            head = ChunkHead(
                shard_id=shard.id,
                shard_name=shard.name,
                prefix=shard.prefix,
                error=(lack_of_machine(error) if isinstance(error, OSError) else None) or str(error),
                may_pass=isinstance(error, StoreUnavailable | OSError),
                retries=take_retries(),
            )
            nothing = pa.RecordBatch.from_pylist([], schema=sample_schema(layout.carry))
            yield _row(head, nothing, np.empty((0, *preprocessing.shape), np.uint8))


def _row(head: ChunkHead, samples: pa.RecordBatch, pixels: Pixels) -> dict[str, Any]:
    if not len(pixels):  # Ray's blocks cannot hold an empty tensor; head.good is 0, so this one is ignored
        pixels = np.zeros((1, *pixels.shape[1:]), np.uint8)
    return {
        "head": np.array([head.to_json()], dtype=object),
        "samples": np.array([to_ipc(samples)], dtype=object),
        "pixels": pixels[np.newaxis],
    }


def decode_shard(
    item: WorkItem,
    layout: Layout,
    preprocessing: Prepare,
    options: dict[str, Any],
    *,
    read: ReadSamples = read_samples,
    decode: Decode = decode_image,
) -> Iterator[DecodedChunk]:
    """Yield a shard's chunks except those that are done; each call yields the same bytes.

    A chunk is yielded once the sample after it was read or the shard's end is proven. Rejects count as samples of a chunk.
    An image that is among the item's known rows is not decoded: its vector is taken from there. If a version has the same
    shard, the images are not even read. Raises ShardError if the shard cannot be read further.
    """
    with KnownVectors(item.known) if item.known is not None else contextlib.nullcontext() as known:
        way = _Way(preprocessing, read, decode, known)
        if item.known is not None and item.known.is_same_shard:
            followed: set[int] = set()
            try:
                for chunk in _chunks(replace(item, staged=None), layout, replace(way, follows=True), options):
                    followed.add(chunk.head.chunk)
                    yield chunk
                return
            except _Differs:
                item = replace(item, done=item.done | followed, staged=None)
        yield from _chunks(item, layout, way, options)


@dataclass(frozen=True)
class _Way:
    """How a shard's samples are read, and what happens to their images."""

    preprocessing: Prepare
    read: ReadSamples
    decode: Decode
    known: KnownVectors | None
    follows: bool = False  # all samples are taken from the same shard in a version, and only their fields are read

    def follow(self, sample: Sample, layout: Layout) -> KnownImage | KnownReject:
        """What the version has of a sample. Raises _Differs if that is another sample, or one that the limits now forbid."""
        assert self.known is not None
        found = self.known.follow(sample.key)
        if found is None or sample.excess > layout.max_bytes:
            raise _Differs
        if isinstance(found, KnownImage) and found.width * found.height > layout.max_pixels:
            raise _Differs
        return found


class _Differs(Exception):
    """A shard has other samples than the version has of it, so its images must be read."""


def _chunks(item: WorkItem, layout: Layout, way: _Way, options: dict[str, Any]) -> Iterator[DecodedChunk]:
    shard, done, size = item.shard, item.done, layout.chunk_size
    keys: set[str] = set()
    clock = Stopwatch()
    for stretch in find_stretches(item, layout):
        span, open_chunk = stretch.span, _Chunk(stretch.span.first // size, layout, way)
        keys |= stretch.skipped_keys
        of_reading = replace(layout, max_bytes=0) if way.follows else layout
        samples = way.read(shard, of_reading, options, _Missing(done, size), span)
        for number, sample in enumerate(clock.timed("read", samples), span.first):
            if item.limit is not None and number >= item.limit:
                break
            if number // size != open_chunk.chunk:
                if open_chunk.chunk not in done:
                    yield open_chunk.finish(shard, clock.take(), last=False)
                open_chunk = _Chunk(number // size, layout, way)
            followed = way.follow(sample, layout) if way.follows else None
            if open_chunk.chunk not in done:
                with clock.timing("decode"):
                    if followed is not None:
                        open_chunk.copy(sample, followed)
                    else:
                        open_chunk.add(sample, twice=_twice(shard) if sample.key in keys else "")
                if open_chunk.text > MOST_TEXT:
                    raise ShardError(
                        f"{shard.root}/{shard.name}: the keys and carried fields of chunk {open_chunk.chunk} have more than "
                        f"{MOST_TEXT >> 20} MiB. Set chunk_size smaller, or carry fewer fields."
                    )
            keys.add(sample.key)
        if open_chunk.chunk not in done:
            yield open_chunk.finish(shard, clock.take(), last=span.end is None)


def _twice(shard: Shard) -> str:
    """The detail of a sample whose key an earlier one has."""
    detail = "an earlier sample of this shard has the same key"
    if shard.kind != "parquet":
        return detail
    return f"{detail}. Set key_column to a column of distinct values, or to {NUMBERED} to number the rows"


@dataclass(frozen=True)
class _Missing:
    """Tells whether a sample belongs to a chunk that is not done. A class, so that it can be sent to another process."""

    done: frozenset[int]
    chunk_size: int

    def __call__(self, number: int) -> bool:
        return number // self.chunk_size not in self.done


class _Chunk:
    """A chunk that is being filled; pixels are written directly into one array, so that they are never copied."""

    def __init__(self, chunk: int, layout: Layout, way: _Way) -> None:
        self.chunk = chunk
        self._layout = layout
        self._way = way
        self._pixels: Pixels | None = None
        self._begin: int | None = None
        self._end: int | None = None
        self._good = self._decoded = self._image_bytes = 0
        self._passed: dict[str, int] = {}
        self._class_labels: dict[str, dict[str, Any]] = {}  # the same for all samples of a file
        self.text = 0  # characters of keys and carried fields
        self._rows: list[dict[str, Any]] = []
        self._taken: list[tuple[dict[str, Any], KnownImage]] = []  # rows of which a version has the vector

    def _add_row(self, sample: Sample) -> dict[str, Any]:
        """Begin a sample's row with its key and carried fields."""
        self._begin, self._end = self._begin if self._rows else sample.begin, sample.end
        self._passed = add_kinds(self._passed, sample.passed)
        self._class_labels = sample.class_labels
        carried = {name: typed(sample.fields.get(name), kind) for name, kind in self._layout.carry}
        self.text += len(sample.key) + sum(len(value) for value in carried.values() if isinstance(value, str))
        row = dict.fromkeys(("width", "height", "sha256", "reason", "detail", TAKEN)) | {"key": sample.key} | carried
        self._rows.append(row)
        return row

    def copy(self, sample: Sample, known: KnownImage | KnownReject) -> None:
        """Take over what a version has of a sample, with its fields as they are now."""
        row = self._add_row(sample)
        if isinstance(known, KnownReject):
            row |= {"reason": known.reason, "detail": known.detail}
        else:
            self._take(row, known)

    def _take(self, row: dict[str, Any], image: KnownImage) -> None:
        row |= {"width": image.width, "height": image.height, "sha256": image.digest}
        self._taken.append((row, image))

    def add(self, sample: Sample, *, twice: str = "") -> None:
        """Decode a sample's image; `twice` is the detail of the reject if its key is not its own."""
        row = self._add_row(sample)
        try:
            if sample.excess:
                raise BadImage("too_many_bytes", f"{sample.excess} bytes, max_bytes allows {self._layout.max_bytes}")
            if sample.problem is not None:
                raise BadImage(*sample.problem)
            if sample.data is None:
                raise BadImage("no_image", sample.missing or "the sample has no image")
            row["sha256"] = hashlib.sha256(sample.data).digest()
            self._image_bytes += len(sample.data)
            if twice:
                raise BadImage("duplicate_id", twice)
            known = self._way.known.find(row["sha256"]) if self._way.known is not None else None
            if known is not None and known.width * known.height <= self._layout.max_pixels:
                self._take(row, known)
            else:
                self._decoded += 1
                decoded = self._way.decode(sample.data, self._way.preprocessing, self._layout.max_pixels)
                row |= {"width": decoded.width, "height": decoded.height}
                self._keep(decoded.pixels)
        except BadImage as bad:
            row |= {"reason": bad.reason, "detail": str(bad)}

    def finish(self, shard: Shard, seconds: dict[str, float], *, last: bool) -> DecodedChunk:
        pixels = np.empty((0, *self._way.preprocessing.shape), np.uint8) if self._pixels is None else self._pixels[: self._good]
        if self._way.known is not None:
            for (row, _), vector in zip(self._taken, self._way.known.vectors([image for _, image in self._taken]), strict=True):
                row[TAKEN] = vector
        samples = pa.RecordBatch.from_pylist(self._rows, described(sample_schema(self._layout.carry), self._class_labels))
        head = ChunkHead(
            shard_id=shard.id,
            shard_name=shard.name,
            prefix=shard.prefix,
            chunk=self.chunk,
            last=last,
            good=self._good,
            taken=len(self._taken),
            decoded=self._decoded,
            begin=self._begin,
            end=self._end,
            image_bytes=self._image_bytes,
            passed=self._passed,
            lacking={name: count for name, _ in self._layout.carry if (count := samples.column(name).null_count)},
            retries=take_retries(),
            seconds=seconds,
            ended={"decode": time.time()},  # reading and decoding take turns
        )
        return DecodedChunk(head=head, samples=samples, pixels=pixels)

    def _keep(self, pixels: Pixels) -> None:
        if self._pixels is None:
            self._pixels = np.empty((self._layout.chunk_size, *pixels.shape), np.uint8)
        self._pixels[self._good] = pixels
        self._good += 1
