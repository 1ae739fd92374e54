"""An adapter's own head on an encoder's body, against PEFT's own model of base, adapter and head."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification

from lora_embed.config.models import AdapterSpec, Recipe
from lora_embed.demo.parts import LabelledImage
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import Base, find_base
from lora_embed.model.build import match_adapters
from lora_embed.model.fold import Merge, fold
from lora_embed.model.head import HeadOnBody, SavedHead, class_names, find_head
from lora_embed.model.ingredients import gather
from lora_embed.model.match import Adapter
from models import SIZE, save_adapter, save_base


def matched(base: Path, adapter: Path) -> tuple[Base, Adapter]:
    ingredients = gather(Recipe(base_model=str(base), adapters=(AdapterSpec(path=str(adapter)),)))
    return ingredients.base, match_adapters(ingredients)[0]


def logits_of(base: Base, adapter: Adapter, pixel_values: torch.Tensor, weight: float = 1.0) -> np.ndarray:
    """The saved head on the body of base and adapter, two images at a time."""
    head = find_head(base, adapter)
    assert isinstance(head, SavedHead), head
    body = load_headless(base.folder, base.uri)
    for _ in fold(body, Merge(adapters=(adapter,), weights=(weight,), options={})):
        pass
    on_body = HeadOnBody(SavedHead.from_bytes(head.to_bytes()), body)
    with torch.inference_mode():
        for batch in pixel_values.split(2):
            body(pixel_values=batch)
    return on_body.take(len(pixel_values))


@torch.inference_mode()
def logits_of_peft(base: Path, adapter: Path, classes: int, pixel_values: torch.Tensor) -> np.ndarray:
    whole = AutoModelForImageClassification.from_pretrained(base, num_labels=classes)
    return PeftModel.from_pretrained(whole, adapter).eval()(pixel_values=pixel_values).logits.numpy()


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers", "deit", "convnext"])
def test_logits_are_pefts(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", family)
    targets = {"convnext": ["pwconv1", "pwconv2"]}.get(family, ["q_proj", "v_proj", "fc1"])
    adapter = save_adapter(tmp_path / "adapter", base, 7, target_modules=targets)
    pixel_values = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = logits_of(*matched(base, adapter), pixel_values)
    np.testing.assert_allclose(found, logits_of_peft(base, adapter, 7, pixel_values), atol=1e-4)
    assert np.abs(found - logits_of(*matched(base, adapter), pixel_values, weight=0.5)).max() > 1e-3


@pytest.mark.parametrize(("name", "classes"), [("category10", 10), ("group27", 27)])
def test_logits_of_the_real_adapters_are_pefts(
    base_model: Path, real_adapters: dict[str, Path], real_images: list[LabelledImage], name: str, classes: int
) -> None:
    pixels = np.stack([np.asarray(Image.open(image.path).convert("RGB"))[4:60, 4:60] for image in real_images[::400]])
    pixel_values = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = logits_of(*matched(base_model, real_adapters[name]), pixel_values)
    expected = logits_of_peft(base_model, real_adapters[name], classes, pixel_values)
    print(f"\n{name}: {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.1f}")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_padding_is_left_out_and_taken_logits_are_gone(tmp_path: Path) -> None:
    base = find_base(str(save_base(tmp_path / "base", "dinov2")), None)
    _, adapter = matched(tmp_path / "base", save_adapter(tmp_path / "adapter", tmp_path / "base", 4))
    body = load_headless(base.folder, base.uri)
    head = find_head(base, adapter)
    assert isinstance(head, SavedHead)
    on_body = HeadOnBody(head, body)
    with torch.inference_mode():
        for _ in range(2):
            body(pixel_values=torch.zeros(4, 3, SIZE, SIZE))
            assert on_body.take(3).shape == (3, 4)


def test_why_there_is_no_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    bare = matched(base, save_adapter(tmp_path / "bare", base, modules_to_save=None))
    assert find_head(*bare) == "the adapter was saved without a head (modules_to_save)"
    swin = save_base(tmp_path / "swin", "swin")
    pooled = matched(swin, save_adapter(tmp_path / "pooled", swin, target_modules=["q_proj", "fc1"]))
    assert (
        find_head(*pooled) == "the head of SwinForImageClassification reads a pooled output, which an encoder does not compute"
    )


def test_names_of_outputs_are_read_where_they_say_something(tmp_path: Path) -> None:
    assert class_names(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}')
    assert class_names(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"id2label": {"1": "dog", "0": "cat"}}')
    assert class_names(tmp_path) == {0: "cat", 1: "dog"}
