"""JSON that somebody else wrote: read within limits, and as records whose fields have their types."""

import functools
import json
import math
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from lora_embed.errors import TableError

if TYPE_CHECKING:
    from lora_embed.storage import Store

MOST_LEVELS = 64  # of lists and objects within each other
LARGEST = 2**63  # of whole numbers, as Arrow and other languages hold them
R = TypeVar("R")


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


def parse_record(kind: type[R], data: bytes | str) -> R:
    """A dataclass from JSON; fields that it does not know are left out.

    Raises ValueError, in words for a message, for what `parse_json` refuses, and a field that is missing or of another type.
    """
    found = json.dumps(parse_json(data))
    try:
        return cast(R, _adapter(kind).validate_json(found, strict=True))  # type: ignore[arg-type]  # a dataclass is hashable
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def read_record(store: "Store", path: str, kind: type[R]) -> R | None:
    """A record of a table; None where there is none. Raises TableError for one that is damaged."""
    data = store.read(path)
    try:
        return parse_record(kind, data) if data is not None else None
    except ValueError as error:
        raise TableError(f"{store.name(path)}: is damaged ({error}). Remove it, or name another table.") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
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
