"""What a table says, which others may have written: JSON → one of this package's records, or one message."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from lora_embed.errors import TableError
from lora_embed.explain import first_wrong
from lora_embed.storage import Store

Count = Annotated[int, Field(ge=0, lt=2**53)]
SpaceId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
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
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{where}: is damaged ({error}). {remedy}") from None


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
