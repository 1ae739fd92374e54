"""What a job says, always on stderr: lines for a person, one of them live on a terminal, or a JSON object a line.

As text a running job shows one live line on a terminal and a log line every ten seconds elsewhere. As JSON everything
that this process writes there is an object: what libraries log and a traceback, too.
"""

import enum
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_embed.monitor.effort import Effort
from lora_embed.monitor.stages import Bound, Workers, add_seconds, find_bound
from lora_embed.schema import ChunkStats, Shard
from lora_embed.text import in_lines, redacted, without_secrets

LOG_EVERY_S = 10.0
MOST_NAMED = 10  # failed shards that a log for persons names as they fail; the run's end names as many
ALWAYS = ("run_id", "table")  # of the facts of a run, those that stand in each of its objects
_STDERR = Console(stderr=True, highlight=False, soft_wrap=True)  # one, so that lines and a live line know of each other
_FACTS: dict[str, Any] = {}  # of the run in this process
_IS_JSON = threading.Event()


class LogFormat(enum.StrEnum):
    """How a command speaks."""

    TEXT = "text"
    JSON = "json"


def say(message: str, *, level: str = "info", event: str = "message", **facts: Any) -> None:
    """One line for a person, or one object with all facts; what is of level `debug` is said as JSON alone."""
    if _IS_JSON.is_set():
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        always = {name: _FACTS[name] for name in ALWAYS if name in _FACTS}
        _write(without_secrets({"time": now, "level": level, "event": event, "message": message} | always | facts))
    elif level != "debug":
        _STDERR.print(shown(message).replace("\n", "\n  "), markup=False)  # so that no name begins a line of its own


def shown(message: str) -> str:
    """A message without secrets, and without what names may hold to steer a terminal."""
    return in_lines(redacted(message).split("\n"))


def log_as(wanted: LogFormat) -> None:
    """Speak in that way from now on, about no run yet."""
    _FACTS.clear()
    logging.raiseExceptions = False  # Ray keeps logs of its own, and prints a traceback where their disk is full
    logging.lastResort = _SayingHandler(logging.WARNING)
    warnings.showwarning = _say_warning
    sys.excepthook = _say_uncaught
    threading.excepthook = lambda ended: _say_uncaught(ended.exc_type, ended.exc_value, ended.exc_traceback)
    if wanted is LogFormat.TEXT:
        _IS_JSON.clear()
        return
    if not logs_json():
        _relay_others()
    _IS_JSON.set()
    logging.basicConfig(handlers=[_SayingHandler()], level=logging.WARNING, force=True)


def logs_json() -> bool:
    return _IS_JSON.is_set()


def note(**facts: Any) -> None:
    """Remember what the last line of this run says; `run_id` and `table` stand in every object."""
    _FACTS.update(without_secrets(facts))


def noted() -> dict[str, Any]:
    """All that was noted of this process's run."""
    return dict(_FACTS)


class _SayingHandler(logging.Handler):
    """Python's logging, which libraries use, as the same lines or objects."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), level=record.levelname.lower(), event="log", logger=record.name)


def _relay_others() -> None:
    """What is not written by Python, such as by Ray's own core, becomes objects on its way to stderr."""
    ours = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    theirs, end = os.pipe()
    os.dup2(end, 2)
    os.close(end)
    sys.stderr = ours

    def relay() -> None:
        with os.fdopen(theirs, encoding="utf-8", errors="backslashreplace") as lines:
            for line in filter(None, map(str.strip, lines)):
                say(line, level="warning", event="log", logger="stderr")

    threading.Thread(target=relay, daemon=True).start()


def _say_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """A warning of Python's, whose words may be those of a file that somebody else wrote."""
    said = f"{filename}:{lineno}: {category.__name__}: {message}"
    say(said, level="warning", event="log", logger="py.warnings")


def _say_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    message = f"{kind.__name__}: {error}" if _IS_JSON.is_set() else text
    say(message, level="critical", event="crash", traceback=text)


def _write(fields: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(fields, default=str) + "\n")  # in one call, as threads speak, too
    sys.stderr.flush()


