"""The private parts of PEFT that are used, its two rules for matching names. They are checked when this is imported."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from peft import LoraConfig

from lora_embed.libraries import check, part
from lora_embed.model.endless import Expression

_PURPOSE = "find the modules that an adapter changes, and their ranks, as PEFT itself does"
_matches = part("peft", "peft.tuners.tuners_utils:check_target_module_exists", _PURPOSE, takes=("config", "key"))
_pattern_key = part("peft", "peft.utils.other:get_pattern_key", _PURPOSE, takes=("pattern_keys", "key_to_match"))

LoraLayer: Any = part("peft", "peft.tuners.lora:LoraLayer", "compare a merge with the adapters before it")

defaults = dataclasses.asdict(LoraConfig())  # of all fields of an adapter's configuration


def targeting(config: dict[str, Any]) -> Callable[[str], bool]:
    """A function that tells whether an adapter's configuration, which has `target_modules`, targets a module of a name.

    Fields that PEFT ignores in a combination, such as layers beside a pattern, are left out, since PEFT would refuse them.
    The expressions must have been tried by `endless`: one that cannot be read raises re.error, and others never end.
    """
    fields = ["target_modules", "exclude_modules", "modules_to_save"]
    if config.get("layers_to_transform") is not None and not isinstance(config["target_modules"], str):
        fields += ["layers_to_transform", "layers_pattern"]
    relevant: dict[str, Any] = {field: config.get(field) for field in fields}
    rule = LoraConfig(**relevant)
    return lambda module: bool(_matches(rule, module))


def expressions_of_targets(config: dict[str, Any]) -> list[list[Expression]]:
    """All regular expressions that `targeting` may match a name with, as PEFT writes them."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    expressions: list[Expression] = [("fullmatch", text, text) for text in (targets, excluded) if isinstance(text, str)]
    expressions += [("match", rf"(^|.*\.){text}($|\..*)", text) for text in config.get("modules_to_save") or ()]
    layers = config.get("layers_pattern") or ()
    layers = [layers] if isinstance(layers, str) else layers
    expressions += [("match", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", text) for text in layers]
    return [[expression] for expression in expressions]


def expressions_of_names(patterns: dict[str, Any]) -> list[Expression]:
    """The regular expressions by which `named_by` finds a module, in their order, as PEFT writes them."""
    return [("match", rf"(.*\.)?({text})$", text) for text in patterns]


def named_by(patterns: dict[str, Any], module: str) -> str:
    """The first pattern, of ranks or alphas, that matches a module; the module's own name if none matches.

    Like those of `targeting`, the patterns must have been tried.
    """
    return str(_pattern_key(list(patterns), module))


def _is_as_expected() -> bool:
    """True if both rules give the right answers on examples that use every kind of field."""
    parts = targeting({"target_modules": ["query"], "exclude_modules": ["1.query"], "layers_to_transform": [0, 1]})
    whole = targeting({"target_modules": r".*\.(query|key)", "modules_to_save": ["head"]})
    names = [f"vit.layer.{number}.{name}" for number in range(3) for name in ("query", "key")]
    try:
        return (
            [name for name in names if parts(name)] == ["vit.layer.0.query"]
            and all(whole(name) for name in names)
            and not whole("head.query")
            and named_by({"query": 1}, "layer.0.query") == "query"
            and named_by({"query": 1}, "layer.0.key") == "layer.0.key"
        )
    except (re.error, TypeError, AttributeError, ValueError):
        return False


check("peft", _is_as_expected(), "its rules find other modules than PEFT 0.21's", _PURPOSE)
