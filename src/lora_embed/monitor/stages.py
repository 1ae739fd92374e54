"""Measure how long each stage of a run takes, over time, and find the stage that limits the speed."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

STAGES = ("read", "decode", "forward", "write")
READING_EVERY_S, MOST_READINGS = 2.0, 240
BUSY = 0.85  # if a kind of worker is busy for at least this share of the time, all others wait for it
T = TypeVar("T")


class Stopwatch:
    """Counts seconds of wall clock by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes, also if it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def timed(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time that it takes to get them counts for the stage."""
        iterator = iter(items)
        while True:
            with self.timing(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Return the seconds counted so far, and start again from zero."""
        seconds_by_stage, self.seconds = self.seconds, {}
        return seconds_by_stage


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The progress of a run at one moment: samples, and the workers' seconds by stage, since it began."""

    elapsed_s: float
    samples: int
    seconds: dict[str, float] = field(default_factory=dict)


class Timeline:
    """Readings of a run every few seconds. When there are too many, every second one is dropped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._every_s = READING_EVERY_S
        self.now = Reading(elapsed_s=0.0, samples=0)
        self._kept = [self.now]

    def add(self, samples: int, seconds: Mapping[str, float]) -> None:
        """Count samples that a worker has finished, and the seconds it spent."""
        spent = dict(self.now.seconds)
        add_seconds(spent, seconds)
        self.now = Reading(elapsed_s=self._clock() - self._began, samples=self.now.samples + samples, seconds=spent)
        if self.now.elapsed_s - self._kept[-1].elapsed_s >= self._every_s:
            self._kept = [*self._kept, self.now]  # a new list, since a copy of this timeline shares the old one
        if len(self._kept) > MOST_READINGS:
            self._kept, self._every_s = self._kept[::2], self._every_s * 2

    def readings(self) -> tuple[Reading, ...]:
        """All readings, from zero to the latest."""
        last = () if self._kept[-1] is self.now else (self.now,)
        return (*self._kept, *last)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many workers run at once: actors, and tasks that read and decode (0 if the actors do that as well)."""

    actors: int
    decoders: int = 0
    cpus_per_decoder: float = 1.0

    @property
    def readers(self) -> int:
        """Number of workers that read shards at the same time."""
        return self.decoders or self.actors


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What limits a run's speed: a stage, "transfer" between stages, or "start" if too little was done to know."""

    by: str
    shares: dict[str, float]  # share of its workers' time that each stage takes
    says: str


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Add the seconds of each stage to `total`, in place."""
    for stage, seconds in more.items():
        total[stage] = total.get(stage, 0.0) + seconds
    return total


def seconds_an_image(seconds: Mapping[str, float], samples: int, workers: Workers) -> float:
    """Seconds of wall clock per image if no worker ever waits, from the seconds that these workers spent on the samples."""
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    if not workers.decoders:
        return sum(spent.values()) / workers.actors / max(samples, 1)
    feeding = (spent["read"] + spent["decode"]) / workers.readers
    return max(feeding, spent["forward"] / workers.actors) / max(samples, 1)


def find_bound(seconds: Mapping[str, float], elapsed: float, workers: Workers) -> Bound:
    """Find what limits a run whose workers together spent these seconds by stage, in `elapsed` seconds of wall clock."""
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    if elapsed <= 0 or not sum(spent.values()):
        return Bound(by="start", shares={}, says="too little was embedded to say what limits the speed")
    return _bound_apart(spent, elapsed, workers) if workers.decoders else _bound_together(spent, elapsed, workers)


def _bound_together(spent: dict[str, float], elapsed: float, workers: Workers) -> Bound:
    """For actors that do all stages one after the other: the longest stage is the limit."""
    shares = {stage: seconds / (elapsed * workers.actors) for stage, seconds in spent.items()}
    idle = max(0.0, 1 - sum(shares.values()))
    by = max(shares, key=lambda stage: shares[stage])
    if idle > max(0.3, shares[by]):
        by, advice = "transfer", "actors wait for work: too few shards, shards of unequal size, or other work on these CPUs"
    else:
        advice = {
            "read": "the input's storage is slow: run the cluster in the same region, or use more CPUs",
            "decode": "twice the CPUs halve the time; a GPU hardly helps",
            "forward": "use a GPU, or more CPUs",
            "write": "the table's storage is slow: use storage in the cluster's region, or set chunk_size larger",
        }[by]
    figures = ", ".join(f"{stage} {share:.0%}" for stage, share in [*shares.items(), ("idle", idle)])
    says = f"bound by {by} ({_of(workers.actors, 'actor')}: {figures}): {advice}"
    return Bound(by=by, shares=shares | {"idle": idle}, says=says)


def _bound_apart(spent: dict[str, float], elapsed: float, workers: Workers) -> Bound:
    """For actors that hold a device and are fed by decoders: either the devices are busy, or the decoders are too slow."""
    device = spent["forward"] / (elapsed * workers.actors)
    fed = {stage: spent[stage] / (elapsed * workers.decoders) for stage in ("read", "decode")}
    shares = {"forward": device} | fed
    feeding = (spent["read"] + spent["decode"]) * workers.cpus_per_decoder
    needed = math.ceil(feeding / spent["forward"]) if spent["forward"] else 1
    figures = (
        f"devices busy {device:.0%}; {_of(workers.decoders, 'decoder')}: read {fed['read']:.0%}, decode {fed['decode']:.0%}"
    )
    if device >= BUSY:
        by, advice = "forward", "use more devices, or a lower precision"
    elif sum(fed.values()) < BUSY:
        by, advice = "transfer", "neither is busy: too few shards, shards of unequal size, or too small an object store"
    elif fed["read"] > fed["decode"]:
        by, advice = "read", "the input's storage is slow: run the cluster in the same region"
    else:
        add = max(1, needed - round(workers.decoders * workers.cpus_per_decoder / workers.actors))
        by, advice = "decode", f"add {add} CPUs per device; about {needed} CPUs keep one device busy"
    return Bound(by=by, shares=shares, says=f"bound by {by} ({figures}): {advice}")


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
