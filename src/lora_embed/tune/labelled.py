"""Labelled shards → pixels in a memory-mapped file, decoded once, with labels and groups; a search embeds them many times."""

import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_embed.errors import ConfigError
from lora_embed.evaluate.request import LabelledInput
from lora_embed.images.decode import MAX_PIXELS, BadImage, Decode
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.preprocess import Pixels, Preprocessing
from lora_embed.monitor.progress import LOG_EVERY_S, say
from lora_embed.schema import Layout, Sample, Shard
from lora_embed.shards.columns import READING
from lora_embed.shards.fields import typed
from lora_embed.shards.read import read_samples
from lora_embed.store import local
from lora_embed.text import number_of

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which samples a search uses: those with a label, at most `most`, drawn by seed, with groups kept whole if possible."""

    fields: tuple[str, ...]  # fields with labels, one per task
    group: str | None  # field: samples that share it stay together in every split
    most: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """All fields that samples are read with."""
        return self.fields if self.group is None else (*self.fields, self.group)


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images ready for a model (n, H, W, 3), mapped from a file, with ids, groups and labels of each row."""

    pixels: Pixels
    ids: tuple[str, ...]
    names: tuple[str, ...]  # group of each image; its id if there are no groups
    classes: dict[str, tuple[str, ...]]  # field → names of its classes
    labels: dict[str, NDArray[np.int64]]  # field → (n,) class, −1 where there is none
    samples: int  # samples read
    unlabelled: int
    decoded: int  # images decoded in this process; 0 if they were decoded before
    rejects: dict[str, int]  # reason → samples with a label
    fingerprint: str  # 12 hex digits of a hash of images, labels, groups and preprocessing


@dataclass
class _Drawn:
    """The samples that were drawn, in the order of the rows of the mapped file."""

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)  # SHA-256 of the encoded bytes
    labels: list[list[str | None]] = field(default_factory=list)
    samples: int = 0
    unlabelled: int = 0
    rejects: dict[str, int] = field(default_factory=dict)


def read_labelled(data: LabelledInput, selection: Wanted, preprocessing: Preprocessing, folder: Path) -> LabelledImages:
    """The labelled images of the inputs, decoded into a file below `folder` unless that was done before.

    Raises ConfigError if a task has no labelled image, and ShardError for a shard that cannot be read to its end.
    """
    shards = data.listing(selection.names).shards
    identity = [FORMAT, [shard.id for shard in shards], asdict(selection), preprocessing.settings()]
    identity += [data.image_column, data.key_column] if data.image_column or data.key_column else []
    identity += [data.image_member] if data.image_member else []
    identity += [READING] if any(shard.kind == "parquet" for shard in shards) else []
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    pixels, record = folder / f"pixels-{name}.npy", folder / f"images-{name}.json"
    decoded = 0
    if not record.is_file():
        pixels.unlink(missing_ok=True)  # left by a run that was stopped while it decoded
        with IsolatedDecoder() as decode:  # an image that kills its process is a reject, and the search continues
            drawn, decoded = _Drawing(selection, preprocessing, pixels, decode).draw(shards, data)
        _check(drawn, selection, data.inputs)
        local.replace(folder, record, json.dumps(asdict(drawn)).encode())
    drawn = _Drawn(**json.loads(record.read_bytes()))
    content = json.dumps([drawn.ids, drawn.names, drawn.sums, drawn.labels, selection.fields, preprocessing.settings()])
    classes = [sorted({label for row in drawn.labels if (label := row[task])}) for task in range(len(selection.fields))]
    places: list[dict[str | None, int]] = [{name: at for at, name in enumerate(names)} | {None: -1} for names in classes]
    return LabelledImages(
        pixels=np.load(pixels, mmap_mode="r")[: len(drawn.ids)],
        ids=tuple(drawn.ids),
        names=tuple(drawn.names),
        classes={field_name: tuple(names) for field_name, names in zip(selection.fields, classes, strict=True)},
        labels={
            field_name: np.array([places[task][row[task]] for row in drawn.labels], np.int64)
            for task, field_name in enumerate(selection.fields)
        },
        samples=drawn.samples,
        unlabelled=drawn.unlabelled,
        decoded=decoded,
        rejects=drawn.rejects,
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:12],
    )


