"""The record of a run as plain data: what `runs/<run_id>/record.json` and `state.json` hold, and what its report shows."""

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from lora_embed.config.foreign import parse_record
from lora_embed.monitor.stages import Bound, Workers, find_bound
from lora_embed.monitor.timeline import Reading

FORMAT = 1
OPTIONS = (  # keys of a job that a record holds; no storage options, because they may hold secrets
    "recipe", "input", "table", "precision", "chunk_size", "batch_size", "max_rejects", "max_removed", "max_pixels",
    "max_bytes", "carry", "image_column", "key_column", "image_member", "reference_column", "reference_roots",
    "check_references", "reject_unreachable", "leave_out", "limit", "vector_type", "resources", "reembed",
    "gates", "prices", "retain", "shared_filesystem", "follow_folder_links",
)  # fmt: skip
MOST_BINS, LEAST_BIN_S = 48, 2.0
ROUNDING = 1 + 1e-6
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
    """Divide the run into the time before the first worker began, whose bound is `start`, and periods after it.

    A period lasts at least `LEAST_BIN_S`, and long enough for what the workers did in it. Where there are no such periods,
    the list is empty: figures of a very short run, or of workers whose clocks differ by much, would mislead.
    """
    readings, workers = record.readings, workers_of(record)
    marks = _marks(readings[_began(readings) :], workers)
    if len(marks) < 2:
        return []
    before = [_bin(readings[0], marks[0], workers)] if marks[0].elapsed_s > 0 else []
    return [*before, *(_busy_bin(*pair, workers) for pair in pairwise(marks))]


def starting_s(record: RunRecord) -> float:
    """Seconds until the first worker began to work; 0 if none did."""
    began = _began(record.readings)
    return record.readings[began].elapsed_s if began < len(record.readings) - 1 else 0.0


def _began(readings: tuple[Reading, ...]) -> int:
    """The number of the last reading before the first worker began."""
    return max((number for number, reading in enumerate(readings) if reading.is_zero), default=0)


def _marks(readings: tuple[Reading, ...], workers: Workers) -> list[Reading]:
    """The readings that begin and end periods. A period in which the work does not fit is joined with another one."""
    step = max(-(-(len(readings) - 1) // MOST_BINS), 1)
    marks = list(readings[:1])
    for reading in (*readings[step:-1:step], *readings[1:][-1:]):
        if len(marks) == 2 and not _fits(marks[0], marks[1], workers):
            marks.pop()
        marks.append(reading)
        while len(marks) > 2 and not _fits(marks[-2], marks[-1], workers):
            del marks[-2]
    return marks if all(_fits(*pair, workers) for pair in pairwise(marks)) else []


def _fits(before: Reading, after: Reading, workers: Workers) -> bool:
    """Can these workers have done in this period what is counted for it, and is it long enough for a rate?"""
    elapsed_s = after.elapsed_s - before.elapsed_s
    return max(LEAST_BIN_S, workers.least_seconds(_spent(before, after))) <= elapsed_s * ROUNDING


def _spent(before: Reading, after: Reading) -> dict[str, float]:
    """Seconds by stage of a period; sums that differ by a rounding only are none."""
    return {stage: max(0.0, seconds - before.seconds.get(stage, 0.0)) for stage, seconds in after.seconds.items()}


def _busy_bin(before: Reading, after: Reading, workers: Workers) -> Bin:
    """A period after the first worker began: where nobody did anything, workers waited for work."""
    period = _bin(before, after, workers)
    if period.bound.by != "start":
        return period
    return replace(period, bound=Bound(by="transfer", shares={"idle": 1.0}, says="bound by transfer: no worker had work"))


def _bin(before: Reading, after: Reading, workers: Workers) -> Bin:
    elapsed_s, spent = after.elapsed_s - before.elapsed_s, _spent(before, after)
    return Bin(
        start_s=before.elapsed_s,
        end_s=after.elapsed_s,
        samples=after.samples - before.samples,
        busy={stage: seconds / elapsed_s for stage, seconds in spent.items()},
        bound=find_bound(spent, elapsed_s, workers),
    )


def workers_of(record: RunRecord) -> Workers:
    return Workers(
        actors=int(record.workers["actors"]),
        decoders=int(record.workers["decoders"]),
        cpus_per_decoder=record.workers["cpus_per_decoder"],
    )
