"""What a table says, which others may have written: JSON → one of this package's records, or one message."""

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from lora_embed.config.messages import first_wrong
from lora_embed.errors import TableError
from lora_embed.store.store import Store

Count = Annotated[int, Field(ge=0, lt=2**53)]
SpaceId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
MOST_LEVELS = 64  # of lists and objects within each other, in small records
LARGEST = 2**63  # of whole numbers there, as Arrow and other languages hold them
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecipeRecord:
    """`recipes/*.json`: the space that a recipe was built into."""

    space_id: SpaceId


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """What `auto` was on the device that a table was begun on."""

    precision: Literal["float32", "bfloat16", "float16"]
    batch_size: Annotated[int, Field(ge=1, lt=2**20)]


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """How long the images of a sample took."""

    seconds_an_image: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def read_json(data: bytes, where: str, remedy: str = "Remove it.") -> Any:
    """What a JSON file holds. Raises TableError, naming `where`, for one that is none, or nested without end."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{where}: is damaged ({error}). {remedy}") from None


def parse_json(data: bytes | str) -> Any:
    """Plain data. Raises ValueError, in words for a message, for what is no JSON in UTF-8 or more than a reader can take:

    numbers that are not finite or beyond 64 bits, a name that stands twice in an object, deep nesting.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        found = json.loads(
            text, object_pairs_hook=_once, parse_int=_whole, parse_float=_finite, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None
    _refuse_depth(found)
    return found


def parse_record(kind: type[T], data: bytes | str) -> T:
    """A small record from JSON; fields that only a newer release knows are passed over.

    Raises ValueError, in words for a message, for what `parse_json` refuses, and a field that is missing or of another type.
    """
    found = json.dumps(parse_json(data))
    try:
        return cast(T, _adapter_of(cast(Any, kind)).validate_json(found, strict=True))
    except ValidationError as error:
        raise ValueError(first_wrong(error)) from None


def taken_as(kind: type[T], value: Any, where: str) -> T:
    """A value as a dataclass or model of this package. Raises TableError, naming `where`, for one that does not fit.

    Fields that only a newer release knows are passed over.
    """
    try:
        return cast(T, _adapter_of(cast(Any, kind)).validate_python(value, extra="ignore"))
    except ValidationError as error:
        raise TableError(f"{where}: {first_wrong(error)}. It is damaged, or lora-embed has not written it.") from None


def read_record(store: Store, path: str, kind: type[T]) -> T | None:
    """The record at a path of a table; None where there is none. Raises TableError for one that does not fit."""
    data = store.read(path)
    return taken_as(kind, read_json(data, store.name(path)), store.name(path)) if data is not None else None


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)[:60]!r} twice")
    return found


def _whole(text: str) -> int:
    if len(text) <= 20 and -LARGEST <= (number := int(text)) < LARGEST:
        return number
    raise ValueError(f"the number {text[:30]}… is beyond 64 bits")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"the number {text[:30]} is beyond what a float holds")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _refuse_depth(found: Any) -> None:
    level = [found]
    for _ in range(MOST_LEVELS + 1):
        level = [held for value in level if isinstance(value, dict | list) for held in _held(value)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")


def _held(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
