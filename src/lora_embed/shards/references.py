"""The rows of a list of references → samples, in order. Objects are fetched many at once, in bounded memory."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lora_embed.schema import Rows, Sample, Shard, Wanted, from_ipc
from lora_embed.shards.fields import values_of
from lora_embed.store.objects import Fetched, Reach, fetch
from lora_embed.store.place import Place, locate, place_of
from lora_embed.text import in_one_line, redacted

REFERENCE, KEY, ETAG, FIELD = "reference", "key", "etag", "field "  # columns of packed rows; the last is a prefix
AT_ONCE = 32  # objects of a shard that are fetched at the same time
HELD = 2**28  # bytes of objects that are fetched before their turn; one for which there is no room waits for its turn


def read_references(shard: Shard, options: dict[str, Any], wanted: Wanted, max_bytes: int) -> Iterator[Sample]:
    """Yield each row as a sample. Only the objects of wanted rows are fetched, up to `AT_ONCE` at the same time.

    If `max_bytes` is 0, the fields alone are read.
    """
    assert shard.rows is not None
    batch, repeated = from_ipc(shard.rows.packed), shard.rows.repeated
    references, keys = (batch.column(name).to_pylist() for name in (REFERENCE, KEY))
    etags = batch.column(ETAG).to_pylist() if ETAG in batch.schema.names else [None] * len(keys)
    fields = {name.removeprefix(FIELD): values_of(batch[name]) for name in batch.schema.names if name.startswith(FIELD)}
    fetching = _Fetching(shard.rows, options, max_bytes)
    ahead: deque[_Object | None] = deque()
    try:
        for number, key in enumerate(keys):
            for row in range(number + len(ahead), min(number + AT_ONCE, len(keys))):
                is_fetched = max_bytes and wanted(row) and row not in repeated and references[row] is not None
                ahead.append(fetching.begin(references[row], etags[row]) if is_fetched else None)
            sample, on_its_way = Sample(key), ahead.popleft()
            if wanted(number):
                sample.fields = {name: values[number] for name, values in fields.items()}
                if references[number] is None:
                    sample.problem = ("no_image", "the row names no image")
                if number in repeated:
                    sample.problem = ("duplicate_id", "an earlier row of the list has the same key")
            if on_its_way is None:
                yield sample
                continue
            fetching.finish(sample, on_its_way)
            yield sample
            fetching.release(on_its_way.held)
    finally:
        fetching.stop()


def reach_of(rows: Rows, options: dict[str, Any]) -> Reach:
    """How the objects of a list are reached. Hosts on the web that the job names may have private addresses."""
    named = [place_of(place) for place in (rows.folder, *rows.roots)]
    private = frozenset(place.host for place in named if place.is_web)
    return Reach(options=options, private=private, rejects_unreachable=rows.rejects_unreachable)


@dataclass(kw_only=True)
class _Object:
    """An object whose turn comes soon."""

    reference: str
    etag: str | None
    place: Place | None = None
    detail: str = ""  # why there is no place
    future: Future[Fetched] | None = None
    held: int = 0  # bytes


class _Fetching:
    """Fetches the objects of a shard: remote ones before their turn, in several threads, which may hold `HELD` bytes."""

    def __init__(self, rows: Rows, options: dict[str, Any], max_bytes: int) -> None:
        self._folder, self._reach, self._max_bytes = place_of(rows.folder), reach_of(rows, options), max_bytes
        self._pool, self._lock, self._left = ThreadPoolExecutor(AT_ONCE), threading.Lock(), HELD

    def begin(self, reference: str, etag: str | None) -> _Object:
        """Begin to fetch an object, unless it lies on a local disk, which answers at once."""
        try:
            begun = _Object(reference=reference, etag=etag, place=locate(reference, self._folder))
        except ValueError as error:
            return _Object(reference=reference, etag=etag, detail=str(error))
        if begun.place is not None and not begun.place.is_local:
            begun.future = self._pool.submit(self._fetch_ahead, begun.place, begun)
        return begun

    def finish(self, sample: Sample, begun: _Object) -> None:
        """Put an object, whose turn it is, into its sample."""
        fetched = begun.future.result() if begun.future is not None else Fetched(missing=begun.detail, waits=not begun.detail)
        if fetched.waits and begun.place is not None:
            fetched = fetch(begun.place, self._reach, self._max_bytes, lambda size: True, begun.etag)
        sample.data, sample.excess = fetched.data, fetched.excess
        if fetched.missing:
            sample.problem = ("no_image", f"{in_one_line(redacted(begun.reference))} {fetched.missing}")

    def release(self, size: int) -> None:
        """An object's bytes were used."""
        with self._lock:
            self._left += size

    def stop(self) -> None:
        """Fetch no more. Waits for what is being fetched."""
        self._pool.shutdown(cancel_futures=True)

    def _fetch_ahead(self, place: Place, begun: _Object) -> Fetched:
        def room(size: int) -> bool:
            with self._lock:
                if size > self._left:
                    return False
                self._left -= size
            begun.held += size
            return True

        fetched = fetch(place, self._reach, self._max_bytes, room, begun.etag)
        if fetched.data is None:
            self.release(begun.held)
            begun.held = 0
        return fetched
