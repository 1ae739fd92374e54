"""Measure how long each stage of a run takes, and find the stage that limits the speed."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from lora_embed.text import number_of

STAGES = ("read", "decode", "forward", "write")
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
class Workers:
    """How many workers run at once: actors, and tasks that read and decode (0 if the actors do that as well)."""

    actors: int
    decoders: int = 0
    cpus_per_decoder: float = 1.0

    @property
    def readers(self) -> int:
        """Number of workers that read shards at the same time."""
        return self.decoders or self.actors

    @property
    def writers(self) -> int:
        """Number of actors that only write parts: where decoders feed the actors, one for each actor."""
        return self.actors if self.decoders else 0

    @property
    def total(self) -> int:
        return self.actors + self.decoders + self.writers

    def least_seconds(self, spent: Mapping[str, float]) -> float:
        """The shortest time of wall clock in which these workers can spend these seconds by stage."""
        if not self.decoders:
            return sum(spent.get(stage, 0.0) for stage in STAGES) / self.actors
        feeding = (spent.get("read", 0.0) + spent.get("decode", 0.0)) / self.decoders
        return max(feeding, spent.get("forward", 0.0) / self.actors, spent.get("write", 0.0) / self.writers)


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
    """Find what limits a run whose workers together spent these seconds by stage, in `elapsed` seconds of wall clock.

    Clocks of several nodes may differ. If `elapsed` is shorter than the work can have taken, the shortest possible time
    counts instead, so that no share is above 100 %.
    """
    spent = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    if elapsed <= 0 or not sum(spent.values()):
        return Bound(by="start", shares={}, says="too little was embedded to say what limits the speed")
    elapsed = max(elapsed, workers.least_seconds(spent))
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
    says = f"bound by {by} ({number_of(workers.actors, 'actor')}: {figures}): {advice}"
    return Bound(by=by, shares=shares | {"idle": idle}, says=says)


def _bound_apart(spent: dict[str, float], elapsed: float, workers: Workers) -> Bound:
    """For actors that hold a device and are fed by decoders: either the devices are busy, or the decoders are too slow."""
    device = spent["forward"] / (elapsed * workers.actors)
    fed = {stage: spent[stage] / (elapsed * workers.decoders) for stage in ("read", "decode")}
    shares = {"forward": device} | fed
    feeding = (spent["read"] + spent["decode"]) * workers.cpus_per_decoder
    needed = math.ceil(feeding / spent["forward"]) if spent["forward"] else 1
    decoders = number_of(workers.decoders, "decoder")
    figures = f"devices busy {device:.0%}; {decoders}: read {fed['read']:.0%}, decode {fed['decode']:.0%}"
    if device >= BUSY:
        by, advice = "forward", "use more devices, or a lower precision"
    elif sum(fed.values()) < BUSY:
        by, advice = "transfer", "neither is busy: too few shards, shards of unequal size, or too small an object store"
    elif fed["read"] > fed["decode"]:
        by, advice = "read", "the input's storage is slow: run the cluster in the same region"
    else:
        add = max(1, needed - round(workers.decoders * workers.cpus_per_decoder / workers.actors))
        keep = "keeps" if needed == 1 else "keep"
        by, advice = (
            "decode",
            f"add {number_of(add, 'CPU')} per device; about {number_of(needed, 'CPU')} {keep} one device busy",
        )
    return Bound(by=by, shares=shares, says=f"bound by {by} ({figures}): {advice}")
