"""The runs of a table, by the states they write to its storage: which are live, and how the last ones ended."""

import contextlib
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lora_embed.entries import Entry
from lora_embed.errors import LoraEmbedError
from lora_embed.monitor.ending import gist
from lora_embed.monitor.heartbeat import DEAD_AFTER_S, Heartbeat
from lora_embed.monitor.record import RunState
from lora_embed.store.store import Store
from lora_embed.text import number_of, printable, span, without_secrets

MOST_OF_CAUSE = 200  # characters
SHOWN = 10  # runs that `status` shows
KEPT_S = 3600.0  # a run that wrote its state within this time may still be live
SLACK_S = 60.0  # a state may take this long to reach the store
RETRY_S = 10.0  # no run or command waits longer to write what only describes it
BEAT_RETRY_S = 2.0  # for a beat of the heartbeat; the next one follows soon
ENDED_WELL = ("published", "current")


def state_path(run_id: str) -> str:
    return f"runs/{run_id}/state.json"


def name_run(started: datetime) -> str:
    """A run's name, `<UTC>-<6 hex digits>`, so that names sort by time."""
    return f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def impatient(store: Store, retry_s: float = RETRY_S) -> Store:
    """The same store, whose failed requests are retried for a short time only."""
    return replace(store, options=store.options | {"retry_s": min(retry_s, store.retry_s)})


def prune_runs(store: Store, keep: int) -> None:
    """Remove the files of all but the newest `keep` runs, unless written within the last hour by the store's clock."""
    of_run: dict[str, list[Entry]] = defaultdict(list)
    for entry in store.list_files("runs"):
        of_run[entry.path.split("/")[1]].append(entry)
    now = max((entry.modified for entries in of_run.values() for entry in entries), default=0.0)
    doomed = []
    heard = {run_id: max(entry.modified for entry in entries) for run_id, entries in of_run.items()}
    for run_id in sorted(heard, key=lambda run_id: (heard[run_id], run_id))[:-keep]:
        if heard[run_id] < now - KEPT_S:
            doomed += [entry.path for entry in of_run[run_id]]
    if doomed:
        store.delete(doomed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, when it last wrote its state by the store's clock, and how long ago that is."""

    state: RunState
    heard: float
    silent_s: float

    @property
    def began(self) -> float:
        """When the run began by the store's clock, up to `SLACK_S` too early. Its machine's clock gives only the duration."""
        return self.heard - self.state.seconds - SLACK_S

    @property
    def status(self) -> str:
        """`running`, `seems dead`, or how it ended."""
        if self.state.outcome != "running":
            return self.state.outcome
        return "running" if self.silent_s <= DEAD_AFTER_S else "seems dead"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.state) | {"status": self.status, "silent_s": round(self.silent_s, 1)}

    def describe(self) -> str:
        """For a person, in a line."""
        state = self.state
        embedded = f"{state.embedded:,} embedded"
        embedded += f", {number_of(state.taken, 'vector')} taken over" if state.taken else ""
        done = f"{embedded}, {state.shards_done:,} of {number_of(state.shards, 'shard')}"
        done += f", {state.shards_failed:,} failed" if state.shards_failed else ""
        heard = f"last heard of {span(self.silent_s)} ago"
        if self.status == "running":
            speed = f", {state.images_per_s:,.1f} images/s, bound by {state.bound}" if state.bound else ""
            return f"{state.doing} on {state.host} for {span(state.seconds)}: {done}{speed}; {heard}"
        if self.status == "seems dead":
            return f"seems dead: {state.doing} on {state.host}, {done}; {heard}"
        duration = f"in {span(state.seconds)}"
        reasons = f" ({', '.join(f'{count:,} {reason}' for reason, count in state.rejects.items())})" if state.rejects else ""
        if state.outcome == "current":
            return f"version {state.version} stayed current, {duration}: {embedded}"
        if state.outcome == "published":
            counts = f"{embedded}, {number_of(state.rejected, 'reject')}{reasons}"
            return f"published version {state.version} {duration}: {counts}"
        if state.outcome == "failed":
            return f"failed after {span(state.seconds)}, {done}: {gist(state.error)[:MOST_OF_CAUSE]}"
        rejects = f", {number_of(state.rejected, 'reject')}{reasons}" if reasons else ""
        return f"{embedded} {duration}, not published{rejects}"


