"""The last line of a run: all that a message to whoever is on call needs, in one line of at most 200 characters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_embed.progress import span

MOST_CHARACTERS, MOST_OF_TABLE = 200, 40
WORDS = {0: "done", 1: "not done", 2: "refused"}  # by exit code
BETWEEN = " · "


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
