"""Records of a table, which somebody else may have written: JSON → a checked record of this package, or one error."""

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NoReturn, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from lora_embed.config.messages import first_wrong
from lora_embed.config.values import Precision
from lora_embed.errors import TableError
from lora_embed.store.store import Store

Count = Annotated[int, Field(ge=0, lt=2**53)]
SpaceId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
MOST_LEVELS = 64  # how deep lists and objects of a small record may be nested
LARGEST = 2**63  # whole numbers of a record are below this, so that Arrow and other languages can hold them
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecipeRecord:
    """A file `recipes/*.json`: the space of the encoder that was built from a recipe."""

    space_id: SpaceId


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """The values that `auto` stood for on the device of a table's first run."""

    precision: Precision
    batch_size: Annotated[int, Field(ge=1, lt=2**20)]


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """The time that one image of a sample took."""

    seconds_an_image: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def read_json(data: bytes, where: str, remedy: str = "Remove it.") -> Any:
    """The content of a JSON file. Raises TableError, naming `where`, for data that is not JSON or is nested too deeply."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{where}: is damaged ({error}). {remedy}") from None


def parse_json(data: bytes | str) -> Any:
    """Plain data from JSON. Raises ValueError, whose text is a part of a message, for data that is not JSON in UTF-8.

    Also for JSON that some reader could not take: numbers that are not finite or beyond 64 bits, a name twice in one object,
    deep nesting.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique_names, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None
    _refuse_depth(value)
    return value


def parse_record(kind: type[T], data: bytes | str) -> T:
    """A small record from JSON. Fields that only a newer release knows are ignored.

    Raises ValueError, whose text is a part of a message, for JSON that `parse_json` refuses, and for a field that is missing
    or of another type.
    """
    text = json.dumps(parse_json(data))
    try:
        return cast(T, _adapter_of(cast(Any, kind)).validate_json(text, strict=True))
    except ValidationError as error:
        raise ValueError(first_wrong(error)) from None


def taken_as(kind: type[T], value: Any, where: str) -> T:
    """A value as a dataclass or model of this package. Raises TableError, naming `where`, for a value that does not fit.

    Fields that only a newer release knows are ignored.
    """
    try:
        return cast(T, _adapter_of(cast(Any, kind)).validate_python(value, extra="ignore"))
    except ValidationError as error:
        raise TableError(f"{where}: {first_wrong(error)}. It is damaged, or lora-embed has not written it.") from None


def read_record(store: Store, path: str, kind: type[T]) -> T | None:
    """The record at a path of a table; None where there is no such file. Raises TableError for a record that does not fit."""
    data = store.read(path)
    return taken_as(kind, read_json(data, store.name(path)), store.name(path)) if data is not None else None


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)[:60]!r} twice")
    return record


def _whole(text: str) -> int:
    if len(text) <= 20 and -LARGEST <= (number := int(text)) < LARGEST:
        return number
    raise ValueError(f"the number {text[:30]}… does not fit into 64 bits")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"the number {text[:30]} is too large for a float")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _refuse_depth(root: Any) -> None:
    level = [root]
    for _ in range(MOST_LEVELS + 1):
        level = [item for value in level if isinstance(value, dict | list) for item in _items(value)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
