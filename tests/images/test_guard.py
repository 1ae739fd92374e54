"""Speed: what the hot stages may cost beside the library calls that they are made of.

Ratios, never seconds. Both sides run in turns in this thread, by its CPU time, and of each piece of work the shortest time
counts: other work on the machine slows both. A limit that is missed after LEAST turns has until MOST; code that became
slower is slower in each. Beside each limit: what 30 runs found on two cores with a load of 5 to 15.
"""

import hashlib
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.images.decode import decode_image
from lora_embed.images.preprocess import Preprocessing
from lora_embed.model.encoder import Encoder
from lora_embed.table.parts import make_part, to_parquet
from samples import described, encoded, layout, noise, tar_shard

Pieces = Callable[[], Iterator[Any]]  # does some work and yields after each piece of it
LEAST, MOST = 8, 40
SQUARE = Preprocessing(resize=(224, 224), resample=2, crop=None, multiply=(0.01,) * 3, add=(-1.0,) * 3)


def times_of(pieces: Pieces) -> Iterator[float]:
    """Seconds of CPU time of each piece."""
    started = time.thread_time()
    for _ in pieces():
        yield time.thread_time() - started
        started = time.thread_time()


def ratio(ours: Pieces, bare: Pieces, limit: float) -> float:
    """Σ of our pieces' shortest times / Σ of the bare ones', after as many turns as it takes to come below the limit."""
    sides = (ours, bare)
    best = [np.array(list(times_of(side))) for side in sides]
    for turn in range(2, MOST + 1):
        for shortest, side in zip(best, sides, strict=True):
            np.minimum(shortest, list(times_of(side)), out=shortest)
        if turn >= LEAST and best[0].sum() <= limit * best[1].sum():
            break
    found = float(best[0].sum() / best[1].sum())
    print(f"{found:.3f}, at most {limit}, after {turn} turns")
    return found


def jpegs(count: int) -> list[bytes]:
    """Of 500×375 pixels and 30 kB."""
    return [encoded(noise(125, 94, seed).resize((500, 375), Image.Resampling.BICUBIC), "JPEG") for seed in range(count)]


def ppms(count: int) -> list[bytes]:
    """Of 1000×750 pixels, in which there is nothing to decode, so that a copy of them shows."""
    return [encoded(noise(1000, 750, seed), "PPM") for seed in range(count)]


@pytest.mark.parametrize(
    ("make", "resample", "limit"),
    [(jpegs, Image.Resampling.BILINEAR, 1.1), (ppms, Image.Resampling.NEAREST, 1.2)],
)
def test_an_image_costs_what_pillow_takes_for_it(
    make: Callable[[int], list[bytes]], resample: Image.Resampling, limit: float
) -> None:
    images, how = make(8), replace(SQUARE, resample=int(resample))

    def ours() -> Iterator[Any]:
        for data in images:
            yield decode_image(data, how).pixels

    def bare() -> Iterator[Any]:
        for data in images:
            yield np.asarray(Image.open(io.BytesIO(data)).resize((224, 224), resample))

    np.testing.assert_array_equal(list(ours()), list(bare()))
    assert ratio(ours, bare, limit) <= limit


def test_a_shard_costs_little_more_than_its_images(tmp_path: Path) -> None:
    images = jpegs(12)
    shard = tar_shard(tmp_path, [(f"{number:06d}.jpg", data) for number, data in enumerate(images)])

    def ours() -> Iterator[Any]:
        yield from decode_shard(WorkItem(shard=shard), layout(chunk_size=4), SQUARE, {})

    def bare() -> Iterator[Any]:
        for data in images:
            yield decode_image(data, SQUARE).pixels

    assert ratio(ours, bare, 1.35) <= 1.35


def test_all_but_the_images_of_a_shard_costs_what_reading_and_hashing_take(tmp_path: Path) -> None:
    shard = tar_shard(tmp_path, [(f"{number:06d}.jpg", bytes(60_000)) for number in range(64)])
    decoded = decode_image(jpegs(1)[0], SQUARE)

    def ours() -> Iterator[Any]:
        yield from decode_shard(WorkItem(shard=shard), layout(chunk_size=16), SQUARE, {}, decode=lambda *_: decoded)

    def bare() -> Iterator[Any]:
        with tarfile.open(tmp_path / "a.tar", "r:") as tar:
            for _ in range(4):
                chunk = np.empty((16, *decoded.pixels.shape), np.uint8)
                for row in range(16):
                    member = tar.next()
                    assert member is not None
                    file = tar.extractfile(member)
                    assert file is not None
                    hashlib.sha256(file.read()).digest()
                    chunk[row] = decoded.pixels
                yield chunk

    assert ratio(ours, bare, 1.75) <= 1.75


def test_embedding_costs_what_the_model_takes() -> None:
    config = ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    model = ViTModel(config, add_pooling_layer=False).eval()
    description = described(dimension=128, pooling="last_mean", prefix_tokens=1, preprocessing=SQUARE)
    encoder = Encoder([model], description, device="cpu", precision="float32", batch_size=4)
    batches = np.random.default_rng(0).integers(0, 256, (2, 4, 224, 224, 3), dtype=np.uint8)

    def ours() -> Iterator[Any]:
        for pixels in batches:
            yield encoder.embed_pixels(pixels)

    @torch.inference_mode()
    def bare() -> Iterator[Any]:
        for pixels in batches:
            values = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * 0.01 - 1.0).contiguous()
            yield model(values).last_hidden_state.mean(dim=1).numpy()

    np.testing.assert_allclose(list(ours()), list(bare()), atol=1e-5)
    assert ratio(ours, bare, 1.2) <= 1.2


def test_a_part_costs_what_parquet_takes_to_encode_it(tmp_path: Path) -> None:
    shard = tar_shard(tmp_path, [(f"{number:06d}.png", encoded(noise())) for number in range(512)])
    how = layout(chunk_size=512)
    (chunk,) = decode_shard(WorkItem(shard=shard), how, replace(SQUARE, resize=(8, 8)), {})
    vectors = np.random.default_rng(0).normal(size=(512, 384)).astype(np.float32)
    table = make_part(chunk.head, chunk.samples, vectors, how)
    split = {"embedding.list.element": "BYTE_STREAM_SPLIT"}

    def ours() -> Iterator[Any]:
        yield to_parquet(make_part(chunk.head, chunk.samples, vectors, how))

    def bare() -> Iterator[Any]:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", use_dictionary=["shard", "reason"], column_encoding=split)
        yield buffer.getvalue()

    assert list(ours()) == list(bare())
    assert ratio(ours, bare, 1.6) <= 1.6
