"""Thirty nights of one table: shards and adapters come and go, images are forgotten, versions rolled back.

Each of these may be overtaken by another, stall between its version and the hint while others publish and forget, or die by
SIGKILL at any of its writes; the clocks of their machines differ by minutes from each other's and the table's. After each,
every retained version is read by plain pyarrow and held against a model that knows only what was done, and a reader opens
the current version, which never moves backwards.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs import embed_here, job_of, run_here, tiny_recipe
from lora_embed.chain import pipeline
from lora_embed.errors import EncoderError
from month_world import GRACE_DAYS, KEEP, Month, Step, embedding, forgetting, rolling_back, shards_of
from old_pillow import resize_columns_first

NIGHTS, THROUGH_RAY, OTHER_PILLOW = 30, (4, 13, 22), (2, 7, 11, 17, 25)
CHILD_S = 120.0  # for a step in a child process, before it counts as hanging


def do(month: Month, step: Step, *, alone: bool = True) -> str:
    """Do it, hold the table against the model, and say what became of it."""
    with contextlib.nullcontext() if month.night in THROUGH_RAY else clock_of_its_own(month.rng):
        what = step.act()
    assert what != "incomplete" or not alone
    month.note(step.made)
    month.check()
    if what == "published" and alone:
        month.check_cleared()
    return what


@contextlib.contextmanager
def clock_of_its_own(rng: random.Random) -> Iterator[None]:
    """A machine whose clock is up to ten minutes off; the table's disk goes by another one. Not for Ray, which has none."""
    off_s, right = rng.uniform(-600, 600), time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Shifted":
            return cls.fromtimestamp(right() + off_s, tz)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + off_s)
        for module in ("text", "monitor.runs", "monitor.progress"):
            patch.setattr(f"lora_embed.{module}.datetime", Shifted)
        yield


def run_on_two_pillows(month: Month) -> str:
    """The night's run on two nodes, one of which resizes as Pillow 12 did: if it has something to do, the run stops."""

    def embed(items: Any, *how: Any) -> Iterator[Any]:
        yield from embed_here(items[::2], *how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image.Image, "resize", resize_columns_first)
            yield from embed_here(items[1::2], *how)

    step, before = embedding(month), len(month.manifests())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "embed_items", embed)
        try:
            return do(month, step)
        except EncoderError as error:
            if "resize tall" not in str(error):
                raise
    assert len(month.manifests()) == before
    month.check()
    return "stopped by another Pillow"


Moment = tuple[str, int, bool]  # the n-th write from the first one on whose path has this in it; before it or after it


def draw_moment(rng: random.Random) -> Moment:
    """Any, and often one around the manifest."""
    since, most = rng.choice([("", 10), ("", 10), ("/data/", 4), ("/versions/", 1), ("/versions/", 6)])
    return since, rng.randint(1, most), rng.random() < 0.5


@contextlib.contextmanager
def interrupted(table: Path, moment: Moment, does: Callable[[list[str]], object]) -> Iterator[None]:
    """At that moment something happens; it is given the table's writes up to there.

    A write is a call of the operating system: objects are written aside, then linked or moved to their place.
    """
    since, at, after = moment
    writes: list[str] = []
    first = 0

    def watched(name: str, right: Callable[..., None], *arguments: Any) -> None:
        nonlocal first
        if not str(arguments[-1]).startswith(f"{table}/"):
            return right(*arguments)
        writes.append(f"{name} {str(arguments[-1]).removeprefix(f'{table}')}")
        first = first or (len(writes) if since in writes[-1] else 0)
        is_now = first > 0 and len(writes) == first + at - 1
        if is_now and not after:
            does(list(writes))
        right(*arguments)
        if is_now and after:
            does(list(writes))
        return None

    with pytest.MonkeyPatch.context() as patch:
        for name in ("link", "replace", "remove"):
            patch.setattr(os, name, partial(watched, name, getattr(os, name)))
        yield


