"""Record what a run's workers did, and when they did it, although their chunks arrive late and many at once.

Ray hands over the chunks of a block of shards when the whole block is done. So a chunk is not counted at the moment when it
arrives: its samples and seconds are spread over the time in which its worker made it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from lora_embed.monitor.stages import STAGES, add_seconds

PERIOD_S, MOST_PERIODS = 2.0, 240
SAMPLES = "samples"  # in a period, beside the seconds by stage


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The progress of a run at one moment: samples, and the workers' seconds by stage, since it began."""

    elapsed_s: float
    samples: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_zero(self) -> bool:
        return not self.samples and not any(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker did for one chunk without a break: seconds by stage, and when it began and ended."""

    seconds: dict[str, float]
    began_s: float
    ended_s: float

    @classmethod
    def until(cls, ended_s: float, seconds: dict[str, float], now_s: float) -> "Work":
        """Work that ended at a moment; a moment of another clock is moved to between the run's beginning and now."""
        ended_s = min(max(ended_s, 0.0), now_s)
        return cls(seconds=seconds, began_s=max(0.0, ended_s - sum(seconds.values())), ended_s=ended_s)


class Timeline:
    """The progress of a run by periods of a few seconds. When there are too many, each two are joined.

    `clock` counts seconds in this process. `wall` is the clock by which workers say when they finished a stage.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock, self._wall, self._zero = clock, wall, clock()
        self._period_s = PERIOD_S
        self._periods: list[dict[str, float]] = []
        self.now = Reading(elapsed_s=0.0, samples=0)
        self.began_s: float | None = None  # when the first worker began
        self._ended_s = 0.0  # when the last one ended

    def copy(self) -> "Timeline":
        """A timeline that does not change when this one does."""
        return copy.deepcopy(self)

    def add(self, samples: int, seconds: Mapping[str, float], ended: Mapping[str, float] | None = None) -> None:
        """Count the samples of a chunk that has arrived, and the seconds that its workers spent by stage.

        `ended` maps a stage to the time, in seconds since 1970, when its worker had finished the chunk. A stage that it does
        not name was done by the worker of the next stage that it names.
        """
        now_s = self._clock() - self._zero
        works = list(self._works(seconds, ended or {}, now_s))
        began_s = min((work.began_s for work in works), default=now_s)
        ended_s = max((work.ended_s for work in works), default=now_s)
        spent = add_seconds(dict(self.now.seconds), seconds)
        self.now = Reading(elapsed_s=now_s, samples=self.now.samples + samples, seconds=spent)
        self.began_s = began_s if self.began_s is None else min(self.began_s, began_s)
        self._ended_s = max(self._ended_s, ended_s)
        for work in works:
            self._spread(work.seconds, work.began_s, work.ended_s)
        self._spread({SAMPLES: samples}, began_s, ended_s)

    @property
    def worked_s(self) -> float:
        """Seconds from when the first worker began to when the last one ended."""
        return self._ended_s - (self.began_s or 0.0)

    def readings(self) -> tuple[Reading, ...]:
        """The progress at the beginning, when the first worker began, at the end of each period, and at the latest chunk."""
        zero = Reading(elapsed_s=0.0, samples=0)
        if self.began_s is None:
            return (zero,)
        readings, total = [zero], dict[str, float]()
        if self.began_s:
            readings.append(Reading(elapsed_s=self.began_s, samples=0))
        for number, period in enumerate(self._periods, 1):
            add_seconds(total, period)
            if self.began_s < (edge_s := number * self._period_s) < self.now.elapsed_s:
                seconds = {stage: spent for stage, spent in total.items() if stage != SAMPLES}
                readings.append(Reading(elapsed_s=edge_s, samples=round(total.get(SAMPLES, 0.0)), seconds=seconds))
        return (*readings, self.now)

    def _works(self, seconds: Mapping[str, float], ended: Mapping[str, float], now_s: float) -> Iterator[Work]:
        """The works of a chunk. Times of a worker's clock count by how long ago they were."""
        wall, of_worker = self._wall(), dict[str, float]()
        for stage in [*STAGES, *(stage for stage in seconds if stage not in STAGES)]:
            if stage in seconds:
                of_worker[stage] = seconds[stage]
            if of_worker and stage in ended:
                yield Work.until(now_s - (wall - ended[stage]), of_worker, now_s)
                of_worker = {}
        if of_worker:
            yield Work.until(now_s, of_worker, now_s)

    def _spread(self, amounts: Mapping[str, float], began_s: float, ended_s: float) -> None:
        """Divide amounts among the periods between two moments."""
        while ended_s >= MOST_PERIODS * self._period_s:
            self._join()
        first, last = int(began_s // self._period_s), int(ended_s // self._period_s)
        self._periods += [{} for _ in range(len(self._periods), last + 1)]
        for number in range(first, last + 1):
            edge_s = number * self._period_s
            within_s = min(ended_s, edge_s + self._period_s) - max(began_s, edge_s)
            share = within_s / (ended_s - began_s) if ended_s > began_s else 1.0
            add_seconds(self._periods[number], {name: amount * share for name, amount in amounts.items()})

    def _join(self) -> None:
        """Make each two periods one."""
        evens, odds = self._periods[::2], self._periods[1::2]
        self._periods = [add_seconds(dict(even), odd) for even, odd in zip_longest(evens, odds, fillvalue=dict[str, float]())]
        self._period_s *= 2
