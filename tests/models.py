"""Tiny random base models and adapters of each family, made as users make them: saved by transformers and by PEFT."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

SIZE = 32
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
_WIDE = SMALL | {"intermediate_size": 64}
_STAGES = {"image_size": SIZE, "depths": [1, 2]}
_SQUARE = {"size": {"height": SIZE, "width": SIZE}}
_CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": SIZE, "width": SIZE}}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 8, **{key: SMALL[key] for key in ("hidden_size", "num_hidden_layers")}}
_TEXT |= {"num_attention_heads": 2, "intermediate_size": 64}
# Module names of transformers 5 → of transformers 4, as regular expressions.
_VIT_V4 = (
    (r"(^|\.)layers\.", r"\1encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"),
    (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
_DINO_V4 = _VIT_V4[1:5]
_BIAS = "relative_position_bias"
_BEIT_V4 = (*_VIT_V4, (rf"(layer\.\d+)\.{_BIAS}", rf"\1.attention.attention.{_BIAS}"))
_SWIN_V4 = tuple((new, old.replace("attention.attention", "attention.self")) for new, old in _VIT_V4[1:])
_SWIN_V4 += ((rf"attention\.{_BIAS}\.{_BIAS}_table", f"attention.self.{_BIAS}_table"),)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family is made and trained, and what `mean` pools in it: what a reader of its class in transformers says."""

    name: str  # of its classes: {name}Model, {name}ForImageClassification
    config: dict[str, Any]
    processor: str
    processor_settings: dict[str, Any]
    targets: tuple[str, ...]  # modules of a LoRA, linear ones and one convolution
    v4: tuple[tuple[str, str], ...] = ()
    dual: bool = False  # the vision part of {name}Model
    pools: str = "tokens"  # or "map"
    state: str = "before the final norm"
    prefix_tokens: int = 0

    def model_config(self, **changes: Any) -> PretrainedConfig:
        """The configuration of the classification model; `changes` are to the vision part's."""
        config_class = getattr(transformers, f"{self.name}Config")
        if not self.dual:
            return config_class(**self.config | changes)
        return config_class(vision_config=self.config | changes, text_config=_TEXT, projection_dim=16)

    @property
    def classifier(self) -> Any:
        """The class that adapters are trained on."""
        return getattr(transformers, f"{self.name}ForImageClassification")

    @property
    def headless(self) -> Any:
        """The class of the model that is left of it."""
        return getattr(transformers, f"{self.name}{'Vision' if self.dual else ''}Model")


FAMILIES = {
    "vit": Family(
        name="ViT", config=_WIDE, processor="ViTImageProcessor", processor_settings=_SQUARE, v4=_VIT_V4,
        targets=("q_proj", "v_proj", "fc1", "projection"), prefix_tokens=1,
    ),
    "deit": Family(
        name="DeiT", config=_WIDE, processor="DeiTImageProcessor", processor_settings=_CROPPED, v4=_VIT_V4,
        targets=("q_proj", "o_proj", "fc2", "projection"), prefix_tokens=2,
    ),
    "dinov2": Family(
        name="Dinov2", config=SMALL, processor="BitImageProcessor", processor_settings=_CROPPED, v4=_DINO_V4,
        targets=("q_proj", "v_proj", "fc1", "projection"), prefix_tokens=1,
    ),
    "dinov2_with_registers": Family(
        name="Dinov2WithRegisters", config=SMALL | {"num_register_tokens": 4}, processor="BitImageProcessor",
        processor_settings=_CROPPED, v4=_DINO_V4, targets=("q_proj", "o_proj", "fc2", "projection"), prefix_tokens=5,
    ),
    "clip": Family(
        name="CLIP", config=_WIDE, processor="CLIPImageProcessor", processor_settings=_CROPPED, dual=True,
        targets=("q_proj", "v_proj", "fc1", "patch_embedding"), state="final output", prefix_tokens=1,
    ),
    "siglip": Family(
        name="Siglip", config=_WIDE, processor="SiglipImageProcessor", processor_settings=_SQUARE, dual=True,
        targets=("q_proj", "out_proj", "fc2", "patch_embedding"),
    ),
    "swin": Family(
        name="Swin", config=_STAGES | {"patch_size": 4, "embed_dim": 16, "num_heads": [2, 2], "window_size": 4},
        processor="ViTImageProcessor", processor_settings=_SQUARE, v4=_SWIN_V4,
        targets=("q_proj", "v_proj", "fc1", "reduction", "projection"),
    ),
    "beit": Family(
        name="Beit", config=_WIDE | {"use_relative_position_bias": True}, processor="BeitImageProcessor",
        processor_settings=_CROPPED | {"do_center_crop": True, "size": {"height": 40, "width": 40}}, v4=_BEIT_V4,
        targets=("q_proj", "v_proj", "fc1", "projection"), state="final output", prefix_tokens=1,
    ),
    "convnext": Family(
        name="ConvNext", config=_STAGES | {"hidden_sizes": [16, 32], "num_stages": 2, "layer_scale_init_value": 0.5},
        processor="ConvNextImageProcessor", processor_settings={"size": {"shortest_edge": SIZE}, "crop_pct": 0.875},
        targets=("pwconv1", "pwconv2", "downsampling_layer.1"), pools="map", state="final output",
    ),
}  # fmt: skip


