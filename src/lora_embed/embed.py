"""Embed chunks on one device: the heavy part once per actor, then batch to batch."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_embed.errors import carries_errors
from lora_embed.isolate import decode_blocks, keep_freed_memory
from lora_embed.model.preprocess import Preprocessing
from lora_embed.schema import ChunkHead, Layout
from lora_embed.stages import Stopwatch
from lora_embed.write import WriteParts

CPU_BATCH, GPU_BATCH = 16, 256  # at 256 an H100 is within 10 % of its best rate with ViT-S and ViT-B


@dataclass(frozen=True, kw_only=True)
class Device:
    """What `auto` is resolved from: the device that an actor will run on."""

    kind: str  # "cuda" or "cpu"
    has_native_bfloat16: bool

    @property
    def precision(self) -> str:
        return "bfloat16" if self.has_native_bfloat16 else "float32"

    @property
    def batch_size(self) -> int:
        return GPU_BATCH if self.kind == "cuda" else CPU_BATCH


def inspect_device(kind: str) -> Device:
    """The device of the process that calls it: to be called where actors run, not on the driver.

    Of a CPU its flags tell all; to import torch for that would take longer than the rest of a small run's start.
    """
    if kind == "cpu":
        return Device(kind=kind, has_native_bfloat16=bool({"avx512_bf16", "amx_bf16"} & _cpu_flags()))
    import torch

    if not torch.cuda.is_available():  # a GPU that is declared and not there
        return inspect_device("cpu")
    return Device(kind=kind, has_native_bfloat16=torch.cuda.get_device_capability() >= (8, 0))


def _cpu_flags() -> set[str]:
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((set(line.split(":", 1)[1].split()) for line in file if line.startswith("flags")), set())


def take_device(kind: str) -> str:
    """Make an actor's process ready for its device; the name of the one that is really there."""
    import torch  # here, not above: drivers and those who ask for a device can do without

    device = kind if kind == "cpu" or torch.cuda.is_available() else "cpu"  # a declared GPU need not be there
    if device == "cpu":
        keep_freed_memory()
        torch.set_num_threads(1)  # one actor per core; two threads on contended cores fall to a quarter
    return device


class EmbedImages:
    """The actor: loads an encoder, proves it on the golden images, then turns a chunk's pixels into vectors."""

    @carries_errors
    def __init__(
        self, encoder_uri: str, storage_options: dict[str, Any], layout: Layout, kind: str, base: str | None = None
    ) -> None:
        from lora_embed.model.encoder import load_encoder

        device = take_device(kind)
        self.layout = layout
        self._encoder = load_encoder(
            encoder_uri,
            device=device,
            precision=layout.precision,
            batch_size=layout.batch_size,
            storage_options=storage_options,
            base=base,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        return self._encoder.description.preprocessing

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `decode_items` → the same with `vectors`, float32 (1, n, d), in place of the pixels."""
        assert len(batch["head"]) == 1, "chunks go one by one: batch_size=1"
        head = ChunkHead.from_json(batch["head"][0])
        pixels = np.asarray(batch["pixels"][0])[: head.good]
        clock = Stopwatch()
        with clock.timing("forward"):
            vectors = self._encoder.embed_pixels(pixels) if head.good else np.zeros((1, self._encoder.dimension), np.float32)
        head = replace(head, seconds=head.seconds | clock.seconds)
        return {"head": np.array([head.to_json()], dtype=object), "samples": batch["samples"], "vectors": vectors[np.newaxis]}


class EmbedShards:
    """The whole chain in one actor, for cores that decode and embed: pixels never leave the process."""

    def __init__(
        self,
        embedding: tuple[Any, ...],
        input_options: dict[str, Any],
        writing: tuple[Any, ...],
        was_tried: Callable[[], bool],
    ) -> None:
        self._embed = EmbedImages(*embedding)
        self._write = WriteParts(*writing)
        self._decoding = (self._embed.layout, self._embed.preprocessing, input_options, was_tried)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Blocks of work items → rows `stats`, one per chunk."""
        for row in decode_blocks(batch, *self._decoding):
            yield self._write(self._embed(row))
