"""Single objects that a list names, on a disk, in a store or on the web: look at one, and fetch one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_embed.entries import Entry
from lora_embed.errors import ShardError, StoreUnavailable
from lora_embed.store import local, web
from lora_embed.store.place import Place
from lora_embed.store.retry import describe, is_no_connection
from lora_embed.store.store import Store

Room = Callable[[int], bool]  # a number of bytes → True if so many more may be held now


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """An object's bytes, or why there are none: it is missing, larger than allowed, or for now there is no room for it."""

    data: bytes | None = None
    missing: str = ""  # a detail, as text after the reference
    excess: int = 0  # its size in bytes
    waits: bool = False


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How objects are reached: storage options of fsspec, and the web servers whose addresses may be private."""

    options: dict[str, Any]
    private: frozenset[str] = frozenset()  # `host:port`
    rejects_unreachable: bool = False

    def store_of(self, place: Place) -> Store:
        return Store(place.store, self.options, follows_links=True)


def fetch(place: Place, reach: Reach, most: int, room: Room, listed: str | None = None) -> Fetched:
    """An object of up to `most` bytes. `listed` is its etag as it was listed, if that is known.

    Raises StorageError, StoreUnavailable, and ShardError for an object that changed.
    """
    store = reach.store_of(place)
    if place.is_web:
        return _from_web(place, reach, most, room, store.retry_s)
    entry = _find(store, place)
    if entry is None:
        return Fetched(missing="does not exist")
    if listed is not None and entry.etag != listed:
        raise ShardError(f"{place.uri}: changed since it was listed. Run the same command again.")
    if entry.size > most:
        return Fetched(excess=entry.size)
    if not room(entry.size):
        return Fetched(waits=True)
    data = store.read(place.path)
    if data is None or len(data) != entry.size:
        raise ShardError(f"{place.uri}: changed while it was read. Run the same command again.")
    return Fetched(data=data)


_dead: dict[str, str] = {}  # hosts that gave no connection within `retry_s`, and the last error: they are not asked again
_MOST_DEAD = 100_000


def _from_web(place: Place, reach: Reach, most: int, room: Room, retry_s: float) -> Fetched:
    if reach.rejects_unreachable and place.host in _dead:
        return Fetched(missing=f"cannot be reached: {_dead[place.host]}")
    try:
        answer = web.fetch(place.uri, most, room, reach.private, retry_s)
    except StoreUnavailable as error:
        if not reach.rejects_unreachable:
            raise
        reason = describe(error.__cause__ or error)
        if is_no_connection(error.__cause__ or error) and len(_dead) < _MOST_DEAD:
            _dead[place.host] = reason
        return Fetched(missing=f"cannot be reached: {reason}")
    return Fetched(data=answer.data, missing=answer.missing, excess=answer.excess, waits=answer.waits)


def look(place: Place, reach: Reach) -> Entry | None:
    """An object's size and etag; None where there is none. Of what lies on the web, the etag alone."""
    store = reach.store_of(place)
    if place.is_web:
        etag = web.etag(place.uri, reach.private, store.retry_s)
        return None if etag is None else Entry(path=place.path, size=0, etag=etag)
    return _find(store, place)


def _find(store: Store, place: Place) -> Entry | None:
    return local.find(store.full_path(place.path), place.path) if place.is_local else store.info(place.path)
