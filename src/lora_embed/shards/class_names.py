"""The names of classes that Hugging Face datasets keep in a Parquet file's schema, in place of the numbers in its columns."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import pyarrow as pa

from lora_embed.schema import FEATURES

Naming: TypeAlias = Callable[[Any], Any]  # a value with numbers of classes → the value with their names
_LISTS = ("Sequence", "List", "LargeList")


def namings_of(schema: pa.Schema, columns: Iterable[str]) -> dict[str, Naming]:
    """A naming for those of these columns, or parts of structs, whose values are or hold a `ClassLabel`."""
    with contextlib.suppress(RecursionError):  # a stranger's: then there are no names
        found = {column: _naming(feature) for column, feature in _described(schema, columns)}
        return {column: naming for column, naming in found.items() if naming is not None}
    return {}


def class_labels(schema: pa.Schema, columns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The descriptions of those of these columns that are numbers of classes with names."""
    found = {column: feature for column, feature in _described(schema, columns) if isinstance(feature, dict)}
    is_label = {column: feature.get("_type") == "ClassLabel" for column, feature in found.items()}
    names = {column: feature.get("names") for column, feature in found.items() if is_label[column]}
    return {column: {"names": of_column, "_type": "ClassLabel"} for column, of_column in names.items() if _of_class(of_column)}


def _described(schema: pa.Schema, columns: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Columns, or parts of structs, and how `datasets` described them in the schema; nothing if it did not."""
    features: Any = None
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        features = json.loads((schema.metadata or {})[FEATURES])["info"]["features"]
    yield from ((column, _at(features, schema, column)) for column in columns)


def _at(features: Any, schema: pa.Schema, column: str) -> Any:
    """How `features` describe a column, or a part of a struct."""
    for name in [column] if column in schema.names else column.split("."):
        features = features.get(name) if isinstance(features, dict) else None
    return features


def _naming(feature: Any) -> Naming | None:
    """The naming of values that a feature describes; None where no class is in them."""
    if isinstance(feature, list):
        return _in_list(feature[0]) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        return _of_class(feature.get("names"))
    return _in_list(feature.get("feature")) if kind in _LISTS else _in_struct(feature)


def _of_class(names: Any) -> Naming | None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    # Numbers without a name, such as the -1 of a sample without a label, become None.
    return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _in_list(feature: Any) -> Naming | None:
    if (inner := _naming(feature)) is None:
        return None
    parts = {name: _in_list(part) for name, part in feature.items()} if isinstance(feature, dict) else {}

    def named(value: Any) -> Any:
        if isinstance(value, dict):  # `datasets` writes a list of structs as a struct of lists
            return {name: naming(part) if (naming := parts.get(name)) else part for name, part in value.items()}
        return [inner(part) for part in value] if isinstance(value, list) else value

    return named


def _in_struct(features: dict[str, Any]) -> Naming | None:
    namings = {name: naming for name, part in features.items() if (naming := _naming(part)) is not None}
    if not namings:
        return None

    def named(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: namings[name](part) if name in namings else part for name, part in value.items()}

    return named
