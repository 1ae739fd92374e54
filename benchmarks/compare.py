"""What the measurements say: times of one run, medians and spread, whether vectors agree, and the break-even."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meter import Metered

SAME = 1e-5  # largest row-wise relative L2 difference of vectors that count as the same


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """A contestant's table: unique ids, sorted, and float32 (n, d) in their order."""

    ids: list[str]
    values: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RunTimes:
    """One run of one contestant. Start-up, steady and end add up to the whole run."""

    images: int
    whole_s: float
    startup_s: float  # from the command to its first vectors: a committed part, or a peer's first batch
    end_s: float  # from its last vectors to its end: writing the table, publishing, shutting down
    steady_images_per_s: float  # from the first vectors to the last, those of the first not counted; see `times_of`
    cpu_s: float
    peak_pss_bytes: int
    peak_rss_bytes: int

    @property
    def fixed_s(self) -> float:
        """Seconds that do not grow with the number of images."""
        return self.whole_s - self.images / self.steady_images_per_s


def times_of(metered: Metered, arrivals: Sequence[tuple[float, int]], images: int) -> RunTimes:
    """`arrivals`: (seconds since the epoch, images) of each part or batch, at least one.

    Where all vectors came at once, the steady rate is that of the whole run: no more is known of it.
    """
    (first, first_images), last = arrivals[0], arrivals[-1][0]
    is_steady = last > first and images > first_images
    return RunTimes(
        images=images,
        whole_s=metered.whole_s,
        startup_s=first - metered.started,
        end_s=metered.started + metered.whole_s - last,
        steady_images_per_s=(images - first_images) / (last - first) if is_steady else images / metered.whole_s,
        cpu_s=metered.cpu_s,
        peak_pss_bytes=metered.peak_pss_bytes,
        peak_rss_bytes=metered.peak_rss_bytes,
    )


def median_of(runs: Sequence[RunTimes]) -> RunTimes:
    """Each figure's median by itself."""
    return RunTimes(**{name: statistics.median(asdict(run)[name] for run in runs) for name in asdict(runs[0])})


def spread_of(runs: Sequence[RunTimes]) -> dict[str, list[float]]:
    """Each figure's (least, largest)."""
    found = {name: [asdict(run)[name] for run in runs] for name in asdict(runs[0])}
    return {name: [min(values), max(values)] for name, values in found.items()}


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One table of vectors held against another, row by row."""

    rows: int
    missing: int  # ids that only the reference has
    unexpected: int  # ids that it has not
    median: float  # of the relative L2 difference of a row
    largest: float

    @property
    def is_same(self) -> bool:
        return not self.missing and not self.unexpected and self.largest <= SAME


def sort_vectors(table: pa.Table) -> Vectors:
    """Columns `id` and `embedding` (any list type) → sorted by id. Raises ValueError for an id that is there twice."""
    ids = np.array(table.column("id").to_pylist(), dtype=object)
    flat = pa.concat_arrays([_storage(chunk).flatten() for chunk in table.column("embedding").chunks])
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(ids), -1)
    order = np.argsort(ids)
    ids = ids[order]
    if len(twice := ids[1:][ids[1:] == ids[:-1]]):
        raise ValueError(f"{len(twice)} ids are there twice: {twice[0]} …")
    return Vectors(ids=ids.tolist(), values=values[order])


def _storage(chunk: pa.Array) -> pa.Array:
    return chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk


def deviation_of(found: Vectors, reference: Vectors) -> Deviation:
    """Hold vectors against the reference's of the same ids."""
    place = {name: row for row, name in enumerate(reference.ids)}
    rows = [(row, place[name]) for row, name in enumerate(found.ids) if name in place]
    mine, theirs = found.values[[row for row, _ in rows]], reference.values[[row for _, row in rows]]
    relative = np.linalg.norm(mine - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    return Deviation(
        rows=len(found.ids),
        missing=len(reference.ids) - len(rows),
        unexpected=len(found.ids) - len(rows),
        median=float(np.median(relative)),
        largest=float(relative.max()),
    )


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """For which numbers of images our whole run is shorter than a peer's; None: no bound on that side, or never."""

    is_ever: bool
    from_images: int = 0
    to_images: int | None = None

    def describe(self) -> str:
        if not self.is_ever:
            return "never ahead"
        if self.to_images is not None:
            return f"ahead up to {self.to_images:,} images"
        return f"ahead from {self.from_images:,} images" if self.from_images else "always ahead"


def break_even(ours: RunTimes, peer: RunTimes) -> BreakEven:
    """Where the two lines cross: whole run of n images = fixed seconds + n / steady rate."""
    fixed = ours.fixed_s - peer.fixed_s  # seconds that we lose before the first image
    gained = 1 / peer.steady_images_per_s - 1 / ours.steady_images_per_s  # seconds that we gain with each
    if fixed > 0:
        return BreakEven(is_ever=gained > 0, from_images=math.ceil(fixed / gained) if gained > 0 else 0)
    return BreakEven(is_ever=True, to_images=None if gained >= 0 else math.floor(fixed / gained))
