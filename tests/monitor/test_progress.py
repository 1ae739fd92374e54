"""What a running job shows: one live line on a terminal, log lines elsewhere, the counts in both."""

import io
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lora_embed.entries import Entry
from lora_embed.monitor import progress
from lora_embed.monitor.progress import Progress, say
from lora_embed.monitor.stages import Workers
from lora_embed.schema import ChunkHead, Shard


def shards(*sizes: int) -> list[Shard]:
    found = []
    for number, size in enumerate(sizes):
        name = f"{number}.tar"
        files = (Entry(path=name, size=size, etag="1"),)
        found.append(Shard(id=f"s{number}", name=name, prefix=name, kind="tar", root="/r", files=files))
    return found


def chunk(shard: int, samples: int, rejects: int = 0, *, last: bool = False) -> ChunkHead:
    reasons = {"empty": rejects} if rejects else {}
    return ChunkHead(shard_id=f"s{shard}", shard_name=f"{shard}.tar", prefix="", samples=samples, reasons=reasons, last=last)


def a_console(*, terminal: bool, width: int = 160) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=width, highlight=False, soft_wrap=True), written


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def clock_at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let that many seconds go by at once."""
    now = time.monotonic() + seconds
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))


@pytest.mark.parametrize("width", [160, 50])
def test_a_terminal_shows_one_live_line_and_then_the_summary(width: int) -> None:
    console, written = a_console(terminal=True, width=width)
    with Progress(shards(100, 100), Workers(actors=1), console) as shown:
        wait_for(lambda: "waiting for the first chunk of images …" in written.getvalue())
        shown.add(chunk(0, 4, last=True))
        wait_for(lambda: "4 samples" in written.getvalue())
        shown.add(chunk(1, 2, last=True))
    assert [line.partition(" · ")[0] for line in screen(written.getvalue())] == ["6 samples"]


def test_elsewhere_log_lines_come_at_an_interval_and_the_summary_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.05)
    console, written = a_console(terminal=False)
    with Progress(shards(100, 100), Workers(actors=1), console) as shown:
        shown.add(chunk(0, 4, last=True))
        wait_for(lambda: written.getvalue().count("\n") >= 3)
        shown.add(chunk(1, 2, last=True))
    *logged, summary = written.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d [046] samples · ", line) for line in logged)
    assert summary.startswith("6 samples · ")
    assert "\x1b" not in written.getvalue()


def test_a_log_line_is_written_no_oftener_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 60.0)
    console, written = a_console(terminal=False)
    started = time.monotonic()
    with Progress(shards(100), Workers(actors=1), console) as shown:
        for _ in range(1000):
            shown.add(chunk(0, 1))
    assert written.getvalue().count("\n") == 1
    assert time.monotonic() - started < 5  # and the end waits for no interval


def test_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Progress(shards(300, 100, 0), Workers(actors=1), a_console(terminal=False)[0])
    shown.add(chunk(0, 1500, rejects=20))
    shown.add(chunk(0, 500, last=True))
    shown.add(ChunkHead(shard_id="s1", shard_name="1.tar", prefix="", error="shards/1.tar: incomplete tar"))
    shown.add(chunk(2, 0, last=True))
    assert (shown.here.samples, shown.here.vectors, shown.here.rejects.total()) == (2000, 1980, 20)
    assert (shown.here.shards_done, shown.here.shards_failed) == (2, 1)
    clock_at(monkeypatch, 100.0)
    line = shown.line()
    assert line == "2,000 samples · 20.0 images/s · 2/3 shards, 1 failed · 20 rejects · 1:40 elapsed · about 0:33 left"


def test_the_time_left_is_told_once_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Progress(shards(100, 300), Workers(actors=1), a_console(terminal=False)[0])
    shown.add(chunk(0, 4))
    assert "left" not in shown.line()  # no shard is through: nothing to reckon with
    shown.add(chunk(0, 4, last=True))
    clock_at(monkeypatch, 1800.0)
    assert shown.line().endswith(" · 30:00 elapsed · about 1:30:00 left")
    shown.add(chunk(1, 4, last=True))
    assert shown.line().endswith(" · 30:00 elapsed")


@pytest.mark.parametrize(("width", "rest"), [
    (200, " · 20.0 images/s · 1/2 shards · 20 rejects · 1:40 elapsed · about 5:00 left · bound by decode"),
    (80, " · 20.0 images/s · 1/2 shards · 20 rejects · about 5:00 left"),
    (60, " · 20.0 images/s · 1/2 shards · about 5:00 left"),
    (30, ""),
])  # fmt: skip
def test_the_live_line_fits_its_terminal_and_keeps_the_time_left(
    monkeypatch: pytest.MonkeyPatch, width: int, rest: str
) -> None:
    shown = Progress(shards(100, 300), Workers(actors=1), a_console(terminal=False)[0])
    shown.add(replace(chunk(0, 2000, rejects=20, last=True), seconds={"decode": 1e-6}))
    clock_at(monkeypatch, 100.0)
    assert shown.line(width) == ("2,000 samples" + rest if rest else "1/2 shards · about 5:00 left")
    assert shown.line().endswith("about 5:00 left · bound by decode")


def test_a_burst_of_late_chunks_shows_no_share_above_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Progress(shards(100, 100), Workers(actors=2), a_console(terminal=False)[0])
    for _ in range(20):
        stamps = {"decode": time.time() - 2.0, "write": time.time()}
        shown.add(replace(chunk(0, 100), seconds={"decode": 3.0, "forward": 1.0, "write": 1.0}, ended=stamps))
    bound = shown.bound()
    assert sum(bound.shares.values()) == pytest.approx(1.0)
    assert bound.shares["decode"] == pytest.approx(0.6, abs=0.01)


def test_the_bound_is_measured_while_workers_work() -> None:
    """The start before and Ray's end after do not count as idle."""
    shown = Progress(shards(100), Workers(actors=1), a_console(terminal=False)[0])
    time.sleep(0.4)
    shown.add(replace(chunk(0, 100), seconds={"decode": 0.2}, ended={"write": time.time()}))
    time.sleep(0.4)
    assert shown.bound().shares["decode"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_summary_comes_even_when_the_run_fails(terminal: bool) -> None:
    console, written = a_console(terminal=terminal)

    def fail() -> None:
        with Progress(shards(100), Workers(actors=1), console) as shown:
            shown.add(chunk(0, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert screen(written.getvalue())[-1].startswith("3 samples")


def test_what_is_said_goes_to_stderr_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"[bold]{tmp_path}[/bold] " + "x" * 300)
    assert capsys.readouterr() == ("", f"[bold]{tmp_path}[/bold] " + "x" * 300 + "\n")


def screen(text: str) -> list[str]:
    """The lines that stand on a terminal in the end, the last one without its newline."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece != "\r" and not piece.startswith("\x1b"):
            lines[row] = piece
    return [line for line in lines if line]
