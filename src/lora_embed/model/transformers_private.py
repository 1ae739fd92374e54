"""The private part of transformers that is used: it finds the dual encoder of a vision model. It is checked when imported."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from lora_embed.libraries import check, part

_PURPOSE = "find the dual encoder (CLIP, SigLIP) that a vision model is part of"
_family_of = part("transformers", "transformers.models.auto.configuration_auto:model_type_to_module_name", _PURPOSE)
_IS_FAMILY = _family_of("clip_vision_model") == "clip" and "clip" in CONFIG_MAPPING
check("transformers", _IS_FAMILY, "model_type_to_module_name of clip_vision_model is not clip", _PURPOSE)


def dual_encoder_of(config: PretrainedConfig) -> Any | None:
    """The configuration class of the dual encoder whose vision part has this configuration; None for any other model."""
    family = _family_of(config.model_type)
    if family not in CONFIG_MAPPING:
        return None
    outer: Any = CONFIG_MAPPING[family]
    check("transformers", isinstance(getattr(outer, "sub_configs", None), dict), f"{outer} has no sub_configs", _PURPOSE)
    return outer if outer.sub_configs.get("vision_config") is type(config) else None
