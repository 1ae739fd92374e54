"""Write messages and progress to stderr, as lines of text or as one JSON object a line.

As text, a running job shows one live line on a terminal, and elsewhere a log line every ten seconds. As JSON, everything
that this process writes to stderr is a JSON object, also the logs of libraries and tracebacks.
"""

import enum
import json
import logging
import sys
import threading
import time
import traceback
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_embed.monitor.effort import Effort
from lora_embed.monitor.relay import Relay
from lora_embed.monitor.stages import Bound, Workers, find_bound
from lora_embed.schema import ChunkHead, Shard
from lora_embed.text import in_lines, number_of, redacted, span, without_secrets

LOG_EVERY_S = 10.0
LEAST_IMPORTANT_FIRST = ("bound", "elapsed", "rejects", "rate", "samples")  # parts of the live line
MOST_NAMED = 10  # failed shards that the text log names as they fail; the run's end names as many
ALWAYS = ("run_id", "table")  # facts of a run that are in every JSON object
_STDERR = Console(stderr=True, highlight=False, soft_wrap=True)  # only one, so that lines do not break the live line
_FACTS: dict[str, Any] = {}  # facts of the run in this process
_IS_JSON = threading.Event()


class LogFormat(enum.StrEnum):
    """The format of what a command writes to stderr."""

    TEXT = "text"
    JSON = "json"


def say(message: str, *, level: str = "info", event: str = "message", **facts: Any) -> None:
    """Write one line of text, or one JSON object with all facts; messages of level `debug` are written as JSON only."""
    if _IS_JSON.is_set():
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        always = {name: _FACTS[name] for name in ALWAYS if name in _FACTS}
        _write(without_secrets({"time": now, "level": level, "event": event, "message": message} | always | facts))
    elif level != "debug":
        _STDERR.print(shown(message).replace("\n", "\n  "), markup=False)  # indented, so that no name can fake a new message


def shown(message: str) -> str:
    """A message without secrets, and without control characters that a name in it might send to the terminal."""
    return in_lines(redacted(message).split("\n"))


def log_as(chosen: LogFormat) -> None:
    """Write in this format from now on, and forget the facts of an earlier run."""
    _FACTS.clear()
    logging.raiseExceptions = False  # else Ray's own logging prints a traceback when its disk is full
    logging.lastResort = _SayingHandler(logging.WARNING)
    warnings.showwarning = _say_warning
    sys.excepthook = _say_uncaught
    threading.excepthook = lambda ended: _say_uncaught(ended.exc_type, ended.exc_value, ended.exc_traceback)
    if chosen is LogFormat.TEXT:
        _IS_JSON.clear()
        return
    if not logs_json():
        _OTHERS.__enter__()
    _IS_JSON.set()
    logging.basicConfig(handlers=[_SayingHandler()], level=logging.WARNING, force=True)


def logs_json() -> bool:
    return _IS_JSON.is_set()


def note(**facts: Any) -> None:
    """Remember facts of this run for its last line; `run_id` and `table` are also in every JSON object."""
    _FACTS.update(without_secrets(facts))


def noted() -> dict[str, Any]:
    """All facts that `note` has remembered of this process's run."""
    return dict(_FACTS)


