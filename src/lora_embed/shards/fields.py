"""Values of a sample's fields, whatever they are: out of Parquet, and into the column that carries them."""

import contextlib
import json
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

MOST_FIELD = 16 * 2**20  # bytes of a value that may be carried; JSON unpacks to 30 times its size


def value_of(scalar: pa.Scalar) -> Any:
    """A value of a Parquet column as Python has it; none for what Python cannot hold, such as a day beyond the year 9999.

    None, too, for what is larger than `MOST_FIELD`, which is known before it is made. Raises UnicodeDecodeError for text
    that is not UTF-8: its file is damaged.
    """
    try:
        return scalar.as_py() if _weight(scalar) <= MOST_FIELD else None
    except UnicodeDecodeError:
        raise
    except Exception:  # noqa: BLE001  # of dates, time zones and foreign types alone there are a dozen kinds
        return None


def values_of(column: pa.Array) -> list[Any]:
    """`value_of` of each of a column's values."""
    with contextlib.suppress(Exception):  # of a value that is none in Python; what it is, the values tell one by one
        if _weight_of_all(column) <= MOST_FIELD:
            return cast(list[Any], column.to_pylist())
    return [value_of(scalar) for scalar in column]


def _weight(scalar: pa.Scalar) -> int:
    """About the bytes of a value, and one more for each value within it; 0 for a number."""
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
    """The same of all values of an array."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        longest = (
            pc.max(pc.binary_length(values.dictionary)).as_py() if _has_length(kind.value_type) else values.dictionary.nbytes
        )
        return len(values) * (1 + (longest or 0))
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


def typed(value: Any, kind: str) -> Any:
    """A field's value as a type of `carry`, or null where it is none.

    A number may be given as text, as Python reads it but without underscores; what is no whole number is no int64.
    """
    try:
        return None if value is None else _typed(value, kind)
    except Exception:  # noqa: BLE001  # values from anywhere raise what they like over a conversion; none of it is a fault here
        return None


def _typed(value: Any, kind: str) -> Any:
    if kind == "string":
        return _text_of(value)
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    is_text = isinstance(value, str | bytes)
    if is_text and ("_" if isinstance(value, str) else b"_") in value:
        return None
    number = int(value) if kind == "int64" else float(value)
    if kind == "int64" and (not -(2**63) <= number < 2**63 or (not is_text and number != value)):
        return None
    return number


def _text_of(value: Any) -> str:
    """Text as it is, all else as JSON writes it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode("utf-8", "backslashreplace").decode()  # JSON may hold halves of surrogate pairs
