"""Which device an actor computes on, and the batches it makes of a chunk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import tiny_recipe
from lora_embed.chain.actors import EmbedImages
from lora_embed.chain.items import EncoderSource, Pass
from lora_embed.config.models import load_recipe
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.schema import Layout
from lora_embed.store.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder's."""
    made = tmp_path_factory.mktemp("tiny")
    build_encoder(gather(load_recipe(str(tiny_recipe(made)))), made / "encoder", lambda _: None)
    return made / "encoder"


def test_a_gpu_that_an_actor_does_not_hold_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees the GPUs of a node in every process, also in actors that Ray gave none; here it only says so."""
    source = EncoderSource(uri=str(folder), description=load_encoder(folder).description)
    layout = Layout(precision="float32", batch_size=4)
    shared = Pass(encoders=(source,), layout=layout, input_options={}, store=Store(str(folder.parent)))

    def device_of(kind: str) -> str:
        (encoder,) = EmbedImages(shared, kind)._encoders
        return encoder.device.type

    assert device_of("cuda") == "cpu"  # declared, and not there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("cpu") == "cpu"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        device_of("cuda")


def test_a_last_batch_is_padded_and_cut(folder: Path) -> None:
    encoder = load_encoder(folder, batch_size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (6, *encoder.description.preprocessing.size, 3), dtype=np.uint8)
    batches = list(encoder._batches(pixels))
    assert [tuple(batch.shape) for batch in batches] == [(4, *pixels.shape[1:])] * 2
    assert np.array_equal(np.concatenate(batches)[:6], pixels)
    assert not batches[1][2:].any()
    assert encoder.embed_pixels(pixels).tobytes() == encoder.embed_pixels(np.concatenate([pixels, pixels]))[:6].tobytes()
    assert encoder.embed_pixels(pixels[:0]).shape == (0, encoder.dimension)
