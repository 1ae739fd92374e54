"""Metrics of a run for Prometheus, on the metrics endpoint of its Ray node.

Every series has the label `table`. The run's id is only in `run_info`, so that nightly runs do not add series every night.
"""

from typing import Any
from urllib.parse import quote

from lora_embed.chain import cluster
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.progress import say
from lora_embed.monitor.stages import STAGES
from lora_embed.text import without_secrets

PREFIX = "lora_embed"  # Ray puts `ray_` before it
COUNTERS = {  # name, to which Ray adds `_total` → help, further tags
    "samples": ("Samples embedded or rejected.", ()),
    "vectors": ("Vectors committed.", ()),
    "rejects": ("Samples that cannot be embedded.", ("reason",)),
    "chunks": ("Chunks committed.", ()),
    "image_bytes": ("Bytes of encoded images read.", ()),
    "stage_seconds": ("Seconds of workers.", ("stage",)),
    "storage_retries": ("Requests to a store that were tried again.", ()),
}
GAUGES = {
    "shards": ("Shards of the live run.", ("state",)),
    "version": ("The table's current version, as the run knows it.", ()),
    "run_start_timestamp_seconds": ("When the run began.", ()),
    "last_chunk_timestamp_seconds": ("When the last chunk came in; the run's beginning until then.", ()),
    "bound": ("1 for what bounds the run, 0 for what does not.", ("by",)),
    "run_info": ("1; which run it is.", ("run_id",)),
}
BOUNDS = (*STAGES, "transfer", "start")


class Meters:
    """The metrics of one run; `show` brings them up to date."""

    def __init__(self, table: str, run_id: str, started: float) -> None:
        self._table, self._run_id, self._started = ascii_label(without_secrets(table)), run_id, started
        self._counters = {name: cluster.counter(f"{PREFIX}_{name}", *spec) for name, spec in _with_table(COUNTERS)}
        self._gauges = {name: cluster.gauge(f"{PREFIX}_{name}", *spec) for name, spec in _with_table(GAUGES)}
        self._shown: dict[tuple[str, str], float] = {}
        self._has_failed = False

    def show(self, effort: Effort, version: int | None) -> None:
        """Increase counters by what is new, and set gauges to the present values. Call it from one thread at a time.

        Metrics never decide how a run ends: if Ray does not take one, that is logged once, and no more are given to it.
        """
        if self._has_failed:
            return
        try:
            self._show(effort, version)
        except (ValueError, TypeError, RuntimeError, LookupError, OSError) as error:
            self._has_failed = True
            say(f"metrics could not be recorded, so Prometheus does not get them; the run continues: {error}", level="warning")

    def _show(self, effort: Effort, version: int | None) -> None:
        for name in ("samples", "vectors", "chunks", "image_bytes"):
            self._count(name, getattr(effort, name))
        self._count("storage_retries", effort.retries)
        for reason, count in effort.rejects.items():
            self._count("rejects", count, reason=reason)
        for stage, seconds in effort.seconds.items():
            self._count("stage_seconds", seconds, stage=stage)
        waiting = max(0, effort.shards - effort.shards_done - effort.shards_failed)
        for state, count in {"done": effort.shards_done, "failed": effort.shards_failed, "waiting": waiting}.items():
            self._set("shards", count, state=state)
        for by in BOUNDS if effort.bound is not None else ():
            self._set("bound", int(effort.bound is not None and effort.bound.by == by), by=by)
        if version is not None:
            self._set("version", version)
        self._set("run_start_timestamp_seconds", self._started)
        self._set("last_chunk_timestamp_seconds", effort.last_chunk or self._started)
        self._set("run_info", 1, run_id=self._run_id)

    def _count(self, name: str, total: float, **tags: str) -> None:
        key = (name, "".join(tags.values()))
        if (increase := total - self._shown.get(key, 0.0)) > 0:
            self._counters[name].inc(increase, tags={"table": self._table} | tags)
            self._shown[key] = total

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._gauges[name].set(value, tags={"table": self._table} | tags)


def ascii_label(text: str) -> str:
    """A label's text as Ray takes it, in ASCII: other letters as in a URI, `é` as `%C3%A9`."""
    return "".join(letter if letter.isascii() else quote(letter, errors="surrogateescape") for letter in text)


def _with_table(meters: dict[str, tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[Any, ...]]]:
    return [(name, (help_, ("table", *tags))) for name, (help_, tags) in meters.items()]