class Progress:
    """Counts what the chain reports; a context manager that shows the counts while it is open."""

    def __init__(
        self, shards: list[Shard], workers: Workers, console: Console | None = None, effort: Effort | None = None
    ) -> None:
        self._workers = workers
        self._effort = effort or Effort()
        self.seconds: dict[str, float] = {}  # by stage, summed over the workers
        self._shards = {shard.id: shard for shard in shards}
        self._size = sum(shard.size for shard in shards)
        self._console = console or _STDERR
        self._started = time.monotonic()
        self._first: float | None = None
        self._ended = threading.Event()
        self.samples = self.vectors = self.rejects = self.shards_done = self.shards_failed = 0
        self._bytes_done = 0
        self._is_live = self._console.is_terminal and not logs_json()
        self._live = Live(get_renderable=self._text, console=self._console, refresh_per_second=4, transient=True)
        self._logger = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> "Progress":
        if self._is_live:
            self._live.start()
        else:
            self._logger.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._effort.bound = self.bound()
        self._ended.set()
        if self._is_live:
            self._live.stop()
        else:
            self._logger.join()
        self._show(self.line())
        if self.seconds and not logs_json():
            self._console.print(self.bound().says)

    def add(self, stats: ChunkStats) -> None:
        """Count one row of the chain's end."""
        self._first = self._first or time.monotonic() - sum(stats.seconds.values())  # when the first worker began
        self.seconds = add_seconds(dict(self.seconds), stats.seconds)  # anew: the thread of the live line may be reading it
        self._effort.add(stats)
        self._effort.bound = self.bound()
        if stats.error:
            self.shards_failed += 1
            self._tell_failure(stats)
            return
        self.samples += stats.samples
        self.vectors += stats.vectors
        self.rejects += stats.rejects
        if stats.rejects:
            self._tell_rejects(stats)
        if stats.last:
            self.shards_done += 1
            self._bytes_done += self._shards[stats.shard_id].size if stats.shard_id in self._shards else 0

    def _tell_failure(self, stats: ChunkStats) -> None:
        level = "warning" if self.shards_failed <= MOST_NAMED else "debug"
        facts = {"shard": self._name(stats), "chunk": stats.chunk, "may_pass": stats.may_pass}
        say(f"shard failed: {stats.error}", level=level, event="shard_failed", **facts)

    def _tell_rejects(self, stats: ChunkStats) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in stats.reasons.items())
        said = f"{self._name(stats)}: chunk {stats.chunk} has {stats.rejects} rejects: {reasons}"
        say(said, level="debug", event="rejects", shard=self._name(stats), chunk=stats.chunk, rejects=stats.reasons)

    def _name(self, stats: ChunkStats) -> str:
        return self._shards[stats.shard_id].name if stats.shard_id in self._shards else stats.shard_id

    def bound(self) -> Bound:
        """What bounds the run, from when its first worker began."""
        began = self._first or time.monotonic()
        return find_bound(self.seconds, time.monotonic() - began, self._workers)

    def line(self) -> str:
        """Samples, images/s, shards, rejects and the time left, as one line."""
        elapsed = time.monotonic() - self._started
        failed = f", {self.shards_failed} failed" if self.shards_failed else ""
        return (
            f"{self.samples:,} samples · {self.samples / max(elapsed, 1e-9):,.1f} images/s · "
            f"{self.shards_done}/{len(self._shards)} shards{failed} · {self.rejects:,} rejects · "
            f"{span(elapsed)} elapsed{self._time_left(elapsed)}{f' · bound by {self.bound().by}' if self.seconds else ''}"
        )

    def _time_left(self, elapsed: float) -> str:
        left = self._seconds_left(elapsed)
        return f" · about {span(left)} left" if left is not None else ""

    def _seconds_left(self, elapsed: float) -> float | None:
        if not self._bytes_done or self._bytes_done >= self._size:
            return None
        return elapsed * (self._size - self._bytes_done) / self._bytes_done

    def _figures(self) -> dict[str, Any]:
        """What the line says, as numbers."""
        elapsed = time.monotonic() - self._started
        left = self._seconds_left(elapsed)
        return {
            "samples": self.samples,
            "vectors": self.vectors,
            "rejects": self.rejects,
            "images_per_s": round(self.samples / max(elapsed, 1e-9), 1),
            "shards": len(self._shards),
            "shards_done": self.shards_done,
            "shards_failed": self.shards_failed,
            "elapsed_s": round(elapsed, 1),
            "left_s": None if left is None else round(left, 1),
            "bound": self.bound().by if self.seconds else None,
        }

    def _show(self, line: str) -> None:
        if logs_json():
            say(line, event="progress", **self._figures())
        else:
            self._console.print(line)

    def _text(self) -> Text:
        return Text(self.line() if self._first else f"starting … {span(time.monotonic() - self._started)}")

    def _log(self) -> None:
        while not self._ended.wait(LOG_EVERY_S):
            self._show(self.line() if logs_json() else f"{time.strftime('%H:%M:%S')} {self.line()}")


def span(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
