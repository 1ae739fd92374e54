"""The actors of the chain: embed a chunk's pixels with one or several encoders, write its part, or do all of it on one core."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_embed.chain.chunks import decode_blocks
from lora_embed.chain.device import take_device
from lora_embed.errors import carries_errors
from lora_embed.images.decode import Prepare
from lora_embed.images.preprocess import Joint, Pixels, Preprocessing
from lora_embed.monitor.stages import Stopwatch
from lora_embed.schema import ChunkHead, Layout, from_ipc
from lora_embed.store.retry import take_retries
from lora_embed.store.store import Store
from lora_embed.table.parts import make_part, reasons_of, write_part

if TYPE_CHECKING:
    from lora_embed.model.encoder import Encoder
    from lora_embed.model.head import HeadOnBody


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """Where an actor loads an encoder from, and the heads that it puts on the encoder's models."""

    uri: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # of the store that holds it
    dimension: int
    preprocessing: Preprocessing
    base: str | None = None  # where its base lies, by the user's word, for one that is kept as an adapter
    heads: tuple[tuple[int, str], ...] = ()  # number of the model in the encoder, path of the head in the pass's store


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What all actors of one pass over the images share; all its encoders decode alike (`preprocess.decoding`)."""

    encoders: tuple[EncoderSource, ...]
    layout: Layout
    input_options: dict[str, Any] = field(repr=False)
    store: Store  # that parts are written to and heads are read from
    space_id: str | None = None  # of the parts; None: no parts are written, the vectors come back to the driver

    @property
    def dimension(self) -> int:
        """Of the vectors of all encoders side by side."""
        return sum(encoder.dimension for encoder in self.encoders)

    @property
    def preparations(self) -> tuple[Preprocessing, ...]:
        """The distinct ways in which an image is prepared."""
        return tuple(dict.fromkeys(encoder.preprocessing for encoder in self.encoders))

    @property
    def prepare(self) -> Prepare:
        """What is done with an image, once, for all encoders."""
        return self.preparations[0] if len(self.preparations) == 1 else Joint(parts=self.preparations)

    def split(self, prepared: Pixels) -> dict[Preprocessing, Pixels]:
        """What `prepare` made of n images → pixels (n, H, W, 3) for each preparation."""
        prepare = self.prepare
        parts = prepare.split(prepared) if isinstance(prepare, Joint) else [prepared]
        return dict(zip(self.preparations, parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class VectorChunk:
    """One chunk: its samples, and for the good ones the vectors (good, Σd) and the class by each head (good, heads)."""

    head: ChunkHead
    samples: pa.RecordBatch
    vectors: NDArray[np.float32]
    classes: NDArray[np.int32]

    @property
    def seconds(self) -> dict[str, float]:
        """By stage; those of single encoders, `forward i`, are left out: they are in `forward`."""
        return {stage: seconds for stage, seconds in self.head.seconds.items() if " " not in stage}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "VectorChunk":
        """A row of `EmbedImages`. A chunk without good samples has vectors of shape (0, 0)."""
        head = ChunkHead.from_json(row["head"])
        vectors, classes = np.frombuffer(row["vectors"], np.float32), np.frombuffer(row["classes"], np.int32)
        return cls(
            head=head,
            samples=from_ipc(row["samples"]),
            vectors=vectors.reshape(head.good, len(vectors) // max(head.good, 1)),
            classes=classes.reshape(head.good, len(classes) // max(head.good, 1)),
        )


class EmbedImages:
    """The actor: loads all encoders, each proven on its golden images, then turns a chunk's pixels into vectors."""

    @carries_errors
    def __init__(self, shared: Pass, kind: str) -> None:
        from lora_embed.model.encoder import load_encoder  # with torch, which decoders can do without

        device = take_device(kind)
        self._shared = shared
        layout = shared.layout
        self._encoders = [
            load_encoder(
                source.uri,
                device=device,
                precision=layout.precision,
                batch_size=layout.batch_size,
                storage_options=source.options,
                base=source.base,
            )
            for source in shared.encoders
        ]
        self._heads = [
            _load_heads(shared.store, source, encoder) for source, encoder in zip(shared.encoders, self._encoders, strict=True)
        ]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `decode_items` → rows of `VectorChunk`; seconds of encoder i are those of the stage `forward i`."""
        assert len(batch["head"]) == 1, "chunks go one by one: batch_size=1"
        head = ChunkHead.from_json(batch["head"][0])
        pixels = self._shared.split(np.asarray(batch["pixels"][0])[: head.good])
        clock = Stopwatch()
        vectors, classes = [np.empty((head.good, 0), np.float32)], [np.empty((head.good, 0), np.int32)]
        for number, (source, encoder) in enumerate(zip(self._shared.encoders, self._encoders, strict=True)):
            if head.good:
                with clock.timing(f"forward {number}"):
                    vectors.append(encoder.embed_pixels(pixels[source.preprocessing]))
                    logits = [on_body.take(head.good) for on_body in self._heads[number]]
                    classes += [values.argmax(axis=1).astype(np.int32)[:, None] for values in logits]
        if not head.error:
            head = replace(head, seconds=head.seconds | clock.seconds | {"forward": sum(clock.seconds.values())})
        arrays = {"vectors": np.concatenate(vectors, axis=1), "classes": np.concatenate(classes, axis=1)}
        # As bytes: Ray's blocks hold no tensor without elements, and most chunks have no classes.
        packed = {name: np.array([values.tobytes()], dtype=object) for name, values in arrays.items()}
        return {"head": np.array([head.to_json()], dtype=object), "samples": batch["samples"]} | packed


def _load_heads(store: Store, source: EncoderSource, encoder: "Encoder") -> "list[HeadOnBody]":
    if not source.heads:
        return []
    from lora_embed.model.head import HeadOnBody, SavedHead

    heads = []
    for number, path in source.heads:
        data = store.read(path)
        assert data is not None, path
        heads.append(HeadOnBody(SavedHead.from_bytes(data), encoder.models[number]))
    return heads


class WriteParts:
    """Commits parts; an actor, since Ray would start a process anew for each task that holds no CPU."""

    def __init__(self, shared: Pass) -> None:
        assert shared.space_id is not None
        self._store, self._layout, self._dimension = shared.store, shared.layout, shared.dimension
        self._space_id = shared.space_id

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `EmbedImages` → committed parts, and for each a row with its `head`, counted."""
        assert len(batch["head"]) == 1, "chunks go one by one: batch_size=1"
        chunk = VectorChunk.from_row({name: values[0] for name, values in batch.items()})
        head = chunk.head
        if not head.error:
            clock = Stopwatch()
            with clock.timing("write"):
                vectors = chunk.vectors.reshape(head.good, self._dimension)
                part = make_part(head, chunk.samples, vectors, self._layout)
                write_part(self._store, self._space_id, self._layout, head, part)
            head = replace(head, samples=part.num_rows, reasons=reasons_of(part), seconds=chunk.seconds | clock.seconds)
        head = replace(head, retries=head.retries + take_retries())
        return {"head": np.array([head.to_json()], dtype=object)}


class EmbedShards:
    """The whole chain in one actor, for cores that decode and embed: pixels never leave the process."""

    def __init__(self, shared: Pass, kind: str, was_tried: Callable[[], bool]) -> None:
        self._embed = EmbedImages(shared, kind)
        self._write = WriteParts(shared) if shared.space_id is not None else None
        self._decoding = (shared.layout, shared.prepare, shared.input_options, was_tried)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Blocks of work items → rows `head` of the parts, or rows of `VectorChunk`; one per chunk."""
        for row in decode_blocks(batch, *self._decoding):
            embedded = self._embed(row)
            yield embedded if self._write is None else self._write(embedded)
