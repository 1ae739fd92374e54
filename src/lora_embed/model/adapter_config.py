"""An adapter's configuration: what each field means for the merge, and which fields are refused.

PEFT gives the defaults; this module decides by name.
"""

import json
import re
import sys
import textwrap
from typing import Any

from lora_embed.errors import AdapterMismatch
from lora_embed.model.files import ADAPTER_CONFIG

# Fields that change what an adapter computes. All are handled, in `match.py` and `change.py`.
_HANDLED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "init_lora_weights",
}  # fmt: skip
# Fields that say which modules were trained. The tensors show that too; `match.py` compares both.
_SHOWN_BY_TENSORS = {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
# Fields without effect on inference. fan_in_fan_out is for layers that store their weight transposed (GPT-2's Conv1D). PEFT
# ignores it for all other layers, and no model of images has such layers.
_IRRELEVANT = {
    "lora_dropout", "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "megatron_core", "ensure_weight_tying", "qalora_group_size", "eva_config",
    "corda_config", "lora_ga_config", "loftq_config", "fan_in_fan_out", "merge_weights",
}  # fmt: skip
# Initialisations that do not change the base, and two whose change of the base can be computed from the base alone.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_RESIDUAL_INITIALISATIONS = ("pissa", "olora")
# Fields of adapters that PEFT does not merge either, or merges wrongly → what to say of them.
_NEVER_MERGED = {
    "alora_invocation_tokens": "whose change depends on the input, so no weights can hold it. Train a plain LoRA.",
    "arrow_config": "which neither lora-embed nor PEFT can merge. Leave the adapter out.",
    "layer_replication": (
        "which cannot be folded. Do not merge it with PEFT either: the copies of a layer share one weight, so the result is "
        "wrong. Train the adapter without that setting."
    ),
    "use_qalora": "which neither lora-embed nor PEFT can merge. Train the adapter without that setting.",
}
_MERGE = "Merge the adapter into its base by PEFT's merge_and_unload, and name the result as the base."
MOST_NAMED = 1000  # characters in the name of a tensor, a module or a base


def residual_kind(config: dict[str, Any]) -> Any:
    """`pissa` or `olora` if the adapter was trained on the rest of the base that these initialisations leave, else None."""
    initialisation = config.get("init_lora_weights")
    lowered = initialisation.lower() if isinstance(initialisation, str) else initialisation
    return lowered if lowered in _RESIDUAL_INITIALISATIONS else None


def check_config(uri: str, config: dict[str, Any]) -> None:
    """Check the types of the fields that are handled, and refuse every other field that differs from PEFT's default."""
    _check_types(uri, config)
    for field in sorted(config.keys() - _HANDLED - _SHOWN_BY_TENSORS - _IRRELEVANT):
        value = config[field]
        if not value:  # the default of all other fields; they switch something on
            continue
        from lora_embed.model.peft_private import defaults  # imports peft, which takes seconds

        if value == defaults.get(field):
            continue
        raise AdapterMismatch(f"{uri}: {ADAPTER_CONFIG} sets {field}={_shown(value)}, {_why_not(field, field in defaults)}")
    initialisation = config.get("init_lora_weights", True)
    lowered = initialisation.lower() if isinstance(initialisation, str) else initialisation
    if lowered not in _HARMLESS_INITIALISATIONS and residual_kind(config) is None:
        reason, advice = "is not known", _MERGE
        if isinstance(lowered, str) and re.match("pissa|corda|lora_ga|loftq", lowered):
            reason = "changes the base's own weights in a way that the files do not show"
            advice = "Convert it to a plain LoRA adapter: save it with PEFT's path_initial_model_for_weight_conversion."
        if lowered == "loftq":  # PEFT converts the others
            advice = _MERGE.replace("its base", "the quantised base that was saved with it,")
        raise AdapterMismatch(
            f"{uri}: was trained with init_lora_weights={json.dumps(initialisation)}, which {reason}. {advice}"
        )


def _why_not(field: str, is_known: bool) -> str:
    """Why a setting is refused, and what to do; completes a sentence about it."""
    if field in _NEVER_MERGED:
        return _NEVER_MERGED[field]
    if not is_known:
        return f"which is not known to this version of PEFT. {_MERGE} Use the version of PEFT that wrote the adapter."
    return f"which is not supported. {_MERGE} Or train it without that setting."


def _check_types(uri: str, config: dict[str, Any]) -> None:
    expectations: dict[str, tuple[str, Any]] = {
        "r": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
        "lora_alpha": ("a finite number", _is_number),
        "rank_pattern": ('an object such as {"q_proj": 8}', _is_pattern),
        "alpha_pattern": ('an object such as {"q_proj": 8}', _is_pattern),
        "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
        "use_dora": ("true or false", lambda value: isinstance(value, bool)),
        "lora_bias": ("true or false", lambda value: isinstance(value, bool)),
        "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
        "target_modules": ("a list of names, or a pattern", _is_names),
        "exclude_modules": ("a list of names, or a pattern", _is_names),
        "modules_to_save": ("a list of names", lambda value: isinstance(value, list) and _is_names(value)),
        "layers_pattern": ("a list of names, or a pattern", _is_names),
        "layers_to_transform": ("numbers of layers", lambda value: all(type(n) is int for n in _listed(value))),
        "init_lora_weights": ("true, false or a name", lambda value: isinstance(value, bool | str)),
        "base_model_name_or_path": ("a name", lambda value: isinstance(value, str) and len(value) <= MOST_NAMED),
    }
    for field, (expected, is_right) in expectations.items():
        value = config.get(field)
        if value is None and field not in ("r", "lora_alpha"):
            continue
        if not is_right(value):
            state = f"is {_shown(value)}" if field in config else "is missing"
            raise AdapterMismatch(
                f"{uri}: {field} of {ADAPTER_CONFIG} {state}, expected {expected}. Write there the value used in training, or "
                f"copy {ADAPTER_CONFIG} again."
            )


def _shown(value: Any) -> str:
    """A value of the file, as JSON, for a message."""
    return (
        textwrap.shorten(json.dumps(value), 100, placeholder=" …")
        if isinstance(value, dict | list)
        else json.dumps(value)[:100]
    )


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())


def _is_names(value: Any) -> bool:
    return all(isinstance(name, str) for name in _listed(value))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    """True for a finite number that fits into a float."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
