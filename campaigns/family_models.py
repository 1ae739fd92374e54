"""Tiny models of any type with random weights, adapters that PEFT makes, and vectors taken by hand from PEFT's own forward."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from family_specs import Spec

HEADS = {"pooler", "head", "decoder", "text_model", "lm_head"}  # parts that no hidden state depends on
Vectors = NDArray[np.float64]


def model_of(config: Any) -> Any:
    """The class that adapters of this type are trained on: the one for classification, else AutoModel's."""
    mapping = (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else MODEL_MAPPING
    )
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def body_of(model: Any, spec: Spec) -> Any:
    """The part whose hidden states are pooled: of AutoModel's class for the images' configuration, else the whole."""
    if spec.body:
        return model.get_submodule(spec.body)
    config = getattr(model.config, "vision_config", model.config)
    found = MODEL_MAPPING.get(type(config), type(model))
    classes = found if isinstance(found, tuple) else (found,)
    return next((module for module in model.modules() if type(module) in classes), model)


@torch.no_grad()
def save_base(folder: Path, name: str, seed: int, settings: dict[str, Any]) -> Any:
    """A model with random weights, none left at the zeros and ones of its initialisation; returns its class.

    Raises ImportError if it needs a package that is not installed.
    """
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[name](**settings)
    config.num_labels = 5
    model_class = model_of(config)
    model = model_class(config)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.05)
    for place, buffer in model.named_buffers():
        if place.endswith("running_mean"):
            buffer.add_(torch.randn_like(buffer), alpha=0.1)
        if place.endswith("running_var"):
            buffer.mul_(1 + torch.rand_like(buffer))
    model.save_pretrained(folder)
    return model_class


def targets(model: Any, spec: Spec) -> list[str]:
    """Full names of all linear layers and convolutions of the images' part, those of heads and in groups left out."""
    body = body_of(model, spec)
    prefix = next(place for place, module in model.named_modules() if module is body)
    names = []
    for place, module in body.named_modules():
        is_layer = isinstance(module, torch.nn.Linear | Conv1D) or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)
        if is_layer and not HEADS & set(place.split(".")):
            names.append(f"{prefix}.{place}".removeprefix("."))
    return names


def save_adapters(folder: Path, base: Path, model_class: Any, spec: Spec, seed: int) -> list[Path]:
    adapters = []
    for number in range(2):
        torch.manual_seed(1000 * seed + number)
        model = model_class.from_pretrained(base)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=targets(model, spec), init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / f"adapter{number}")
        adapters.append(folder / f"adapter{number}")
    return adapters


def images(seed: int, size: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    sizes = ((size + 13, 2 * size), (2 * size, size + 13), (size, size))
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in sizes]


@torch.inference_mode()
def states_by_hand(
    model_class: Any, base: Path, spec: Spec, adapters: list[Path], weights: tuple[float, ...], pixels: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """`hidden_states[-1]` and `last_hidden_state` of the images' part, each adapter beside the weights, times its weight."""
    model = model_class.from_pretrained(base, **spec.by_hand)
    active = [number for number, weight in enumerate(weights) if weight]
    for number in active:
        if number == active[0]:
            model = PeftModel.from_pretrained(model, adapters[number], adapter_name=f"a{number}")
        else:
            model.load_adapter(adapters[number], adapter_name=f"a{number}")
    if active:
        model.base_model.set_adapter([f"a{number}" for number in active])
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        for number in active:
            layer.set_scale(f"a{number}", weights[number])
    inner = model.get_base_model() if active else model
    output = body_of(inner.eval(), spec)(pixel_values=pixels, output_hidden_states=True)
    hidden = getattr(output, "hidden_states", None)
    return {
        "state": hidden[-1] if spec.state and hidden else None,
        "last": getattr(output, "last_hidden_state", None) if spec.has_last else None,
    }


def pooled_by_hand(states: dict[str, torch.Tensor | None], spec: Spec, pooling: str) -> Vectors | None:
    """The vectors of a pooling, float64; None where the model has no such state or no class token."""
    is_last = pooling.startswith("last_")
    state, form = (states["last"], spec.last_form) if is_last else (states["state"], spec.state)
    kind = pooling.removeprefix("last_")
    if state is None or form is None or (kind == "cls" and not form.prefix):
        return None
    values = state.double().numpy()
    if form.axes == "map":
        return values.mean(axis=(2, 3))  # type: ignore[no-any-return]
    if form.axes == "map, channels last":
        return values.mean(axis=(1, 2))  # type: ignore[no-any-return]
    if kind == "cls":
        return values[:, 0]  # type: ignore[no-any-return]
    patches = values[:, form.prefix : values.shape[1] - form.suffix] if kind == "patch_mean" else values
    return patches.mean(axis=1)  # type: ignore[no-any-return]


def difference(vectors: NDArray[Any], expected: Vectors) -> float:
    """The largest relative L2 difference of a vector; infinite if their widths differ."""
    if vectors.shape != expected.shape:
        return float("inf")
    return float((np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def with_prefix(base: Path, folder: Path, prefix: str) -> Path:
    """The base with a prefix before every tensor's name, as torch.compile or a user's own model around it saves it."""
    if not prefix:
        return base
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            tensors = {prefix + name: tensor for name, tensor in load_file(file).items()}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def save_bare(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """What the folder of a type holds that cannot be made here: its configuration, and a weight of some name."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": name} | settings))
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors", metadata={"format": "pt"})
