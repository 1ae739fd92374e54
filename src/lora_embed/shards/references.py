"""The rows of a list of references → samples, in order. Objects are fetched many at once, in bounded memory."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lora_embed.schema import Rows, Sample, Shard, Wanted, from_ipc
from lora_embed.shards.fields import values_of
from lora_embed.store.objects import Fetched, Reach, Room, fetch, look
from lora_embed.store.place import locate, place_of
from lora_embed.text import in_one_line, redacted

REFERENCE, KEY, ETAG, FIELD = "reference", "key", "etag", "field "  # columns of packed rows; the last is a prefix
AT_ONCE = 32  # objects of a shard that are fetched at the same time
HELD = 2**28  # bytes of objects that are fetched before their turn; one for which there is no room waits for its turn


def read_references(shard: Shard, options: dict[str, Any], wanted: Wanted, max_bytes: int) -> Iterator[Sample]:
    """Yield each row as a sample. Only the objects of wanted rows are fetched, up to `AT_ONCE` at the same time."""
    assert shard.rows is not None
    batch, repeated = from_ipc(shard.rows.packed), shard.rows.repeated
    references, keys = (batch.column(name).to_pylist() for name in (REFERENCE, KEY))
    etags = batch.column(ETAG).to_pylist() if ETAG in batch.schema.names else [None] * len(keys)
    fields = {name.removeprefix(FIELD): values_of(batch[name]) for name in batch.schema.names if name.startswith(FIELD)}
    fetching = _Fetching(shard.rows, options, max_bytes)
    pool, ahead = ThreadPoolExecutor(AT_ONCE), deque[Future[_Ahead] | None]()
    try:
        for number, key in enumerate(keys):
            for row in range(number + len(ahead), min(number + AT_ONCE, len(keys))):
                is_fetched = wanted(row) and row not in repeated and references[row] is not None
                ahead.append(pool.submit(fetching.ahead, references[row], etags[row]) if is_fetched else None)
            sample, future = Sample(key), ahead.popleft()
            if wanted(number):
                sample.fields = {name: values[number] for name, values in fields.items()}
                if references[number] is None:
                    sample.problem = ("no_image", "the row names no image")
                if number in repeated:
                    sample.problem = ("duplicate_id", "an earlier row of the list has the same key")
            if future is None:
                yield sample
                continue
            fetched = future.result()
            fetching.finish(sample, fetched)
            yield sample
            fetching.release(fetched.held)
    finally:
        pool.shutdown(cancel_futures=True)


def reach_of(rows: Rows, options: dict[str, Any]) -> Reach:
    """How the objects of a list are reached. Hosts on the web that the job names may have private addresses."""
    named = [place_of(place) for place in (rows.folder, *rows.roots)]
    return Reach(options=options, private=frozenset(place.host for place in named if place.is_web))


def etags_of(references: list[str | None], rows: Rows, options: dict[str, Any]) -> list[str]:
    """The etag of each reference's object; empty where there is none."""
    reach = reach_of(rows, options)

    def etag_of(reference: str | None) -> str:
        try:
            entry = look(locate(reference or "", rows.folder), reach)
        except ValueError:
            return ""
        return "" if entry is None else entry.etag

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(etag_of, references))


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """An object that was fetched before its turn, and the bytes that it holds."""

    reference: str
    etag: str | None
    fetched: Fetched
    held: int = 0


class _Fetching:
    """Fetches the objects of a shard in several threads. Those that are fetched before their turn share `HELD` bytes."""

    def __init__(self, rows: Rows, options: dict[str, Any], max_bytes: int) -> None:
        self._folder, self._reach, self._max_bytes = rows.folder, reach_of(rows, options), max_bytes
        self._lock, self._left = threading.Lock(), HELD

    def ahead(self, reference: str, etag: str | None) -> _Ahead:
        held = 0

        def room(size: int) -> bool:
            nonlocal held
            with self._lock:
                if size > self._left:
                    return False
                self._left -= size
            held += size
            return True

        fetched = self._fetch(reference, etag, room)
        if fetched.data is None:
            self.release(held)
            held = 0
        return _Ahead(reference=reference, etag=etag, fetched=fetched, held=held)

    def finish(self, sample: Sample, ahead: _Ahead) -> None:
        """Put an object, whose turn it is, into its sample."""
        fetched = ahead.fetched
        if fetched.waits:
            fetched = self._fetch(ahead.reference, ahead.etag, lambda size: True)
        sample.data, sample.excess = fetched.data, fetched.excess
        if fetched.missing:
            sample.problem = ("no_image", f"{in_one_line(redacted(ahead.reference))} {fetched.missing}")

    def release(self, size: int) -> None:
        with self._lock:
            self._left += size

    def _fetch(self, reference: str, etag: str | None, room: Room) -> Fetched:
        try:
            place = locate(reference, self._folder)
        except ValueError as error:
            return Fetched(missing=str(error))
        return fetch(place, self._reach, self._max_bytes, room, etag)
