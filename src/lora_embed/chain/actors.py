"""The actors of the chain: embed a chunk's pixels with one or several encoders, write its part, or do everything."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_embed.chain.chunks import decode_blocks
from lora_embed.chain.device import take_device
from lora_embed.chain.items import EncoderSource, Pass
from lora_embed.errors import carries_errors
from lora_embed.monitor.stages import Stopwatch
from lora_embed.schema import ChunkHead, from_ipc
from lora_embed.store.retry import take_retries
from lora_embed.store.store import Store
from lora_embed.table.parts import make_part, write_part
from lora_embed.table.rejects import count_reasons, examples_of

if TYPE_CHECKING:
    from lora_embed.model.encoder import Encoder
    from lora_embed.model.head import HeadOnBody


@dataclass(frozen=True, kw_only=True)
class VectorChunk:
    """One chunk: all samples, and for the good ones their vectors (good, Σd) and each head's class (good, heads)."""

    head: ChunkHead
    samples: pa.RecordBatch
    vectors: NDArray[np.float32]
    classes: NDArray[np.int32]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage. `forward` is the sum over encoders; `forward i` of single encoders are left out."""
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
    """The actor that loads all encoders, checks each on its golden images, and turns a chunk's pixels into vectors."""

    @carries_errors
    def __init__(self, shared: Pass, kind: str) -> None:
        from lora_embed.model.encoder import load_encoder  # imports torch, which decoders do not need

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
        """Rows of `decode_items` → rows of `VectorChunk`. The stage `forward i` has the seconds of encoder i."""
        assert len(batch["head"]) == 1, "expected one chunk: batch_size=1"
        head = ChunkHead.from_json(batch["head"][0])
        pixels = self._shared.split(np.asarray(batch["pixels"][0])[: head.good])
        clock = Stopwatch()
        vectors, classes = [np.empty((head.good, 0), np.float32)], [np.empty((head.good, 0), np.int32)]
        for number, (source, encoder) in enumerate(zip(self._shared.encoders, self._encoders, strict=True)):
            if head.good:
                with clock.timing(f"forward {number}"):
                    vectors.append(encoder.embed_pixels(pixels[source.description.preprocessing]))
                    logits = [on_body.take(head.good) for on_body in self._heads[number]]
                    classes += [values.argmax(axis=1).astype(np.int32)[:, None] for values in logits]
        if not head.error:
            seconds = head.seconds | clock.seconds | {"forward": sum(clock.seconds.values())}
            head = replace(head, seconds=seconds, ended=head.ended | {"forward": time.time()})
        arrays = {"vectors": np.concatenate(vectors, axis=1), "classes": np.concatenate(classes, axis=1)}
        # As bytes, because Ray's blocks cannot hold a tensor without elements, and most chunks have no classes.
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
    """Commits parts. An actor, since Ray starts a new process for each task that holds no CPU."""

    def __init__(self, shared: Pass) -> None:
        self._store, self._layout, self._encoder = shared.store, shared.layout, shared.encoder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `EmbedImages` → committed parts; returns a row with the part's `head`, which now has its counts."""
        assert len(batch["head"]) == 1, "expected one chunk: batch_size=1"
        chunk = VectorChunk.from_row({name: values[0] for name, values in batch.items()})
        head = chunk.head
        if not head.error:
            clock = Stopwatch()
            with clock.timing("write"):
                vectors = chunk.vectors.reshape(head.good, self._encoder.dimension)
                part = make_part(head, chunk.samples, vectors, self._layout)
                write_part(self._store, self._encoder.space_id, self._layout, head, part)
            head = replace(
                head,
                samples=part.num_rows,
                reasons=count_reasons(part),
                examples=[asdict(example) for example in examples_of(part)],
                seconds=chunk.seconds | clock.seconds,
                ended=head.ended | {"write": time.time()},
            )
        head = replace(head, retries=head.retries + take_retries())
        return {"head": np.array([head.to_json()], dtype=object)}


class EmbedShards:
    """The whole chain in one actor, for clusters without GPU: pixels never leave the process."""

    def __init__(self, shared: Pass, kind: str, was_tried: Callable[[], bool]) -> None:
        self._embed = EmbedImages(shared, kind)
        self._write = WriteParts(shared) if shared.writes_parts else None
        self._decoding = (shared.layout, shared.prepare, shared.input_options, was_tried)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Blocks of work items → one row per chunk: the `head` of its part, or a row of `VectorChunk`."""
        for row in decode_blocks(batch, *self._decoding):
            embedded = self._embed(row)
            yield embedded if self._write is None else self._write(embedded)
