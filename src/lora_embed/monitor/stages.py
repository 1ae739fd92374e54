"""Where the time of a run goes, by stage and over time, and what bounds it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

STAGES = ("read", "decode", "forward", "write")
READING_EVERY_S, MOST_READINGS = 2.0, 240
BUSY = 0.85  # share of its time from which on a kind of worker is what all others wait for
T = TypeVar("T")


class Stopwatch:
    """Seconds of wall clock by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add what the block takes, whether or not it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def timed(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that it takes to get each."""
        iterator = iter(items)
        while True:
            with self.timing(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """The seconds up to now; counting begins anew."""
        taken, self.seconds = self.seconds, {}
        return taken


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How far a run was at a moment: samples and the workers' seconds by stage, from its beginning."""

    elapsed_s: float
    samples: int
    seconds: dict[str, float] = field(default_factory=dict)


class Timeline:
    """Readings of a run every few seconds; of a long one every second reading goes, again and again, so few are kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._every_s = READING_EVERY_S
        self.now = Reading(elapsed_s=0.0, samples=0)
        self._kept = [self.now]

    def add(self, samples: int, seconds: Mapping[str, float]) -> None:
        """Count what a worker has finished."""
        spent = dict(self.now.seconds)
        add_seconds(spent, seconds)
        self.now = Reading(elapsed_s=self._clock() - self._began, samples=self.now.samples + samples, seconds=spent)
        if self.now.elapsed_s - self._kept[-1].elapsed_s >= self._every_s:
            self._kept = [*self._kept, self.now]  # anew: a copy of this timeline keeps its own
        if len(self._kept) > MOST_READINGS:
            self._kept, self._every_s = self._kept[::2], self._every_s * 2

    def readings(self) -> tuple[Reading, ...]:
        """From zero to what was added last."""
        last = () if self._kept[-1] is self.now else (self.now,)
        return (*self._kept, *last)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What works at the same time: actors, and beside them tasks that read and decode; 0: the actors do that, too."""

    actors: int
    decoders: int = 0
    cpus_per_decoder: float = 1.0

    @property
    def readers(self) -> int:
        """How many read shards at a time."""
        return self.decoders or self.actors


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What bounds a run: a stage, "transfer" between stages, or "start" where too little was done to say."""

    by: str
    shares: dict[str, float]  # of the time of the workers that a stage runs on
    says: str


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Sum by stage, in place."""
    for stage, seconds in more.items():
        total[stage] = total.get(stage, 0.0) + seconds
    return total


def seconds_an_image(seconds: Mapping[str, float], samples: int, workers: Workers) -> float:
    """What an image takes in a run that never waits, by the seconds that these workers spent on so many samples."""
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    if not workers.decoders:
        return sum(spent.values()) / workers.actors / max(samples, 1)
    feeding = (spent["read"] + spent["decode"]) / workers.readers
    return max(feeding, spent["forward"] / workers.actors) / max(samples, 1)


def find_bound(seconds: Mapping[str, float], elapsed: float, workers: Workers) -> Bound:
    """Name what bounds a run that spent these seconds, summed over its workers, in `elapsed` seconds."""
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    if elapsed <= 0 or not sum(spent.values()):
        return Bound(by="start", shares={}, says="too little was embedded to say what bounds it")
    return _bound_apart(spent, elapsed, workers) if workers.decoders else _bound_together(spent, elapsed, workers)


def _bound_together(spent: dict[str, float], elapsed: float, workers: Workers) -> Bound:
    """Each actor does all stages one after the other: the longest stage bounds."""
    shares = {stage: seconds / (elapsed * workers.actors) for stage, seconds in spent.items()}
    idle = max(0.0, 1 - sum(shares.values()))
    by = max(shares, key=lambda stage: shares[stage])
    if idle > max(0.3, shares[by]):
        by, advice = "transfer", "actors wait for work: too few or too unequal shards for so many, or other work on these CPUs"
    else:
        advice = {
            "read": "storage is slow to answer: bring input and cluster nearer to each other, or use more CPUs",
            "decode": "more CPUs make it faster in proportion; a GPU hardly",
            "forward": "a GPU makes it faster, more CPUs in proportion",
            "write": "the table's storage is slow to answer: bring it nearer, or make chunks larger",
        }[by]
    figures = ", ".join(f"{stage} {share:.0%}" for stage, share in [*shares.items(), ("idle", idle)])
    says = f"bound by {by} ({_of(workers.actors, 'actor')}: {figures}): {advice}"
    return Bound(by=by, shares=shares | {"idle": idle}, says=says)


def _bound_apart(spent: dict[str, float], elapsed: float, workers: Workers) -> Bound:
    """Decoding feeds actors that hold a device: either they are busy, or what feeds them is too slow."""
    device = spent["forward"] / (elapsed * workers.actors)
    fed = {stage: spent[stage] / (elapsed * workers.decoders) for stage in ("read", "decode")}
    shares = {"forward": device} | fed
    feeding = (spent["read"] + spent["decode"]) * workers.cpus_per_decoder
    needed = math.ceil(feeding / spent["forward"]) if spent["forward"] else 1
    figures = (
        f"devices busy {device:.0%}; {_of(workers.decoders, 'decoder')}: read {fed['read']:.0%}, decode {fed['decode']:.0%}"
    )
    if device >= BUSY:
        by, advice = "forward", "more devices make it faster, or a lower precision"
    elif sum(fed.values()) < BUSY:
        by, advice = "transfer", "neither is busy: too few or too unequal shards, or too small an object store"
    elif fed["read"] > fed["decode"]:
        by, advice = "read", "storage is slow to answer: bring input and cluster nearer to each other"
    else:
        add = max(1, needed - round(workers.decoders * workers.cpus_per_decoder / workers.actors))
        by, advice = "decode", f"add {add} CPUs per device; about {needed} keep one busy"
    return Bound(by=by, shares=shares, says=f"bound by {by} ({figures}): {advice}")


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
