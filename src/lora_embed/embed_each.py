"""Several encoders on the same images: an actor that decodes each image once and gives it to all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lora_embed.decode import Prepare
from lora_embed.embed import take_device
from lora_embed.errors import carries_errors
from lora_embed.isolate import decode_blocks
from lora_embed.model.preprocess import Joint, Pixels, Preprocessing
from lora_embed.schema import ChunkHead, Layout, from_ipc
from lora_embed.stages import Stopwatch
from lora_embed.storage import Store


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One encoder, and the heads that are put on its body."""

    uri: str
    dimension: int
    preprocessing: Preprocessing
    base: str | None = None  # where its base lies, by the user's word, for one that is kept as an adapter
    heads: tuple[tuple[int, str], ...] = ()  # number of the model in the encoder, path of the head in the store


@dataclass(frozen=True, kw_only=True)
class Each:
    """All that a pass over the images shares; all encoders decode alike (`preprocess.decoding`)."""

    encoders: tuple[Asked, ...]
    store: Store  # where encoders and heads are kept
    input_options: dict[str, Any] = field(repr=False)
    layout: Layout

    @property
    def ways(self) -> tuple[Preprocessing, ...]:
        """The distinct ways in which an image is prepared."""
        return tuple(dict.fromkeys(encoder.preprocessing for encoder in self.encoders))

    @property
    def prepare(self) -> Prepare:
        """What is done with an image, once, for all encoders."""
        return self.ways[0] if len(self.ways) == 1 else Joint(parts=self.ways)

    def pixels(self, prepared: Pixels) -> dict[Preprocessing, Pixels]:
        """What `prepare` made → pixels (n, H, W, 3) for each way."""
        prepare = self.prepare
        return dict(zip(self.ways, prepare.split(prepared) if isinstance(prepare, Joint) else [prepared], strict=True))


@dataclass(frozen=True, kw_only=True)
class EachChunk:
    """One chunk: its samples, and for the good ones all vectors (good, Σd) and what each head says (good, heads)."""

    head: ChunkHead
    samples: pa.RecordBatch
    vectors: NDArray[np.float32]
    classes: NDArray[np.int32]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "EachChunk":
        head = ChunkHead.from_json(row["head"])
        vectors, classes = np.frombuffer(row["vectors"], np.float32), np.frombuffer(row["classes"], np.int32)
        return cls(
            head=head,
            samples=from_ipc(row["samples"]),
            vectors=vectors.reshape(head.good, len(vectors) // max(head.good, 1)),
            classes=classes.reshape(head.good, len(classes) // max(head.good, 1)),
        )


class EmbedWithEach:
    """The actor: loads all encoders, each proven on its golden images, then a chunk's pixels → the vectors of each."""

    @carries_errors
    def __init__(self, each: Each, kind: str) -> None:
        from lora_embed.model.encoder import load_encoder

        device = take_device(kind)
        self.each = each
        precision, batch_size = each.layout.precision, each.layout.batch_size
        how: dict[str, Any] = {"device": device, "precision": precision, "batch_size": batch_size}
        how["storage_options"] = each.store.options
        self._encoders = [load_encoder(one.uri, base=one.base, **how) for one in each.encoders]
        self._heads: list[list[Any]] = [[] for _ in self._encoders]
        for asked, encoder, heads in zip(each.encoders, self._encoders, self._heads, strict=True):
            if asked.heads:
                from lora_embed.model.head import HeadOnBody, SavedHead

                for number, path in asked.heads:
                    data = each.store.read(path)
                    assert data is not None, path
                    heads.append(HeadOnBody(SavedHead.from_bytes(data), encoder.models[number]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `decode_items` → rows of `EachChunk`; seconds of encoder i are those of the stage `forward i`."""
        assert len(batch["head"]) == 1, "chunks go one by one: batch_size=1"
        head = ChunkHead.from_json(batch["head"][0])
        pixels = self.each.pixels(np.asarray(batch["pixels"][0])[: head.good])
        clock = Stopwatch()
        vectors, classes = [np.empty((head.good, 0), np.float32)], [np.empty((head.good, 0), np.int32)]
        for number, (asked, encoder) in enumerate(zip(self.each.encoders, self._encoders, strict=True)):
            if head.good:
                with clock.timing(f"forward {number}"):
                    vectors.append(encoder.embed_pixels(pixels[asked.preprocessing]))
                    logits = [one.take(head.good) for one in self._heads[number]]
                    classes += [found.argmax(axis=1).astype(np.int32)[:, None] for found in logits]
        head = replace(head, seconds=head.seconds | clock.seconds | {"forward": sum(clock.seconds.values())})
        found = {"vectors": np.concatenate(vectors, axis=1), "classes": np.concatenate(classes, axis=1)}
        packed = {name: np.array([values.tobytes()], dtype=object) for name, values in found.items()}
        return {"head": np.array([head.to_json()], dtype=object), "samples": batch["samples"]} | packed


class EmbedShardsWithEach:
    """Reading and decoding too, for cores that do it all: pixels never leave the process."""

    def __init__(self, each: Each, kind: str, was_tried: Callable[[], bool]) -> None:
        self._embed = EmbedWithEach(each, kind)
        self._decoding = (each.layout, each.prepare, each.input_options, was_tried)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Blocks of work items → rows of `EachChunk`."""
        for row in decode_blocks(batch, *self._decoding):
            yield self._embed(row)
