"""How a command ends: its exit code, and of a run one last line of at most 200 characters for whoever is on call."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lora_embed.errors import LoraEmbedError, lack_of_machine
from lora_embed.monitor.progress import LogFormat, log_as, logs_json, noted, say
from lora_embed.text import span

MOST_CHARACTERS, MOST_OF_TABLE = 200, 40
WORDS = {0: "done", 1: "not done", 2: "refused"}  # by exit code
BETWEEN = " · "
A_BUG = "this is a bug: please report it with the traceback"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a command ended; `cause` and `advice` are empty where all is well."""

    code: int
    seconds: float
    cause: str = ""
    advice: str = ""

    def describe(self, facts: Mapping[str, Any]) -> str:
        """The line, by what is known of the run. The cause is what is cut: the whole of it stands in the message before."""
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
        embedded, took = facts["embedded"], f"in {span(self.seconds)}"
        done = f"{embedded:,} embedded {took}"
        if self.cause:
            return [done]
        rejected = [f"{facts['rejected'] / embedded:.2%} rejects"] if embedded else []
        bound = [f"bound by {facts['bound']}"] if facts["bound"] else []
        return [f"{_became(facts)}", done, *rejected, *bound]


def exit_code_of(command: Callable[[], Any]) -> int:
    """Run a command; what a user can mend ends in one message, never in a traceback, and a run in a line that sums it up."""
    log_as(LogFormat.TEXT)
    if threading.current_thread() is threading.main_thread():  # Ray does the same, but only from its start on
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
        say(f"error: {lack}. What is committed stays, and the same command goes on.", level="error", event="error")
    except KeyboardInterrupt:
        code, cause, advice = 1, "interrupted", LoraEmbedError.advice
        say("interrupted; what is committed stays, and the same command goes on", level="error", event="error")
    except SystemExit as end:
        code = int(end.code or 0) if end.code in (None, 0, 1, 2) else 1
        if end.code not in (None, 0, 1, 2):
            cause, advice = "stopped by a signal", LoraEmbedError.advice
            say("stopped by a signal; what is committed stays, and the same command goes on", level="error", event="error")
    except Exception as bug:
        _say_end(_ending_of_a_bug(bug, started))
        raise
    _say_end(Ending(code=code, seconds=time.monotonic() - started, cause=cause, advice=advice))
    return code


_at_end: list[Callable[[bool], None]] = []


def at_end(leave: Callable[[bool], None]) -> None:
    """Have this called by `end_process`, with whether the command failed."""
    _at_end.append(leave)


def end_process(code: int) -> NoReturn:
    """End with this exit code: after a signal the interpreter's own end aborts where Ray was loaded."""
    for leave in _at_end:
        leave(code != 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ending_of_a_bug(bug: Exception, started: float) -> Ending:
    return Ending(code=1, seconds=time.monotonic() - started, cause=f"{type(bug).__name__}: {bug}", advice=A_BUG)


def _say_end(ending: Ending) -> None:
    """How a run ended; as text not of one that was refused, of which the message before is all there is to say."""
    facts = noted()
    if facts.pop("is_run", False) and (ending.code != 2 or logs_json()):
        level = "error" if ending.code else "info"
        say(ending.describe(facts), level=level, event="end", **facts | {"exit_code": ending.code, "advice": ending.advice})


def gist(message: str) -> str:
    """What a message of several lines comes to, in one: the first of the indented ones, which say what it was."""
    told = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return f"{told[0]}{more}" if told else " ".join(message.split())


def _became(facts: Mapping[str, Any]) -> str:
    """What became of the table."""
    if facts["version"] is None:
        return "not published"
    return f"version {facts['version']} {'published' if facts['outcome'] == 'published' else 'is current'}"


def _begin_of(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _end_of(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[-most + 1 :]}"