def save_base(folder: Path, family: str = "vit", seed: int = 0, **changes: Any) -> Path:
    """A headless model with random weights and its processor; returns the folder."""
    made = FAMILIES[family]
    _save(_body_of(_trainable(made, seed, changes), made), folder, made)
    return folder


def save_bases(folder: Path, family: str, seed: int = 0, **changes: Any) -> dict[str, Path]:
    """The same random weights in each form that bases of the family come in; returns form → folder."""
    made = FAMILIES[family]
    trainable = _trainable(made, seed, changes)
    models = {"headless": _body_of(trainable, made), "classification": trainable}
    if made.dual:
        models["dual"] = getattr(transformers, f"{made.name}Model")(trainable.config)
        models["dual"].vision_model.load_state_dict(models["headless"].state_dict())
    for form, model in models.items():
        _save(model, folder / form, made)
    return {form: folder / form for form in models}


def _trainable(made: Family, seed: int, changes: dict[str, Any]) -> PreTrainedModel:
    """The classification model; no weight is left at the zeros and ones of its initialisation, which hide mistakes."""
    torch.manual_seed(seed)
    model: PreTrainedModel = made.classifier(made.model_config(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model


def _body_of(trainable: PreTrainedModel, made: Family) -> PreTrainedModel:
    return next(child for child in trainable.children() if isinstance(child, made.headless))


def _save(model: PreTrainedModel, folder: Path, made: Family) -> None:
    model.save_pretrained(folder)
    getattr(transformers, made.processor)(**made.processor_settings).save_pretrained(folder)


def save_adapter(folder: Path, base: Path, labels: int = 10, seed: int = 1, **config: Any) -> Path:
    """A LoRA adapter of a classification model on that base, its head and factors random; returns the folder."""
    torch.manual_seed(seed)
    return save_adapter_of(AutoModelForImageClassification.from_pretrained(base, num_labels=labels), folder, seed, **config)


def save_adapter_of(model: PreTrainedModel, folder: Path, seed: int = 1, **config: Any) -> Path:
    """A LoRA adapter of that very model, its factors random; returns the folder."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "modules_to_save": ["classifier"],
        "init_lora_weights": False,
    }
    get_peft_model(model, LoraConfig(**settings | config)).save_pretrained(folder)
    return folder


def edit_tensors(folder: Path, change: Any) -> Path:
    """Rewrite an adapter's tensors by `change(dict) -> dict`."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def v4_name(name: str, family: str) -> str:
    """What transformers 4 called a weight of the headless model, or of a model around it."""
    for new, old in FAMILIES[family].v4:
        name = re.sub(new, old, name)
    return name


def with_v4_names(folder: Path, family: str) -> Path:
    """Rename an adapter's modules to what transformers 4 called them."""

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {v4_name(name, family): tensor for name, tensor in tensors.items()}
        assert set(renamed) != set(tensors)
        return renamed

    return edit_tensors(folder, rename)
