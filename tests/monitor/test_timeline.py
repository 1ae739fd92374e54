"""What workers did is counted when they did it, however late and in whatever bursts a run hears of it."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_embed.monitor.record import RunRecord, bins_of
from lora_embed.monitor.stages import STAGES, Workers
from lora_embed.monitor.timeline import MOST_PERIODS, Reading, Timeline
from lora_embed.report.run import busy_chart, phases, rate_chart, run_page
from lora_embed.text import span

EPOCH = 1_800_000_000.0  # seconds since 1970 when a run of these tests began
LENGTHS = (3.0, 10.0, 60.0, 7200.0)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk that a worker made, and when the run heard of it."""

    arrived_s: float
    began_s: float
    ended_s: float
    samples: int
    seconds: dict[str, float]
    ended: dict[str, float]


def chunks_of_actors(draw: random.Random, workers: Workers, length_s: float, skew_s: float) -> Iterator[Chunk]:
    """Chunks of actors that do all stages; as in Ray, those of a block arrive together, when the block is done."""
    for _ in range(workers.actors):
        now_s, skew = length_s * draw.uniform(0, 0.6), draw.uniform(-skew_s, skew_s)
        while now_s < length_s:
            block = []
            for _ in range(draw.choice((1, 1, 3, 20))):
                seconds = {stage: length_s * draw.choice((0.0, 0.001, 0.01, 0.1)) * draw.random() for stage in STAGES}
                if now_s + sum(seconds.values()) > length_s or not any(seconds.values()):
                    break
                began_s, now_s = now_s, now_s + sum(seconds.values())
                block.append((began_s, now_s, draw.randint(1, 512), seconds))
            if not block:
                break
            arrived_s = now_s + draw.choice((0.0, 0.05, 0.2)) * draw.random()
            for began_s, ended_s, samples, seconds in block:
                stamp = {"write": EPOCH + ended_s + skew}
                yield Chunk(
                    arrived_s=arrived_s, began_s=began_s, ended_s=ended_s, samples=samples, seconds=seconds, ended=stamp
                )
            now_s += length_s * draw.choice((0.0, 0.0, 0.3)) * draw.random()


def chunks_of_devices(draw: random.Random, workers: Workers, length_s: float, skew_s: float) -> Iterator[Chunk]:
    """Chunks that decoders hand to actors on devices, which hand them to writers."""
    free = {
        name: [0.1 * length_s] * number for name, number in zip("dfw", (workers.decoders, *[workers.actors] * 2), strict=True)
    }
    skew = [draw.uniform(-skew_s, skew_s) for _ in range(3)]
    while True:
        spent = {stage: length_s * draw.choice((0.001, 0.01, 0.1)) * draw.random() for stage in STAGES}
        moments, before_s = [], 0.0
        for kind, seconds in (("d", spent["read"] + spent["decode"]), ("f", spent["forward"]), ("w", spent["write"])):
            first = min(range(len(free[kind])), key=lambda number: free[kind][number])
            before_s = free[kind][first] = max(before_s, free[kind][first]) + seconds
            moments.append(before_s)
        if before_s > length_s:
            return
        stamps = [EPOCH + moment + late for moment, late in zip(moments, skew, strict=True)]
        ended = dict(zip(("decode", "forward", "write"), stamps, strict=True))
        began_s = moments[0] - spent["read"] - spent["decode"]
        arrived_s = before_s + 0.1 * draw.random()
        yield Chunk(
            arrived_s=arrived_s, began_s=began_s, ended_s=before_s, samples=draw.randint(1, 512), seconds=spent, ended=ended
        )


def timeline_of(chunks: list[Chunk]) -> Timeline:
    now_s = 0.0
    timeline = Timeline(lambda: now_s, lambda: EPOCH + now_s)
    for chunk in sorted(chunks, key=lambda chunk: chunk.arrived_s):
        now_s = chunk.arrived_s
        timeline.add(chunk.samples, chunk.seconds, chunk.ended)
    return timeline


def record_of(timeline: Timeline, workers: Workers) -> RunRecord:
    return RunRecord(
        run_id="20261127T010203Z-abcdef", started="2026-11-27T01:02:03+00:00", outcome="not published", layout={},
        job={"table": "t", "input": ["x"], "recipe": "r.yaml"}, encoder={"space_id": "0", "recipe_id": "1", "dimension": 8},
        embedded=timeline.now.samples, stages=timeline.now.seconds, bound={}, readings=timeline.readings(),
        workers={"actors": workers.actors, "decoders": workers.decoders, "cpus_per_decoder": 1.0},
    )  # fmt: skip


