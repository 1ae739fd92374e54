"""Values of a sample's fields: from Parquet to Python, and from Python to the column that carries them."""

import codecs
import contextlib
import datetime
import decimal
import json
from collections.abc import Collection
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

MOST_FIELD = 16 * 2**20  # bytes of the largest value that is carried; JSON unpacks to 30 times its size


def value_of(scalar: pa.Scalar) -> Any:
    """A value of a Parquet column as a Python value; None if Python cannot hold it, such as a day after the year 9999.

    Also None for a value larger than `MOST_FIELD`; its size is known before it is converted. Raises UnicodeDecodeError for
    text that is not UTF-8, since then the file is damaged.
    """
    try:
        return scalar.as_py() if _weight(scalar) <= MOST_FIELD else None
    except UnicodeDecodeError:
        raise
    except Exception:  # noqa: BLE001  # dates, time zones and foreign types alone raise a dozen kinds of errors
        return None


def values_of(column: pa.Array) -> list[Any]:
    """`value_of` for all values of a column."""
    with contextlib.suppress(Exception):  # Python cannot hold one of the values: they are converted one by one below
        if _weight_of_all(column) <= MOST_FIELD:
            return cast(list[Any], column.to_pylist())
    return [value_of(scalar) for scalar in column]


def _weight(scalar: pa.Scalar) -> int:
    """About the size of a value in bytes, plus one byte for each value in it; 0 for a number."""
    kind = scalar.type
    if not scalar.is_valid or pa.types.is_primitive(kind):
        return 0
    if isinstance(scalar, pa.BinaryScalar):
        return int(scalar.as_buffer().size)
    if isinstance(scalar, pa.ListScalar):
        return _weight_of_all(scalar.values)
    if isinstance(scalar, pa.StructScalar):
        return sum(_weight(scalar[number]) for number in range(kind.num_fields))
    return _weight(scalar.value) if isinstance(scalar, pa.DictionaryScalar | pa.ExtensionScalar) else 0


def _weight_of_all(values: pa.Array) -> int:
    """The sum of `_weight` over all values of an array."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        if not _has_length(kind.value_type):
            return len(values) * (1 + int(values.dictionary.nbytes))
        return len(values) + (pc.sum(pc.take(pc.binary_length(values.dictionary), values.indices)).as_py() or 0)
    if isinstance(kind, pa.BaseExtensionType):
        return _weight_of_all(values.storage)
    if pa.types.is_struct(kind):
        return len(values) + sum(_weight_of_all(values.field(number)) for number in range(kind.num_fields))
    if pa.types.is_nested(kind):
        return len(values) + _weight_of_all(values.flatten())
    return len(values) + int(values.nbytes)


def _has_length(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    )


def fields_of_file(extension: str, data: bytes, fields: Collection[str]) -> dict[str, Any]:
    """The fields that a small file holds: its text if the field is named like its extension, or else its keys as JSON."""
    if extension in fields:
        return {extension: _decoded(data).strip()}
    try:
        values = json.loads(_decoded(data))
    except (ValueError, RecursionError):
        return {}
    return {name: values[name] for name in values if name in fields} if isinstance(values, dict) else {}


def _decoded(data: bytes) -> str:
    """Text of a file, which may begin with a byte order mark."""
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig", "replace")


def typed(value: Any, kind: str) -> Any:
    """A field's value as a type of `carry`, or None if it does not fit that type.

    A number may be text that Python can read, without underscores. Only a whole number fits int64.
    """
    try:
        return None if value is None else _typed(value, kind)
    except Exception:  # noqa: BLE001  # a stranger's value may raise any error in a conversion: it does not fit
        return None


def _typed(value: Any, kind: str) -> Any:
    if isinstance(value, bytes):  # Parquet may hold text without a mark that it is text
        value = value.decode()
    if kind == "string":
        return _text_of(value)
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    is_text = isinstance(value, str)
    if is_text and "_" in value:
        return None
    number = int(value) if kind == "int64" else float(value)
    if kind == "int64" and (not -(2**63) <= number < 2**63 or (not is_text and number != value)):
        return None
    return number


def _text_of(value: Any) -> str:
    """A value as text: days and times as ISO 8601, decimals with all their digits, lists and structs as JSON."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    is_json = value is None or isinstance(value, bool | int | float | list | tuple | dict)
    text = json.dumps(value, default=_text_of) if is_json else str(value)
    return text.encode("utf-8", "backslashreplace").decode()  # JSON may hold halves of surrogate pairs
