"""Tiny random base models and adapters, made as users make them: saved by transformers and by PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SIZE = 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
V4_NAMES = {  # module names of transformers 5 → of transformers 4, for the two families
    "vit": [
        ("layers.", "encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.v_proj", "attention.attention.value"),
        ("mlp.fc1", "intermediate.dense"),
    ],
    "dinov2": [("attention.q_proj", "attention.attention.query"), ("attention.v_proj", "attention.attention.value")],
}


def save_base(folder: Path, family: str = "vit", seed: int = 0, **changes: Any) -> Path:
    """A headless model with random weights and its processor; returns the folder."""
    torch.manual_seed(seed)
    if family == "vit":
        model = ViTModel(ViTConfig(**SMALL | {"intermediate_size": 64} | changes), add_pooling_layer=False)
        processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    else:
        model = Dinov2Model(Dinov2Config(**SMALL | changes))
        processor = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": SIZE, "width": SIZE})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, labels: int = 10, seed: int = 1, **config: Any) -> Path:
    """A LoRA adapter of a classification model on that base, its factors random; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_pretrained(base, num_labels=labels)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "modules_to_save": ["classifier"],
        "init_lora_weights": False,
    }
    adapted = get_peft_model(model, LoraConfig(**settings | config))
    adapted.save_pretrained(folder)
    return folder


def edit_tensors(folder: Path, change: Any) -> Path:
    """Rewrite an adapter's tensors by `change(dict) -> dict`."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def with_v4_names(folder: Path, family: str) -> Path:
    """Rename an adapter's modules to what transformers 4 called them."""

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in V4_NAMES[family]:
                name = name.replace(new, old)
            renamed[name] = tensor
        assert set(renamed) != set(tensors)
        return renamed

    return edit_tensors(folder, rename)