@given(
    seed=st.integers(0, 2**32),
    workers=st.sampled_from([Workers(actors=1), Workers(actors=2), Workers(actors=9), Workers(actors=2, decoders=5)]),
    length_s=st.sampled_from(LENGTHS),
    skew_s=st.sampled_from([0.0, 0.0, 0.5, 300.0]),
)
@settings(max_examples=150, deadline=None)
def test_no_figure_is_more_than_the_workers_can_have_done(seed: int, workers: Workers, length_s: float, skew_s: float) -> None:
    make = chunks_of_devices if workers.decoders else chunks_of_actors
    chunks = list(make(random.Random(seed), workers, length_s, skew_s))
    timeline = timeline_of(chunks)
    record, bins = record_of(timeline, workers), bins_of(record_of(timeline, workers))
    if not bins:
        return
    last_s = timeline.now.elapsed_s
    assert [period.start_s for period in bins] == [0.0, *(period.end_s for period in bins[:-1])]
    assert bins[-1].end_s == last_s
    assert sum(period.samples for period in bins) == sum(chunk.samples for chunk in chunks)
    for period in bins:
        length = period.end_s - period.start_s
        assert period.bound.by == "start" or length >= 2.0 - 1e-5
        assert sum(period.busy.values()) <= workers.total * (1 + 1e-5)
        assert all(0 <= share <= 1 + 1e-5 for share in period.bound.shares.values())
        made = [chunk for chunk in chunks if chunk.began_s < period.end_s and chunk.ended_s > period.start_s]
        if not skew_s:
            assert period.samples <= sum(chunk.samples for chunk in made) + 1
        assert period.samples >= 0
    for stage, spent in timeline.now.seconds.items():
        assert sum(period.busy.get(stage, 0.0) * (period.end_s - period.start_s) for period in bins) == pytest.approx(spent)
    busy = [period for period in bins if period.bound.by != "start"]
    assert max(point.y for point in rate_chart(busy).series[0].points) * 2.0 <= timeline.now.samples + 1
    assert max(sum(stack.heights.values()) for stack in busy_chart(bins).stacks) <= workers.total * (1 + 1e-5)
    ends = [end_s for _, end_s in phases(busy)]
    assert len({span(end_s) for end_s in ends}) == len(ends)
    assert all(first != second for first, second in pairwise(re.findall(r"until ([\d:]+)", run_page(record))))


@pytest.mark.parametrize("length_s", LENGTHS)
def test_a_run_whose_chunks_all_arrive_at_its_end_is_drawn_as_it_was(length_s: float) -> None:
    """Two actors begin after a fifth of the run, and make chunks of 40 images; the run hears of them at the end."""
    each_s, chunks = 0.8 * length_s / 10, []
    for number in range(20):
        ended_s = 0.2 * length_s + (number // 2 + 1) * each_s
        seconds = {"read": 0.1 * each_s, "decode": 0.6 * each_s, "forward": 0.2 * each_s, "write": 0.1 * each_s}
        ended = {"write": EPOCH + ended_s}
        chunks.append(
            Chunk(arrived_s=length_s, began_s=ended_s - each_s, ended_s=ended_s, samples=40, seconds=seconds, ended=ended)
        )
    record = record_of(timeline_of(chunks), Workers(actors=2))
    bins = bins_of(record)
    true_rate = 800 / (0.8 * length_s)
    before, *busy = bins
    assert (before.bound.by, before.samples, before.end_s) == ("start", 0, pytest.approx(0.2 * length_s))
    for period in busy:
        assert period.samples / (period.end_s - period.start_s) == pytest.approx(true_rate, abs=0.6)
        assert sum(period.busy.values()) == pytest.approx(2.0)
        assert period.bound.by == "decode"
    text = run_page(record)
    assert f"Bound by decode until {span(length_s)}.</p>" in text
    assert (f"Work began after {span(0.2 * length_s)}. Bound" in text) == (length_s > 3)
    assert ("images/s</text>" in text) == (length_s > 3)


def test_a_run_of_a_second_shows_no_charts() -> None:
    timeline = timeline_of(list(chunks_of_actors(random.Random(1), Workers(actors=2), 1.0, 0.0)))
    record = record_of(timeline, Workers(actors=2))
    assert timeline.now.samples > 0
    assert bins_of(record) == []
    assert "images/s</text>" not in run_page(record)


def test_workers_whose_clock_is_off_count_within_the_run() -> None:
    for skew_s in (-500.0, 500.0):
        chunk = Chunk(
            arrived_s=60.0, began_s=20.0, ended_s=59.0, samples=9, seconds={"forward": 39.0},
            ended={"forward": EPOCH + 59.0 + skew_s},
        )  # fmt: skip
        timeline = timeline_of([chunk])
        assert timeline.readings()[-1] == Reading(elapsed_s=60.0, samples=9, seconds={"forward": 39.0})
        assert 0 <= (timeline.began_s or 0.0) <= 60


def test_a_timeline_keeps_few_readings_of_a_long_run_and_its_end() -> None:
    now = 0.0
    timeline = Timeline(lambda: now)
    for _ in range(10_000):
        now += 1.5
        timeline.add(100, {"decode": 1.0, "forward": 0.5})
    readings = timeline.readings()
    assert MOST_PERIODS / 2 < len(readings) <= MOST_PERIODS + 2
    assert readings[0] == Reading(elapsed_s=0.0, samples=0)
    assert readings[-1] == Reading(elapsed_s=15_000.0, samples=1_000_000, seconds={"decode": 10_000.0, "forward": 5_000.0})
    gaps = [after.elapsed_s - before.elapsed_s for before, after in pairwise(readings[1:-1])]
    assert max(gaps) < 3 * min(gaps)


def test_a_timeline_of_a_short_run_is_its_beginning_and_its_end() -> None:
    now = 0.0
    timeline = Timeline(lambda: now)
    assert timeline.readings() == (Reading(elapsed_s=0.0, samples=0),)
    now = 0.5
    timeline.add(12, {"forward": 0.4})
    began, ended = timeline.readings()[1:]
    assert (began.elapsed_s, began.samples) == (pytest.approx(0.1), 0)
    assert ended == Reading(elapsed_s=0.5, samples=12, seconds={"forward": 0.4})