def kill(month: Month, step: Step) -> str:
    """Do it in a child process that dies by SIGKILL at some moment, if it gets there; where it died, by its manifest.

    A reader sees nothing of it, and what was committed stays.
    """
    moment, last_words = draw_moment(month.rng), month.folder / "writes"

    def die(writes: list[str]) -> None:
        last_words.write_text("\n".join(writes))
        os.kill(os.getpid(), signal.SIGKILL)

    def live() -> None:
        with interrupted(month.table, moment, die), clock_of_its_own(month.rng):
            step.act()

    child = multiprocessing.get_context("fork").Process(target=live)
    child.start()
    child.join(CHILD_S)
    code = child.exitcode
    child.kill()
    assert code in (0, -signal.SIGKILL), f"exit code {code}, to be killed at {moment}"
    month.note(step.made)
    month.check()
    if code == 0:
        return f"{step.name} not killed"
    writes = last_words.read_text().splitlines()
    done = writes if moment[2] else writes[:-1]
    held = {shard for m in (month.manifests("retired") | month.manifests()).values() for shard in shards_of(m)}
    parts = [month.table / write.removeprefix("link /") for write in done if write.startswith("link /staging/")]
    lost = [part for part in parts if not part.exists() and (part.parts[-3], part.name.split("-")[0]) not in held]
    assert lost == [], "it was committed, and no version holds it"
    manifests = [number for number, write in enumerate(writes, 1) if write.startswith("link /versions/")]
    return f"{step.name} killed {'before' if not manifests else 'at' if manifests[0] == len(writes) else 'after'} its manifest"


def spend(month: Month) -> Iterator[str]:
    """One night, without a cluster; yields what happens."""
    step, other = (kind(month) for kind in month.rng.choices([embedding, forgetting, rolling_back], [6, 2, 2], k=2))
    how = month.rng.choice(["undisturbed", "killed", "killed", "overtaken", "stalled"])
    if how == "killed":
        for _ in range(month.rng.randint(1, 2)):
            yield kill(month, step)
        if month.rng.random() < 0.5:
            month.go_on()
        if month.rng.random() < 0.5:
            yield do(month, other)
    elif how == "overtaken":

        def overtake(_: list[str]) -> None:
            month.note(step.made)
            overtaken.append(f"overtaken: {do(month, other)}")

        overtaken: list[str] = []
        with interrupted(month.table, draw_moment(month.rng), overtake):
            what = do(month, step, alone=False)
        yield from overtaken
        if what != "incomplete":
            yield what
            return
    elif how == "stalled":
        yield from stall(month, step)
    yield do(month, step)
    month.check_hint()


def stall(month: Month, step: Step) -> Iterator[str]:
    """Between its version and the hint, while others publish, forget, which leaves a gap, and publish again."""
    meanwhile: list[str] = []

    def others(_: list[str]) -> None:
        month.note(step.made)
        for kind in (embedding, forgetting, embedding):
            month.change_shards()
            meanwhile.append(f"while another stalled: {do(month, kind(month))}")

    with interrupted(month.table, ("/CURRENT", 1, False), others):
        what = do(month, step, alone=False)
    yield from meanwhile
    yield f"{what} after a stall" if meanwhile else what


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 7))])
def test_a_month(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    recipe = tiny_recipe(tmp_path)
    retain = {"versions": KEEP, "grace_days": GRACE_DAYS}
    options = {"chunk_size": 4, "max_rejects": 1.0, "max_removed": 1.0, "retain": retain}
    month = Month(tmp_path, job_of(tmp_path, recipe, tmp_path / "shards", **options), random.Random(seed))
    happened: list[str] = []
    for night in range(NIGHTS):
        month.go_on(changes_adapter=0.9 if happened[-1:] == ["held back"] else 0.2)
        with monkeypatch.context() as patch:
            if night not in THROUGH_RAY:
                run_here(patch)
            if month.shards and night in OTHER_PILLOW:
                happened.append(run_on_two_pillows(month))
            if month.shards:
                happened += spend(month) if night not in THROUGH_RAY else [do(month, embedding(month))]
        month.sleep()
    counts = dict(sorted(Counter(happened).items()))
    print(f"\n{NIGHTS} nights, {len(month.published)} versions, {len(month.gone)} images forgotten: {counts}")
    for what in ("published", "forgotten", "rolled back", "while another stalled: forgotten", "stopped by another Pillow"):
        assert any(what in name for name in counts), what
    assert all(any(f"killed {where} its manifest" in what for what in counts) for where in ("before", "at", "after"))
    assert len(month.published) > NIGHTS / 3
