"""The private parts of transformers that are used, checked when imported.

They find the dual encoder of a vision model, and the image processor of a model type whose processor file names none.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from lora_embed.libraries import check, part

_PURPOSE = "find the dual encoder (CLIP, SigLIP) that a vision model is part of"
_family_of = part("transformers", "transformers.models.auto.configuration_auto:model_type_to_module_name", _PURPOSE)
_IS_FAMILY = _family_of("clip_vision_model") == "clip" and "clip" in CONFIG_MAPPING
check("transformers", _IS_FAMILY, "model_type_to_module_name of clip_vision_model is not clip", _PURPOSE)

_PROCESSORS: Any = part(
    "transformers",
    "transformers.models.auto.image_processing_auto:IMAGE_PROCESSOR_MAPPING_NAMES",
    "find the image processor of a model type",
)


def processor_name_of(model_type: str) -> str | None:
    """The image processor that transformers takes for a model type, by the name of its class; None if it has none."""
    names = _PROCESSORS.get(model_type) or {}
    return names.get("torchvision") or names.get("pil")


def is_torchvision_alone(name: str) -> bool:
    """True for an image processor that has no class for Pillow."""
    return any(names.get("torchvision") == name and "pil" not in names for names in _PROCESSORS.values())


def dual_encoder_of(config: PretrainedConfig) -> Any | None:
    """The configuration class of the dual encoder whose vision part has this configuration; None for any other model."""
    family = _family_of(config.model_type)
    if family not in CONFIG_MAPPING:
        return None
    outer: Any = CONFIG_MAPPING[family]
    check("transformers", isinstance(getattr(outer, "sub_configs", None), dict), f"{outer} has no sub_configs", _PURPOSE)
    return outer if outer.sub_configs.get("vision_config") is type(config) else None