class _Drawing:
    """Draws `selection.most` samples in one pass: those with the smallest hashes. A later sample may replace an earlier one."""

    def __init__(self, selection: Wanted, preprocessing: Preprocessing, path: Path, decode: Decode) -> None:
        self._selection, self._preprocessing, self._decode = selection, preprocessing, decode
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (selection.most, *preprocessing.shape)  # a sparse file: rows that are not written take no disk space
        self._pixels: Pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        self._heap: list[tuple[int, int]] = []  # (−hash, row) of those drawn so far, the largest hash first
        self._drawn = _Drawn()
        self._decoded = 0

    def draw(self, shards: list[Shard], data: LabelledInput) -> tuple[_Drawn, int]:
        """Read all shards; returns the drawn samples, and how many images were decoded for it."""
        rejects, logged = Counter[str](), time.monotonic()
        for id_, sample in _samples(shards, data.layout(self._selection.names), data.input_options):
            self._drawn.samples += 1
            try:
                self._take(id_, sample)
            except BadImage as bad:
                rejects[bad.reason] += 1
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                say(f"{number_of(self._drawn.samples, 'sample')} read, {number_of(self._decoded, 'image')} decoded")
        self._drawn.rejects = dict(rejects)
        self._pixels.flush()  # type: ignore[attr-defined]  # of the mapped file
        return self._drawn, self._decoded

    def _take(self, id_: str, sample: Sample) -> None:
        labels = [_text(sample.fields.get(name)) for name in self._selection.fields]
        if not any(label is not None for label in labels):
            self._drawn.unlabelled += 1
            return
        if sample.data is None:
            raise BadImage("no_image", sample.missing or "the sample has no image")
        name = (_text(sample.fields.get(self._selection.group)) if self._selection.group else None) or id_
        rank = (_hash(self._selection.seed, name), _hash(self._selection.seed, id_))
        place = -(rank[0] << 64 | rank[1])
        if len(self._heap) == self._selection.most and place < self._heap[0][0]:
            return
        pixels = self._decode(sample.data, self._preprocessing, MAX_PIXELS).pixels
        self._decoded += 1
        self._put(place, pixels, [id_, name, hashlib.sha256(sample.data).hexdigest(), labels])

    def _put(self, place: int, pixels: Pixels, values: list[Any]) -> None:
        """Write a sample to the next free row, or in place of the sample with the largest hash."""
        columns: list[list[Any]] = [self._drawn.ids, self._drawn.names, self._drawn.sums, self._drawn.labels]
        row = len(self._heap)
        if row < self._selection.most:
            heapq.heappush(self._heap, (place, row))
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        else:
            _, row = heapq.heapreplace(self._heap, (place, self._heap[0][1]))
            for column, value in zip(columns, values, strict=True):
                column[row] = value
        self._pixels[row] = pixels


def _samples(shards: list[Shard], layout: Layout, options: dict[str, Any]) -> Iterator[tuple[str, Sample]]:
    """All samples with their ids."""
    for shard in shards:
        for sample in read_samples(shard, layout, options, wanted=lambda number: True):
            yield (f"{shard.prefix}/{sample.key}" if shard.prefix else sample.key), sample


def _text(value: Any) -> str | None:
    """A field as the name of a class: the text that `carry` makes of it, stripped; None if it is empty."""
    return (typed(value, "string") or "").strip() or None


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode("utf-8", "backslashreplace")).digest()[:8], "big")


def _check(drawn: _Drawn, selection: Wanted, inputs: tuple[str, ...]) -> None:
    for task, name in enumerate(selection.fields):
        classes = {row[task] for row in drawn.labels} - {None}
        if len(classes) < 2:
            problem = (
                f"has one class, {next(iter(classes))!r},"
                if classes
                else f"none of {number_of(drawn.samples, 'sample')} has it"
            )
            raise ConfigError(
                f"--label {name}: {problem} in {', '.join(inputs)}. Expected a field of the samples' JSON, a text member or a "
                "Parquet column with at least two classes. Correct the field's name, or the input."
            )
