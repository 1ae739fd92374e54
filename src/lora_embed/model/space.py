"""The space id: a hash of all that makes a vector, the same whatever release of transformers the encoder is built with."""

import copy
import hashlib
import json
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from lora_embed.images.preprocess import Preprocessing

VERSION = 2  # of what is hashed; encoders without one were made when all fields of a configuration were: their ids stay
_TOKENS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size",
    "num_channels",
)  # fmt: skip
_VIT = (*_TOKENS, "intermediate_size", "qkv_bias")
_DINOV2 = (*_TOKENS, "mlp_ratio", "qkv_bias", "use_swiglu_ffn")
# What of each family's configuration shapes a vector, beside the weights.
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
# Names, what follows the library's release, and what counts in training alone.
_SHAPELESS = {
    "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "id2label", "label2id",
    "num_labels", "problem_type", "output_hidden_states", "output_attentions", "return_dict", "vision_use_head",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate", "initializer_range",
    "initializer_factor",
}  # fmt: skip


def space_id_of(models: list[PreTrainedModel], preprocessing: Preprocessing, pooling: str, normalize: bool) -> str:
    """12 hex digits of the SHA-256 over all that makes a vector.

    They are the float32 weights by name, what of the configuration shapes a vector (`shaping_fields`), what makes an image
    the model's input, with its arithmetic by name, and the pooling.
    """
    about = {
        "version": VERSION,
        "model_type": models[0].config.model_type,
        "config": shaping_fields(models[0].config),
        "arithmetic": preprocessing.arithmetic.name,
        "preprocessing": preprocessing.settings(),
        "pooling": pooling,
        "normalize": normalize,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode() + b"\n")
    for name, weight in [item for model in models for item in sorted(model.state_dict().items())]:
        assert weight.dtype in (torch.float32, torch.int64), (name, weight.dtype)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(_bytes_of(weight))
    return digest.hexdigest()[:12]


def shaping_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What of a model's configuration goes into its space id.

    Always the fields that are known to shape a vector in its family, `SHAPING`, with the values in effect: a default that a
    later release of transformers changes makes no other id, as long as the model stays the same. Of the other fields, those
    that must be said: without them, the same class would make another configuration. So a field that nobody has thought
    of, and each field of an unknown family, counts as soon as it is not at its default, and two encoders that differ in it
    have two ids; and a field that a later release adds, or computes from others, changes no id while it is left alone.
    `_SHAPELESS` ones never count.

    The alternatives are worse: a list alone misses what it does not know; all fields of the class, as version 1 hashed
    them, grow with each release; and golden vectors are not the same bits on every processor.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in _SHAPELESS}
    said, before = set(fields), None
    while said != before:  # again, since some classes refuse to be told what they compute: one field is in others' way
        before = said
        for name in sorted(said - set(SHAPING.get(config.model_type, ()))):
            if _makes(type(config), {other: fields[other] for other in said - {name}}, fields):
                said = said - {name}
    return {name: value for name, value in _plain(fields).items() if name in said}


def _makes(kind: Any, said: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Does the class make a configuration of these fields when it is told some of them?"""
    try:
        made = kind(**copy.deepcopy(said)).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError):
        return False
    return bool(_plain(made) == _plain(fields))


def _plain(value: Any) -> Any:
    """As JSON has it, without what has no shape; 4.0 is 4, since releases differ in how they read a number."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items() if name not in _SHAPELESS}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _bytes_of(weight: torch.Tensor) -> Any:
    return weight.detach().contiguous().cpu().numpy().data.cast("B") if weight.numel() else b""