class _SayingHandler(logging.Handler):
    """Writes the records of Python's logging, which libraries use, as lines or JSON objects like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), level=record.levelname.lower(), event="log", logger=record.name)


def _say_others(line: str) -> None:
    """Write a line that other code than Python wrote to stderr."""
    say(line, level="warning", event="log", logger="stderr")


_OTHERS = Relay(_say_others)  # while a job runs; with JSON, until the process ends


def end_relay() -> None:
    """Write the last lines of other code, before the process ends."""
    _OTHERS.__exit__()


def _say_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """Write a Python warning; its text may come from a file of somebody else, so it goes through `say`."""
    text = f"{filename}:{lineno}: {category.__name__}: {message}"
    say(text, level="warning", event="log", logger="py.warnings")


def _say_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    message = f"{kind.__name__}: {error}" if _IS_JSON.is_set() else text
    say(message, level="critical", event="crash", traceback=text)


def _write(fields: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(fields, default=str) + "\n")  # in one call, since several threads write
    sys.stderr.flush()


class Progress:
    """Counts what the chain reports in one attempt; a context manager that shows the counts while it is open.

    `effort` counts the same over all attempts of the run.
    """

    def __init__(
        self, shards: list[Shard], workers: Workers, console: Console | None = None, effort: Effort | None = None
    ) -> None:
        self._workers = workers
        self._run = effort or Effort()
        self.here = Effort(shards=len(shards))
        self._bytes = {shard.id: shard.size for shard in shards}
        self._console = console or _STDERR
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._bytes_done = 0
        self._is_live = self._console.is_terminal and not logs_json()
        self._relays = self._console is _STDERR and not logs_json()
        self._live = Live(get_renderable=self._text, console=self._console, refresh_per_second=4, transient=True)
        self._logger = threading.Thread(target=self._log, daemon=True)

    def __enter__(self) -> "Progress":
        if self._relays:
            _OTHERS.__enter__()
        if self._is_live:
            self._live.start()
        else:
            self._logger.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run.bound = self.bound()
        self._ended.set()
        if self._is_live:
            self._live.stop()
        else:
            self._logger.join()
        if self._relays:
            _OTHERS.__exit__()
        self._show(self.line(self._console.width if self._is_live else None))
        if self.here.seconds and self.here.embedded and not logs_json():  # else nothing had a speed
            self._console.print(self.bound().says)

    def add(self, chunk: ChunkHead) -> None:
        """Count one chunk that the chain has finished."""
        if chunk.ended and not self._workers.decoders:  # one worker did all stages of the chunk, one after the other
            stage, moment = max(chunk.ended.items(), key=lambda item: item[1])
            chunk = replace(chunk, ended={stage: moment})
        self.here.add(chunk)
        self._run.add(chunk)
        self._run.bound = self.bound()
        if chunk.error:
            self._tell_failure(chunk)
            return
        if chunk.reasons:
            self._tell_rejects(chunk)
        if chunk.last:
            self._bytes_done += self._bytes.get(chunk.shard_id, 0)

    def _tell_failure(self, chunk: ChunkHead) -> None:
        level = "warning" if self.here.shards_failed <= MOST_NAMED else "debug"
        facts = {"shard": chunk.shard_name, "chunk": chunk.chunk, "may_pass": chunk.may_pass}
        say(f"shard failed: {chunk.error}", level=level, event="shard_failed", **facts)

    def _tell_rejects(self, chunk: ChunkHead) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in chunk.reasons.items())
        text = f"{chunk.shard_name}: chunk {chunk.chunk} has {number_of(chunk.rejects, 'reject')}: {reasons}"
        say(text, level="debug", event="rejects", shard=chunk.shard_name, chunk=chunk.chunk, rejects=chunk.reasons)

    def bound(self) -> Bound:
        """What limits the run's speed, measured from when the first worker began to when the last one ended."""
        return find_bound(self.here.seconds, self.here.timeline.worked_s, self._workers)

    def _working_s(self) -> float:
        """Seconds since the first worker began."""
        began_s = self.here.timeline.began_s
        return 0.0 if began_s is None else max(0.0, time.monotonic() - self._started - began_s)

    def line(self, width: int | None = None) -> str:
        """Samples, images/s, shards, rejects and the time left, as one line; what matters least is left out to fit a width."""
        figures = self._figures()
        failed = f", {figures['shards_failed']:,} failed" if figures["shards_failed"] else ""
        time_left = f"about {span(figures['left_s'])} left" if figures["left_s"] is not None else ""
        bound = f"bound by {figures['bound']}" if figures["bound"] else ""
        parts = {
            "samples": number_of(figures["samples"], "sample"),
            "rate": f"{figures['images_per_s']:,.1f} images/s",
            "shards": f"{figures['shards_done']:,}/{number_of(figures['shards'], 'shard')}{failed}",
            "rejects": number_of(figures["rejects"], "reject"),
            "elapsed": f"{span(figures['elapsed_s'])} elapsed",
            "left": time_left,
            "bound": bound,
        }
        for name in LEAST_IMPORTANT_FIRST:
            if width is not None and len(_joined(parts)) > width:
                del parts[name]
        return _joined(parts)

    def _seconds_left(self) -> float | None:
        bytes_left = sum(self._bytes.values()) - self._bytes_done
        return self._working_s() * bytes_left / self._bytes_done if self._bytes_done and bytes_left > 0 else None

    def _figures(self) -> dict[str, Any]:
        """The values of the progress line as numbers."""
        elapsed, attempt = time.monotonic() - self._started, self.here
        seconds_left = self._seconds_left()
        return {
            "samples": attempt.samples,
            "vectors": attempt.vectors,
            "rejects": attempt.rejects.total(),
            "images_per_s": round(attempt.samples / max(elapsed, 1e-9), 1),
            "shards": attempt.shards,
            "shards_done": attempt.shards_done,
            "shards_failed": attempt.shards_failed,
            "elapsed_s": round(elapsed, 1),
            "left_s": None if seconds_left is None else round(seconds_left, 1),
            "bound": self.bound().by if attempt.seconds else None,
        }

    def _show(self, line: str) -> None:
        if logs_json():
            say(line, event="progress", **self._figures())
        else:
            self._console.print(line)

    def _now(self, width: int | None = None) -> str:
        """The progress line, or that it is too early for one: a small job on a CPU may take minutes for its first chunk."""
        if self.here.timeline.began_s is not None:
            return self.line(width)
        return f"waiting for the first chunk of images … {span(time.monotonic() - self._started)}"

    def _text(self) -> Text:
        return Text(self._now(self._console.width), no_wrap=True)

    def _log(self) -> None:
        while not self._ended.wait(LOG_EVERY_S):
            self._show(self.line() if logs_json() else f"{time.strftime('%H:%M:%S')} {self._now()}")


def _joined(parts: dict[str, str]) -> str:
    return " · ".join(filter(None, parts.values()))