def read_runs(store: Store, most: int = SHOWN) -> list[Run]:
    """The runs that wrote their states last, the latest first."""
    latest = sorted(_states(store), key=lambda entry: (entry.modified, entry.path), reverse=True)[:most]
    return list(_read(store, latest, store.now()))


def find_live(store: Store, now: float) -> list[Run]:
    """Runs and commands that may be live: they have not ended, and wrote their states within the hour before `now`."""
    lately = [entry for entry in _states(store) if entry.modified >= now - KEPT_S]
    return [run for run in _read(store, lately, now) if run.state.outcome == "running"]


def _states(store: Store) -> list[Entry]:
    return [entry for entry in store.list_files("runs") if entry.path.endswith("/state.json")]


def _read(store: Store, listed: Iterable[Entry], now: float) -> Iterator[Run]:
    for entry in listed:
        data = store.read(entry.path)
        state = RunState.from_json(data) if data is not None else None
        if state is not None:
            yield Run(state=state, heard=entry.modified, silent_s=max(0.0, now - entry.modified))


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The name of a run or a command, and when it began."""

    run_id: str
    started: datetime
    moment: float  # monotonic

    @classmethod
    def now(cls) -> "Beginning":
        started = datetime.now(UTC)
        return cls(run_id=name_run(started), started=started, moment=time.monotonic())

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return round(time.monotonic() - self.moment, 2)

    def state(self, **facts: Any) -> RunState:
        """Its state by now, to be written to storage."""
        started = self.started.isoformat(timespec="seconds")
        return RunState(run_id=self.run_id, host=socket.gethostname(), started=started, seconds=self.seconds, **facts)


@contextlib.contextmanager
def announced(store: Store, doing: str, space_id: str = "") -> Iterator[None]:
    """Keep a state on storage while a command writes to the table, so that nobody removes the files it needs.

    Raises StorageError or StoreUnavailable if the first state cannot be written; later failures are ignored.
    """
    beginning = Beginning.now()
    path = state_path(beginning.run_id)

    def tell(store: Store) -> None:
        store.replace(path, beginning.state(doing=doing, space_id=space_id).to_json())

    def beat() -> None:
        with contextlib.suppress(LoraEmbedError, OSError):
            tell(impatient(store, BEAT_RETRY_S))

    tell(store)

    try:
        with Heartbeat(beat):
            yield
    finally:
        with contextlib.suppress(LoraEmbedError, OSError):
            impatient(store).delete([path])


def describe_runs(runs: list[Run]) -> list[str]:
    """The lines of `status` about runs; below the latest, the details of the error that it ended with."""
    lines = [f"{'run' if run.status != 'running' else 'running':<9} {run.state.run_id} {run.describe()}" for run in runs]
    if runs and runs[0].state.outcome == "failed":
        lines[1:1] = [line for line in runs[0].state.error.splitlines() if line.startswith("    ")]
    return [printable(line) for line in lines]


def to_prometheus(table: str, version: int | None, runs: list[Run]) -> str:
    """Gauges of a table for Prometheus, which exist also between runs and after a run that died."""
    label = _label("table", without_secrets(table))
    gauges: list[tuple[str, str, str, float | None]] = []
    gauges += [("lora_embed_table_version", "The current version.", label, version)]
    succeeded = [run.heard for run in runs if run.status in ENDED_WELL]
    success = max(succeeded, default=None)
    gauges += [("lora_embed_last_success_timestamp_seconds", "End of the last run that ended well.", label, success)]
    if runs:
        began, status = runs[0].heard - runs[0].state.seconds, runs[0].status
        gauges += [("lora_embed_last_run_start_timestamp_seconds", "Beginning of the last run.", label, began)]
        gauges += [("lora_embed_last_run", "1; what the last run is.", f"{label},{_label('status', status)}", 1)]
    lines = [
        f"# HELP {name} {help_}\n# TYPE {name} gauge\n{name}{{{labels}}} {value:.15g}"
        for name, help_, labels, value in gauges
        if value is not None
    ]
    return "\n".join(lines)


def _label(name: str, value: str) -> str:
    """A label in Prometheus's format, with its value escaped."""
    quoted = printable(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{quoted}"'
