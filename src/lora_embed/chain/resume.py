"""Where reading goes on in a tar of which some chunks are committed: from what their parts tell."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from lora_embed.chain.items import Staged, WorkItem
from lora_embed.schema import WHOLE, Layout, Part, Span
from lora_embed.table.parts import ChunkPlace, part_path, read_place

READERS = 8  # threads: parts are small, and a store takes its time for each


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Samples to read one after the other, and the keys of those that were passed over since the stretch before."""

    span: Span
    passed: frozenset[str] = frozenset()


FROM_THE_START = [Stretch(span=WHOLE)]


def find_stretches(item: WorkItem, layout: Layout) -> list[Stretch]:
    """What is to be read of a shard, in order: where its chunks are missing, and nothing before or between.

    The whole shard where nothing is committed, and where parts do not tell enough: those of a shard that another run
    published meanwhile are gone, and none knows its bytes in a tar with global headers.
    """
    if not item.done or item.staged is None or item.shard.kind != "tar" or item.limit is not None:
        return FROM_THE_START
    runs = list(missing_runs(item.done, item.staged.last))
    if not runs:
        return []
    needed = [chunk for chunk in item.done if runs[-1][1] is None or chunk <= runs[-1][1]]
    places = _read_places(item.staged, item.shard.id, needed, layout)
    if len(places) < len(needed):
        return FROM_THE_START
    return [_stretch(first, end, places, layout.chunk_size) for first, end in runs]


def _read_places(staged: Staged, shard_id: str, chunks: list[int], layout: Layout) -> dict[int, ChunkPlace]:
    """Of those chunks whose parts tell their places."""
    parts = [Part(shard_id=shard_id, chunk=chunk, last=chunk == staged.last) for chunk in chunks]
    paths = [part_path(staged.space_id, layout.layout_id, part) for part in parts]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(partial(read_place, staged.store), paths)
        return {chunk: place for chunk, place in zip(chunks, found, strict=True) if place is not None}


def missing_runs(done: frozenset[int], last: int | None) -> Iterator[tuple[int, int | None]]:
    """Chunks that are not done, as ranges [first, end); the one without an end goes on to the shard's, where that is open."""
    first = 0
    for chunk in sorted(done):
        if chunk > first:
            yield first, chunk
        first = chunk + 1
    if last is None:
        yield first, None


def _stretch(first: int, end: int | None, places: dict[int, ChunkPlace], chunk_size: int) -> Stretch:
    span = Span(
        first=first * chunk_size,
        begin=places[first - 1].end if first else 0,
        end=None if end is None else places[end].begin,
    )
    passed: set[str] = set()
    for chunk in range(first - 1, -1, -1):
        if chunk not in places:
            break
        passed |= places[chunk].keys
    return Stretch(span=span, passed=frozenset(passed))
