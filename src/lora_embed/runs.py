"""The runs of a table, as they tell of themselves on its storage: those that go on, and how the last ones ended."""

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from lora_embed.ending import gist
from lora_embed.heartbeat import DEAD_AFTER_S
from lora_embed.progress import span
from lora_embed.record import RunState, without_secrets
from lora_embed.storage import Entry, Store

MOST_OF_CAUSE = 200  # characters
SHOWN = 10  # runs that `status` tells of
KEPT_S = 3600.0  # what was written within that time is of a run that may go on
ENDED_WELL = ("published", "current")


def state_path(run_id: str) -> str:
    return f"runs/{run_id}/state.json"


def prune_runs(store: Store, keep: int) -> None:
    """Remove what all but the newest `keep` runs left, unless it was written within the last hour of the store's clock."""
    of_run: dict[str, list[Entry]] = defaultdict(list)
    for entry in store.list_files("runs"):
        of_run[entry.path.split("/")[1]].append(entry)
    now = max((entry.modified for entries in of_run.values() for entry in entries), default=0.0)
    doomed = []
    for run_id in sorted(of_run)[:-keep]:
        if max(entry.modified for entry in of_run[run_id]) < now - KEPT_S:
            doomed += [entry.path for entry in of_run[run_id]]
    if doomed:
        store.delete(doomed)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, and for how long nothing was heard of it."""

    state: RunState
    silent_s: float

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
        done = f"{state.embedded:,} embedded, {state.shards_done:,} of {state.shards:,} shards"
        done += f", {state.shards_failed:,} failed" if state.shards_failed else ""
        heard = f"last heard of {span(self.silent_s)} ago"
        if self.status == "running":
            speed = f", {state.images_per_s:,.1f} images/s, bound by {state.bound}" if state.bound else ""
            return f"{state.doing} on {state.host} for {span(state.seconds)}: {done}{speed}; {heard}"
        if self.status == "seems dead":
            return f"seems dead: {state.doing} on {state.host}, {done}; {heard}"
        took = f"in {span(state.seconds)}"
        if state.outcome == "current":
            return f"version {state.version} stayed current, {took}: {state.embedded:,} embedded"
        if state.outcome == "published":
            return f"published version {state.version} {took}: {state.embedded:,} embedded, {state.rejected:,} rejects"
        if state.outcome == "failed":
            return f"failed after {span(state.seconds)}, {done}: {gist(state.error)[:MOST_OF_CAUSE]}"
        return f"embedded {state.embedded:,} {took}, not published"


def read_runs(store: Store, most: int = SHOWN) -> list[Run]:
    """The runs that were heard of last, the latest first: those that go on, then the others by their end."""
    listed = [entry for entry in store.list_files("runs") if entry.path.endswith("/state.json")]
    latest = sorted(listed, key=lambda entry: (entry.modified, entry.path), reverse=True)[:most]
    now, found = time.time(), []
    for entry in latest:
        data = store.read(entry.path)
        state = RunState.from_json(data) if data is not None else None
        if state is not None:
            found.append(Run(state=state, silent_s=max(0.0, now - entry.modified)))
    return found


def describe_runs(runs: list[Run]) -> list[str]:
    """Lines for a person, as those of `status`."""
    return [f"{'run' if run.status != 'running' else 'running':<9} {run.state.run_id} {run.describe()}" for run in runs]


def to_prometheus(table: str, version: int | None, runs: list[Run]) -> str:
    """What a table tells, as gauges for Prometheus: known also between runs and after one that died."""
    label = "table=" + json.dumps(without_secrets(table), ensure_ascii=False)
    gauges: list[tuple[str, str, str, float | None]] = []
    gauges += [("lora_embed_table_version", "The current version.", label, version)]
    succeeded = [_end_of(run) for run in runs if run.status in ENDED_WELL]
    success = max(succeeded, default=None)
    gauges += [("lora_embed_last_success_timestamp_seconds", "End of the last run that ended well.", label, success)]
    if runs:
        began, status = datetime.fromisoformat(runs[0].state.started).timestamp(), runs[0].status
        gauges += [("lora_embed_last_run_start_timestamp_seconds", "Beginning of the last run.", label, began)]
        gauges += [("lora_embed_last_run", "1; what the last run is.", f'{label},status="{status}"', 1)]
    lines = [
        f"# HELP {name} {help_}\n# TYPE {name} gauge\n{name}{{{labels}}} {value:.15g}"
        for name, help_, labels, value in gauges
        if value is not None
    ]
    return "\n".join(lines)


def _end_of(run: Run) -> float:
    return datetime.fromisoformat(run.state.started).timestamp() + run.state.seconds
