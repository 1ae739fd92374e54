"""Find where to read in a tar of which some chunks are committed, from the byte ranges that their parts record."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from lora_embed.chain.items import Staged, WorkItem
from lora_embed.schema import WHOLE, Layout, Part, Span
from lora_embed.table.parts import ChunkPlace, part_path, read_place

READERS = 8  # threads; parts are small, so most of the time is spent on waiting for the store


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Samples to read one after the other, and the keys of the samples that were skipped just before them."""

    span: Span
    skipped_keys: frozenset[str] = frozenset()


FROM_THE_START = [Stretch(span=WHOLE)]


def find_stretches(item: WorkItem, layout: Layout) -> list[Stretch]:
    """The stretches of a shard that must be read, in order: only those whose chunks are missing.

    The whole shard if nothing is committed or the parts do not tell enough: another run may have published and removed
    them, and parts of a tar with global headers do not record byte ranges.
    """
    if not item.done or item.staged is None or item.shard.kind != "tar" or item.limit is not None:
        return FROM_THE_START
    runs = list(missing_runs(item.done, item.staged.last))
    if not runs:
        return []
    chunks_needed = [chunk for chunk in item.done if runs[-1][1] is None or chunk <= runs[-1][1]]
    places = _read_places(item.staged, item.shard.id, chunks_needed, layout)
    if len(places) < len(chunks_needed):
        return FROM_THE_START
    return [_stretch(first, end, places, layout.chunk_size) for first, end in runs]


def _read_places(staged: Staged, shard_id: str, chunks: list[int], layout: Layout) -> dict[int, ChunkPlace]:
    """The places of those chunks whose parts record them."""
    parts = [Part(shard_id=shard_id, chunk=chunk, last=chunk == staged.last) for chunk in chunks]
    paths = [part_path(staged.space_id, layout.layout_id, part) for part in parts]
    with ThreadPoolExecutor(READERS) as pool:
        places = pool.map(partial(read_place, staged.store), paths)
        return {chunk: place for chunk, place in zip(chunks, places, strict=True) if place is not None}


def missing_runs(done: frozenset[int], last: int | None) -> Iterator[tuple[int, int | None]]:
    """Chunks that are not done, as ranges [first, end). The last range has no end if the shard's last chunk is not known."""
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
    skipped_keys: set[str] = set()
    for chunk in range(first - 1, -1, -1):
        if chunk not in places:
            break
        skipped_keys |= places[chunk].keys
    return Stretch(span=span, skipped_keys=frozenset(skipped_keys))
