"""pydantic's errors → a sentence for each wrong key of a user's file: what was found, and what was expected."""

import difflib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_embed.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[str | int, ...]  # the keys and list positions that lead to a value


def checked(model: type[Model], data: dict[str, Any], where: str, overridden: dict[Keys, str]) -> Model:
    """Make a model of what a user wrote in the file `where`, or for the `overridden` keys on the command line.

    Raises ConfigError with a line for each wrong key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        by_key: dict[Keys, list[Any]] = {}
        for item in error.errors():
            by_key.setdefault(_keys_of(item), []).append(item)
    lines = []
    for keys, items in by_key.items():
        source = next((f"--set {text}" for changed, text in overridden.items() if keys[: len(changed)] == changed), where)
        lines.append(f"{source}: {_explain(model, keys, items)}")
    raise ConfigError("\n".join(lines))


def _keys_of(item: Any) -> Keys:
    """The keys that lead to a pydantic error, without the names that pydantic gives to the branches of a union."""
    branches = () if item["type"] == "extra_forbidden" else ("literal['auto']", "constrained-int")
    return tuple(part for part in item["loc"] if part not in branches)


def _explain(model: type[BaseModel], keys: Keys, items: list[Any]) -> str:
    """One sentence for the errors of one key; there are several where the key may be of several types."""
    item, key = items[0], _dotted(keys)
    kind, message = item["type"], str(item["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known_keys = list(_section_at(model, keys[:-1]).model_fields)
        return f"unknown key {key!r}" + (meant(keys[-1], known_keys) or f". Known keys: {', '.join(known_keys)}.")
    if kind == "missing":
        return f"key {key!r} is missing. Add it."
    if kind == "value_error" and not message.startswith("expected"):
        return f"{key}: {message}" if key else message
    expected = message.removeprefix("expected ") if kind == "value_error" else " or ".join(_expected(item) for item in items)
    if kind in ("model_type", "dict_type") and (section := _section_at(model, keys)) is not model:
        expected += f": {', '.join(section.model_fields)}"
    if kind == "literal_error" and len(items) == 1:
        expected += meant(item["input"], _choices(expected))
    shown_value = type(item["input"]).__name__ if key.endswith("_storage_options") else shown(item["input"])  # may hold secrets
    return f"{key} is {shown_value}, expected {expected}"


def meant(value: object, known: list[str]) -> str:
    """`. Did you mean 'x'?` where a value that is not known is almost a known one; else empty."""
    close = difflib.get_close_matches(str(value).strip().lower().replace("-", "_"), known, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _choices(expected: str) -> list[str]:
    """`a, b or c` → its words."""
    return expected.replace(" or ", ", ").split(", ")


def _expected(item: Any) -> str:
    """What pydantic would have accepted, in plain words."""
    context = item.get("ctx") or {}
    bounds = {"greater_than": "more than", "greater_than_equal": "at least", "less_than_equal": "at most"}
    if item["type"] in bounds:
        return f"{bounds[item['type']]} {next(iter(context.values())):g}"
    if item["type"] == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    if item["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    if item["type"] == "string_type" and isinstance(item["input"], int | float | bool):
        return "text: put quotes around it"
    words = {
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "dict_type": "keys and values",
        "model_type": "keys with values",
    }
    return words.get(item["type"]) or str(item["msg"])


def first_wrong(error: ValidationError) -> str:
    """The first error of a record that somebody else may have written: the key, what was found, what was expected."""
    item = error.errors(include_url=False)[0]
    message = str(item["msg"]).removeprefix("Value error, ")
    key = _dotted(tuple(part for part in item["loc"] if part not in ("nullable",)))
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key or 'it'} is {shown(item['input'])}, expected {_expected(item)}"


def _dotted(keys: Keys) -> str:
    """`resources.actors.max`, `adapters[0].weight`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def shown(value: Any) -> str:
    """A value as a user would write it, shortened where it is long."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | float) else str(value)
    text = text if value is not None else "empty"
    return text if len(text) <= 60 else f"{text[:60]} …"


def _section_at(model: type[BaseModel], keys: Keys) -> type[BaseModel]:
    """The section that the keys lead to, or that holds their value; list positions are ignored."""
    for name in keys:
        if name in model.model_fields:
            kind: Any = model.model_fields[str(name)].annotation
            kind = next((arg for arg in getattr(kind, "__args__", ()) if isinstance(arg, type)), kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return model
