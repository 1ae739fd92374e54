"""The record of a run as plain data: what `runs/<run_id>/record.json` and `state.json` hold, and what its report shows."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

from lora_embed.config.foreign import parse_record
from lora_embed.monitor.stages import Bound, Reading, Workers, find_bound

FORMAT = 1
OPTIONS = (  # keys of a job that a record holds; no storage options, because they may hold secrets
    "recipe", "input", "table", "precision", "chunk_size", "batch_size", "max_rejects", "max_removed", "max_pixels",
    "max_bytes", "carry", "image_column", "key_column", "image_member", "reference_column", "reference_roots",
    "check_references", "reject_unreachable", "leave_out", "limit", "vector_type", "resources", "reembed",
    "gates", "prices", "retain", "shared_filesystem", "follow_folder_links",
)  # fmt: skip
MOST_BINS = 48
EXAMPLES = 5  # rejects that are kept of each reason
Outcome = Literal["running", "published", "current", "not published", "failed"]


@dataclass(frozen=True, kw_only=True)
class RejectExample:
    """One sample that could not be embedded."""

    id: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The fields that the state and the record of a run have in common."""

    run_id: str
    started: str  # UTC, ISO 8601
    seconds: float = 0.0
    outcome: Outcome = "running"
    error: str = ""  # why the run failed
    embedded: int = 0  # samples that this run decoded, rejects included
    taken: int = 0  # samples whose vectors it took over from a version, since their images have the same bytes
    rejected: int = 0  # rejects among the embedded samples
    version: int | None = None
    rejects: dict[str, int] = field(default_factory=dict)  # reason → samples; in a record, of the version if there is one
    passed_over: dict[str, int] = field(default_factory=dict)  # listed files that are no shards, by kind
    passed_in_tars: dict[str, int] = field(default_factory=dict)  # images in tars that were not embedded, by kind
    lacking: dict[str, int] = field(default_factory=dict)  # carried field → embedded samples that do not have it in its type


@dataclass(frozen=True, kw_only=True)
class RunRecord(RunSummary):
    """The record of one run. It holds no environment variables and no storage options."""

    job: dict[str, Any]
    encoder: dict[str, Any]  # space_id, recipe_id, dimension
    layout: dict[str, Any]
    stages: dict[str, float]  # the workers' seconds by stage
    bound: dict[str, str]  # `by` and `says`; empty if nothing was embedded
    workers: dict[str, float]
    readings: tuple[Reading, ...]
    counts: dict[str, int] = field(default_factory=dict)  # of the version
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    examples: tuple[RejectExample, ...] = ()
    merge: dict[str, Any] = field(default_factory=dict)  # merge_report.json, without its rows by weight
    software: dict[str, str] = field(default_factory=dict)  # package → version
    format: int = FORMAT

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


@dataclass(frozen=True, kw_only=True)
class RunState(RunSummary):
    """The progress of a run, or how it ended, in a few hundred bytes: `runs/<run_id>/state.json`."""

    host: str
    doing: str = ""
    space_id: str = ""
    shards: int = 0  # to embed
    shards_done: int = 0
    shards_failed: int = 0
    images_per_s: float = 0.0
    bound: str | None = None
    last_chunk: str | None = None  # when the last chunk was finished; UTC, ISO 8601
    format: int = FORMAT

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode(errors="backslashreplace")

    @classmethod
    def from_json(cls, data: bytes) -> "RunState | None":
        """Read a state; None if it is not one of this format. Fields that only a newer release knows are ignored."""
        try:
            state = parse_record(cls, data)
        except ValueError:
            return None
        return state if state.format == FORMAT and min(state.seconds, state.images_per_s) >= 0 else None


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A period of a run."""

    start_s: float
    end_s: float
    samples: int
    busy: dict[str, float]  # stage → mean number of workers that did it
    bound: Bound


def bins_of(record: RunRecord) -> list[Bin]:
    """Divide the run into periods with equal numbers of readings.

    A worker's seconds are counted when its chunk is finished, so a period should be long enough for a chunk of each worker.
    """
    readings, workers = record.readings, workers_of(record)
    count = len(readings) - 1
    step = max(-(-count // MOST_BINS), min(workers.actors, count // 6), 1)
    marks = [*range(0, count, step), count] if count > 0 else []
    return [_bin(readings[first], readings[second], workers) for first, second in pairwise(marks)]


def _bin(before: Reading, after: Reading, workers: Workers) -> Bin:
    seconds_between = max(after.elapsed_s - before.elapsed_s, 1e-9)
    spent = {stage: seconds - before.seconds.get(stage, 0.0) for stage, seconds in after.seconds.items()}
    return Bin(
        start_s=before.elapsed_s,
        end_s=after.elapsed_s,
        samples=after.samples - before.samples,
        busy={stage: seconds / seconds_between for stage, seconds in spent.items()},
        bound=find_bound(spent, seconds_between, workers),
    )


def workers_of(record: RunRecord) -> Workers:
    return Workers(
        actors=int(record.workers["actors"]),
        decoders=int(record.workers["decoders"]),
        cpus_per_decoder=record.workers["cpus_per_decoder"],
    )
