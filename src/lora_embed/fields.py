"""Values of a sample's fields, whatever they are: out of Parquet, and into the column that carries them."""

import json
from typing import Any

import pyarrow as pa


def value_of(scalar: pa.Scalar) -> Any:
    """A value of a Parquet column as Python has it; none for what Python cannot hold, such as a day beyond the year 9999.

    Raises UnicodeDecodeError for text that is not UTF-8: its file is damaged.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError):
        return None


def typed(value: Any, kind: str) -> Any:
    """A field's value as a type of `carry`, or null where it is none.

    A number may be given as text, as Python reads it but without underscores; what is no whole number is no int64.
    """
    if value is None:
        return None
    if kind == "string":
        return _text_of(value)
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    is_text = isinstance(value, str | bytes)
    if is_text and ("_" if isinstance(value, str) else b"_") in value:
        return None
    try:
        number = int(value) if kind == "int64" else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if kind == "int64" and (not -(2**63) <= number < 2**63 or (not is_text and number != value)):
        return None
    return number


def _text_of(value: Any) -> str | None:
    """Text as it is, all else as JSON writes it; none where it is nested too deeply for that."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except RecursionError:
        return None
    return text.encode("utf-8", "backslashreplace").decode()  # JSON may hold halves of surrogate pairs
