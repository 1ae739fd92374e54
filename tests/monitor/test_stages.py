"""Where time goes, and the sentence that says what bounds a run."""

import re
import time

import pytest

from lora_embed.monitor.stages import Bound, Stopwatch, Workers, find_bound, seconds_an_image

TOGETHER, APART = Workers(actors=2), Workers(actors=2, decoders=8, cpus_per_decoder=1.0)


def test_a_stopwatch_adds_up_by_stage() -> None:
    clock = Stopwatch()
    for _ in clock.timed("read", (time.sleep(0.01) for _ in range(3))):
        with clock.timing("decode"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="bad"), clock.timing("write"):
        raise ValueError("bad")
    taken = clock.take()
    assert list(taken) == ["read", "decode", "write"]
    assert 0.03 <= taken["read"] < taken["decode"]
    assert taken["decode"] >= 0.06
    assert clock.seconds == {}


@pytest.mark.parametrize(
    ("seconds", "by"),
    [
        ({"read": 2, "decode": 10, "forward": 5, "write": 1}, "decode"),
        ({"read": 2, "decode": 5, "forward": 10, "write": 1}, "forward"),
        ({"read": 12, "decode": 5, "forward": 1, "write": 1}, "read"),
        ({"read": 1, "decode": 5, "forward": 1, "write": 12}, "write"),
        ({"read": 1, "decode": 2, "forward": 2, "write": 1}, "transfer"),
        ({}, "start"),
    ],
)
def test_actors_that_do_all_are_bound_by_what_takes_most(seconds: dict[str, float], by: str) -> None:
    assert find_bound(seconds, 10.0, TOGETHER).by == by


@pytest.mark.parametrize(
    ("seconds", "by", "says"),
    [
        ({"read": 5, "decode": 20, "forward": 19}, "forward", "use more devices"),
        ({"read": 8, "decode": 70, "forward": 6}, "decode", "add 9 CPUs per device; about 13 CPUs keep one device busy"),
        ({"read": 60, "decode": 15, "forward": 6}, "read", "storage is slow"),
        ({"read": 5, "decode": 15, "forward": 6}, "transfer", "neither is busy"),
    ],
)
def test_devices_are_bound_by_what_feeds_them(seconds: dict[str, float], by: str, says: str) -> None:
    bound = find_bound(seconds, 10.0, APART)
    assert bound.by == by
    assert says in bound.says


def test_the_sentence_has_the_figures() -> None:
    bound = find_bound({"read": 1, "decode": 12, "forward": 5, "write": 0.5}, 10.0, TOGETHER)
    assert bound == Bound(
        by="decode",
        shares={"read": 0.05, "decode": 0.6, "forward": 0.25, "write": 0.025, "idle": pytest.approx(0.075)},
        says="bound by decode (2 actors: read 5%, decode 60%, forward 25%, write 2%, idle 7%): "
        "twice the CPUs halve the time; a GPU hardly helps",
    )


def test_seconds_an_image() -> None:
    spent = {"read": 2.0, "decode": 6.0, "forward": 4.0, "write": 1.0}
    assert seconds_an_image(spent, 100, TOGETHER) == 0.065  # 13 s over 2 actors
    assert seconds_an_image(spent, 100, APART) == 0.02  # 4 s over 2 devices; 8 s over 8 decoders would be 0.01
    assert seconds_an_image({}, 0, TOGETHER) == 0.0


@pytest.mark.parametrize("workers", [TOGETHER, APART, Workers(actors=1)])
@pytest.mark.parametrize("elapsed", [1e-9, 0.1, 3.0, 100.0])
def test_no_share_is_above_all_of_the_time(workers: Workers, elapsed: float) -> None:
    bound = find_bound({"read": 5, "decode": 70, "forward": 19, "write": 4}, elapsed, workers)
    assert all(0 <= share <= 1 + 1e-9 for share in bound.shares.values())
    if not workers.decoders:
        assert sum(bound.shares.values()) == pytest.approx(1.0)
    assert all(int(figure) <= 100 for figure in re.findall(r"(\d+)%", bound.says))


def test_workers_are_counted_with_their_noun() -> None:
    assert "(1 actor: " in find_bound({"decode": 5}, 10.0, Workers(actors=1)).says
    assert "1 decoder: " in find_bound({"decode": 5}, 10.0, Workers(actors=1, decoders=1)).says
