"""One decode for several encoders: pixels and vectors are those that each makes alone, and images are opened once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_embed.chain.actors import EmbedImages, EmbedShards, VectorChunk
from lora_embed.chain.chunks import decode_blocks
from lora_embed.chain.items import Block, EncoderSource, Pass, WorkItem
from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.images.decode import decode_image
from lora_embed.images.preprocess import Joint, decoding
from lora_embed.model.build import build_encoder
from lora_embed.model.description import read_description
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.schema import Shard
from lora_embed.store.store import Store
from models import save_adapter, save_base
from samples import PREPROCESSING, encoded, layout, noise, png, tar_shard


def test_a_joint_preparation_is_each_ones_pixels() -> None:
    other = replace(PREPROCESSING, resize=(30, 20), crop=None)
    joint = Joint(parts=(PREPROCESSING, other))
    images = [encoded(noise(width, 50, seed=width)) for width in (40, 60, 90)]
    pixels = np.stack([decode_image(data, joint).pixels for data in images])
    assert pixels.shape == (3, *joint.shape) == (3, 8 * 8 * 3 + 30 * 20 * 3)
    for part, found in zip(joint.parts, joint.split(pixels), strict=True):
        np.testing.assert_array_equal(found, np.stack([decode_image(data, part).pixels for data in images]))


def test_what_is_decoded_fast_is_shared_for_one_resize_alone() -> None:
    fast = replace(PREPROCESSING, decode="fast")
    assert decoding(PREPROCESSING) == decoding(replace(PREPROCESSING, resize=99))
    assert decoding(fast) == decoding(replace(fast, crop=(4, 4)))
    assert len({decoding(PREPROCESSING), decoding(fast), decoding(replace(fast, resize=99))}) == 3


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three, of two spaces' preprocessing and two dimensions."""
    folder = tmp_path_factory.mktemp("encoders")
    base = save_base(folder / "base")
    adapter = AdapterSpec(path=str(save_adapter(folder / "ten", base)))
    wide = save_base(folder / "wide", "dinov2", seed=3, hidden_size=48)
    recipes = [
        Recipe(base_model=str(base), merge_method="none"),
        Recipe(base_model=str(wide), merge_method="none", image_size=24),
        Recipe(base_model=str(base), adapters=(adapter,)),
    ]
    for number, recipe in enumerate(recipes):
        build_encoder(gather(recipe), folder / f"{number}", lambda line: None)
    return [folder / f"{number}" for number in range(3)]


def each_of(folders: list[Path]) -> Pass:
    return Pass(
        encoders=tuple(EncoderSource(uri=str(folder), description=read_description(folder)) for folder in folders),
        store=Store(str(folders[0].parent)),
        input_options={},
        layout=layout(carry=(("label", "string"),)),
    )


def shard_of(folder: Path) -> Shard:
    members = [(f"{number}.png", png(number)) for number in range(6)]
    members[3:3] = [("bad.png", b"no image"), ("0.json", b"{}")]
    return tar_shard(folder, members)


def block_of(shard: Shard) -> dict[str, np.ndarray]:
    return {"block": np.array([Block(items=(WorkItem(shard=shard),))], dtype=object)}


def unpack(rows: list[dict[str, np.ndarray]]) -> list[VectorChunk]:
    return [VectorChunk.from_row({name: values[0] for name, values in row.items()}) for row in rows]


def test_vectors_are_each_encoders_own(encoders: list[Path], tmp_path: Path) -> None:
    each = each_of(encoders)
    assert len(each.preparations) == 2
    chunks = unpack(list(EmbedShards(each, "cpu", lambda: False)(block_of(shard_of(tmp_path)))))
    assert [chunk.head.good for chunk in chunks] == [3, 3]
    assert [chunk.head.decoded for chunk in chunks] == [4, 3]
    found = np.concatenate([chunk.vectors for chunk in chunks])
    for folder, part in zip(encoders, np.split(found, [32, 80], axis=1), strict=True):
        encoder = load_encoder(folder)
        pixels = [decode_image(png(number), encoder.description.preprocessing).pixels for number in range(6)]
        np.testing.assert_array_equal(part, encoder.embed_pixels(np.stack(pixels)))


def test_decoders_apart_from_the_encoders_hand_on_the_same(encoders: list[Path], tmp_path: Path) -> None:
    """As on GPUs, where pixels travel."""
    each, block = each_of(encoders), block_of(shard_of(tmp_path))
    actor = EmbedImages(each, "cpu")
    apart = unpack([actor(row) for row in decode_blocks(block, each.layout, each.prepare, {}, lambda: False)])
    together = unpack(list(EmbedShards(each, "cpu", lambda: False)(block)))
    for one, other in zip(apart, together, strict=True):
        assert (one.head, one.samples) == (other.head, other.samples)
        np.testing.assert_array_equal(one.vectors, other.vectors)


@pytest.mark.parametrize("count", [1, 3])
def test_images_are_opened_once_for_any_number_of_encoders(
    encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    actor = EmbedShards(each_of(encoders[:count]), "cpu", lambda: False)
    opened = []
    really = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or really(*args, **options))
    chunks = unpack(list(actor(block_of(shard_of(tmp_path)))))
    assert len(opened) == sum(chunk.head.decoded for chunk in chunks) == 7
