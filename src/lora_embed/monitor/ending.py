"""End a command: its exit code and, after a run, one last line of at most 200 characters for the person on call."""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lora_embed.errors import LoraEmbedError, lack_of_machine
from lora_embed.monitor.progress import LogFormat, end_relay, log_as, logs_json, noted, say
from lora_embed.text import number_of, span

# Of new objects, between two searches for unreachable ones. Records of 100,000 shards take half as long to read with it as
# with Python's 700, since each full search walks through all of them.
NEW_OBJECTS = 10_000
MOST_CHARACTERS, MOST_OF_TABLE = 200, 40
WORDS = {0: "done", 1: "not done", 2: "refused"}  # by exit code
BETWEEN = " · "
A_BUG = "this is a bug: please report it with the traceback"
KEPT = "What is committed stays. Run the same command again to continue."


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a command ended; `cause` and `advice` are empty if it succeeded."""

    code: int
    seconds: float
    cause: str = ""
    advice: str = ""

    def describe(self, facts: Mapping[str, Any]) -> str:
        """The last line, from the facts of the run. A long cause is cut; the message before has all of it."""
        begins = [f"end: {WORDS[self.code]}, exit {self.code}"]
        begins += [_end_of(str(facts["table"]), MOST_OF_TABLE)] if "table" in facts else []
        ends = self._counts(facts) if "outcome" in facts else []
        ends += [self.advice] if self.advice else []
        ends += [f"run {facts['run_id']}"] if "run_id" in facts else []
        if self.cause:
            room = MOST_CHARACTERS - len(BETWEEN.join([*begins, "", *ends]))
            begins.append(_begin_of(gist(self.cause), room))
        return BETWEEN.join([*begins, *ends])

    def _counts(self, facts: Mapping[str, Any]) -> list[str]:
        embedded, duration = facts["embedded"], f"in {span(self.seconds)}"
        if self.cause:
            return [f"{embedded:,} embedded {duration}"]
        rejects = f", {number_of(facts['rejected'], 'reject')} among them," if facts["rejected"] else ""
        done = f"{embedded:,} embedded{rejects} {duration}"
        bound = [f"bound by {facts['bound']}"] if facts["bound"] else []
        return [f"{_became(facts)}", done, *bound]


def exit_code_of(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code.

    An error that the user can correct ends in one message, never in a traceback. A run also writes its last line.
    """
    log_as(LogFormat.TEXT)
    gc.set_threshold(NEW_OBJECTS)
    if threading.current_thread() is threading.main_thread():  # Ray does the same, but only once it has started
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    started = time.monotonic()
    code, cause, advice = 0, "", ""
    try:
        command()
    except LoraEmbedError as error:
        code, cause, advice = error.exit_code, str(error), error.advice
        say(f"error: {error}", level="error", event="error", error=type(error).__name__)
    except (OSError, MemoryError) as error:
        if (lack := lack_of_machine(error)) is None:
            _say_end(_ending_of_a_bug(error, started))
            raise
        code, cause, advice = 1, lack, LoraEmbedError.advice
        say(f"error: {lack.rstrip('.')}. {KEPT}", level="error", event="error")
    except KeyboardInterrupt:
        code, cause, advice = 1, "interrupted", LoraEmbedError.advice
        say(f"interrupted. {KEPT}", level="error", event="error")
    except SystemExit as end:
        code = int(end.code or 0) if end.code in (None, 0, 1, 2) else 1
        if end.code not in (None, 0, 1, 2):
            cause, advice = "stopped by a signal", LoraEmbedError.advice
            say(f"stopped by a signal. {KEPT}", level="error", event="error")
    except Exception as bug:
        _say_end(_ending_of_a_bug(bug, started))
        raise
    _say_end(Ending(code=code, seconds=time.monotonic() - started, cause=cause, advice=advice))
    return code


_at_end: list[Callable[[bool], None]] = []


def at_end(leave: Callable[[bool], None]) -> None:
    """Register a function that `end_process` calls; its argument says whether the command failed."""
    if leave not in _at_end:
        _at_end.append(leave)


def end_process(code: int) -> NoReturn:
    """End the process with this exit code. A normal exit of the interpreter aborts after a signal if Ray was loaded."""
    for leave in _at_end:
        leave(code != 0)
    end_relay()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ending_of_a_bug(bug: Exception, started: float) -> Ending:
    return Ending(code=1, seconds=time.monotonic() - started, cause=f"{type(bug).__name__}: {bug}", advice=A_BUG)


def _say_end(ending: Ending) -> None:
    """Write a run's last line. As text, a run with exit code 2 has none: its error message says everything."""
    facts = noted()
    if facts.pop("is_run", False) and (ending.code != 2 or logs_json()):
        level = "error" if ending.code else "info"
        say(ending.describe(facts), level=level, event="end", **facts | {"exit_code": ending.code, "advice": ending.advice})


def gist(message: str) -> str:
    """Summarise a message in one line: if it has indented lines, which list the causes, only the first of these.

    Lines that are indented further are details of a cause.
    """
    causes = [line.strip() for line in message.splitlines() if line.startswith("  ") and line[2:3] != " "]
    others = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
    return f"{causes[0]}{others}" if causes else " ".join(message.split())


def _became(facts: Mapping[str, Any]) -> str:
    """Whether the run published a version, or which version stays current."""
    if facts["version"] is None:
        return "not published"
    return f"version {facts['version']} {'published' if facts['outcome'] == 'published' else 'is current'}"


def _begin_of(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _end_of(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[-most + 1 :]}"
