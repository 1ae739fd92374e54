"""The space id: a hash of everything that shapes a vector. It does not depend on the release of transformers."""

import copy
import hashlib
import json
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from lora_embed.images.preprocess import Preprocessing
from lora_embed.model.description import StateForm
from lora_embed.model.pooling import LAST

VERSION = 2  # of the hash; encoders without a version hashed all fields of a configuration, and keep their ids
_TOKENS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size",
    "num_channels",
)  # fmt: skip
_VIT = (*_TOKENS, "intermediate_size", "qkv_bias")
_DINOV2 = (*_TOKENS, "mlp_ratio", "qkv_bias", "use_swiglu_ffn")
# For each family: the fields of its configuration that shape a vector, in addition to the weights.
SHAPING: dict[str, tuple[str, ...]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": (*_DINOV2, "num_register_tokens"),
    "clip_vision_model": (*_TOKENS, "intermediate_size"),
    "siglip_vision_model": (*_TOKENS, "intermediate_size"),
    "swin": (
        "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "hidden_act", "layer_norm_eps",
        "use_absolute_embeddings", "image_size", "patch_size", "num_channels",
    ),
    "beit": (
        *_TOKENS, "intermediate_size", "use_absolute_position_embeddings", "use_relative_position_bias",
        "use_shared_relative_position_bias", "layer_scale_init_value", "use_mean_pooling",
    ),
    "convnext": (
        "num_stages", "hidden_sizes", "depths", "hidden_act", "layer_norm_eps", "layer_scale_init_value", "patch_size",
        "num_channels",
    ),
}  # fmt: skip
# Fields that never shape a vector: names, fields that change with the library's release, and fields for training.
_SHAPELESS = {
    "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "id2label", "label2id",
    "num_labels", "problem_type", "output_hidden_states", "output_attentions", "return_dict", "vision_use_head",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate", "initializer_range",
    "initializer_factor",
}  # fmt: skip


def space_id_of(
    models: list[PreTrainedModel], preprocessing: Preprocessing, pooling: str, normalize: bool, form: StateForm
) -> str:
    """12 hex digits of the SHA-256 over everything that shapes a vector.

    That is: the float32 weights by name, the fields of the configuration that shape a vector (`shaping_fields`), the
    preprocessing with the name of its arithmetic, the pooling, and what of the hidden state's form it depends on.
    """
    identity = {
        "version": VERSION,
        "model_type": models[0].config.model_type,
        "config": shaping_fields(models[0].config),
        "arithmetic": preprocessing.arithmetic.name,
        "preprocessing": preprocessing.settings(),
        "pooling": pooling,
        "normalize": normalize,
    } | _hashed_form(form, pooling, models[0].config)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode() + b"\n")
    for name, weight in [item for model in models for item in sorted(model.state_dict().items())]:
        assert weight.dtype in (torch.float32, torch.int64), (name, weight.dtype)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(_bytes_of(weight))
    return digest.hexdigest()[:12]


def _hashed_form(form: StateForm, pooling: str, config: PretrainedConfig) -> dict[str, Any]:
    """What of the form shapes a vector and is not known from the pooling's name, for the space id.

    Empty for the forms that were read right before suffixes and channels were looked for: such encoders keep their ids.
    """
    hashed: dict[str, Any] = {"channels_last": True} if form.channels_last else {}
    if pooling.removeprefix(LAST) == "patch_mean":
        hashed |= {"suffix_tokens": form.suffix_tokens} if form.suffix_tokens else {}
        if form.prefix_tokens and getattr(config, "patch_size", None) is None:  # taken for 0 before, as in PVT
            hashed["prefix_tokens"] = form.prefix_tokens
    return hashed


def shaping_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a model's configuration that are hashed into its space id.

    First, the fields of `SHAPING`, which are known to shape a vector in the model's family. They are hashed with the values
    in effect, so a default that a later release of transformers changes does not change the id of the same model. Second,
    every other field without which the same class would make another configuration. So an unknown field, and each field of
    an unknown family, counts when it is not at its default, and two encoders that differ in it have two ids. A field that a
    later release adds, or computes from others, changes no id while it stays at its default. Fields of `_SHAPELESS` never
    count.

    The alternatives are worse. A list alone misses unknown fields. All fields of the class, which version 1 hashed, grow
    with each release. Golden vectors do not have the same bits on every processor.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in _SHAPELESS}
    needed, needed_before = set(fields), None
    while needed != needed_before:  # repeated, since some classes refuse a field that they compute while another one is given
        needed_before = needed
        for name in sorted(needed - set(SHAPING.get(config.model_type, ()))):
            if _makes(type(config), {field: fields[field] for field in needed - {name}}, fields):
                needed = needed - {name}
    return {name: value for name, value in _plain(fields).items() if name in needed}


def _makes(config_class: Any, some_fields: dict[str, Any], fields: dict[str, Any]) -> bool:
    """True if the class makes a configuration with all `fields` when it is given only `some_fields`."""
    try:
        all_fields = config_class(**copy.deepcopy(some_fields)).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError):
        return False
    return bool(_plain(all_fields) == _plain(fields))


def _plain(value: Any) -> Any:
    """A value as JSON holds it, without `_SHAPELESS` fields. 4.0 becomes 4, since releases read numbers differently."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items() if name not in _SHAPELESS}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _bytes_of(weight: torch.Tensor) -> Any:
    return weight.detach().contiguous().cpu().numpy().data.cast("B") if weight.numel() else b""
