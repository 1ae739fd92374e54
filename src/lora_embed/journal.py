"""Leaves what a run was with its table: `runs/<run_id>/record.json`, and the same as a page, `report.html`."""

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow.compute as pc

from lora_embed import cluster, pipeline, versions
from lora_embed.config import JobConfig
from lora_embed.errors import LoraEmbedError
from lora_embed.progress import say
from lora_embed.record import OPTIONS, RejectExample, RunRecord, without_secrets
from lora_embed.report.run import run_page
from lora_embed.schema import Manifest, encoder_path
from lora_embed.storage import Store
from lora_embed.table import read_rows
from lora_embed.work import Effort

PACKAGES = ("lora-embed", "torch", "transformers", "peft", "ray", "pyarrow", "pillow")
MOST_REJECT_FILES = 64  # read again for a report
RETRY_S = 10.0  # a run that ends because its table does not answer is not to wait for that again
EXAMPLES = 5  # of each reason
NOT_READ = "in more files than a report reads"
FORGOTTEN = "forgotten"  # images that somebody wanted out: they are counted, not shown


@dataclass
class Journal:
    """What a run says of itself while it goes on."""

    job: JobConfig
    shared: pipeline.Job
    topology: cluster.Topology
    effort: Effort = field(default_factory=Effort)
    sampled: int = 0  # samples embedded to judge a new encoder by, before all others
    version: int | None = None
    published: bool = False
    error: str = ""


@contextmanager
def recorded(job: JobConfig, shared: pipeline.Job, topology: cluster.Topology) -> Iterator[Journal]:
    """Record the run in this block, also one that fails once it has embedded something.

    A run never fails for its report, and waits little for it: that it could not be written is said, and all.
    """
    journal = Journal(job, shared, topology)
    started, began = datetime.now(UTC), time.monotonic()
    try:
        yield journal
    except LoraEmbedError as error:
        journal.error = str(error)
        raise
    except (KeyboardInterrupt, SystemExit):
        journal.error = "stopped from outside"
        raise
    finally:
        if journal.sampled or journal.effort.samples or journal.published:
            _leave(journal, started, time.monotonic() - began)


def _leave(journal: Journal, started: datetime, seconds: float) -> None:
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    table = journal.shared.store
    store = replace(table, options=table.options | {"retry_s": RETRY_S})
    try:
        record = make_record(journal, store, run_id, started.isoformat(timespec="seconds"), seconds)
        store.create(f"runs/{run_id}/report.html", run_page(record).encode(errors="backslashreplace"))
        store.create(f"runs/{run_id}/record.json", record.to_json())  # last: where it is, the report is
    except (LoraEmbedError, OSError, ValueError, TypeError, LookupError) as error:  # files of another release, too
        say(f"the run's report could not be written: {error}")
    else:
        say(f"report: {store.uri}/runs/{run_id}/report.html")


def make_record(journal: Journal, store: Store, run_id: str, started: str, seconds: float) -> RunRecord:
    """The record of a run that has ended."""
    job, shared, effort, workers = journal.job, journal.shared, journal.effort, journal.topology.workers
    manifest = versions.read_manifest(store, journal.version) if journal.version is not None else None
    rejects, examples = find_rejects(store, manifest) if manifest is not None else ({}, ())
    options = job.model_dump(mode="json")
    found = {
        "outcome": outcome_of(journal),
        "error": journal.error,
        "job": {key: options[key] for key in OPTIONS},
        "encoder": {key: getattr(shared.encoder, key) for key in ("space_id", "recipe_id", "dimension")},
        "layout": asdict(shared.layout) | {"layout_id": shared.layout.layout_id},
        "stages": {stage: round(spent, 3) for stage, spent in effort.seconds.items()},
        "bound": {"by": effort.bound.by, "says": effort.bound.says} if effort.bound is not None else {},
        "workers": asdict(workers),
        "gates": manifest.gates if manifest is not None else {},
        "lineage": manifest.lineage if manifest is not None else {},
        "merge": read_merge(store, shared.encoder.space_id),
    }
    return RunRecord(
        run_id=run_id,
        started=started,
        seconds=round(seconds, 2),
        embedded=journal.sampled + effort.samples,
        rejected=effort.rejects,
        readings=effort.timeline.readings(),
        version=journal.version,
        counts=manifest.counts if manifest is not None else {},
        rejects=rejects,
        examples=examples,
        software=software(),
        **without_secrets(found),
    )


def outcome_of(journal: Journal) -> str:
    if journal.error:
        return "failed"
    if journal.version is None:
        return "not published"
    return "published" if journal.published else "current"


def find_rejects(store: Store, manifest: Manifest) -> tuple[dict[str, int], tuple[RejectExample, ...]]:
    """A version's rejects by reason, and a few of each, from its first files of rejects; what the others hold is counted."""
    counts: Counter[str] = Counter()
    shown: dict[str, list[RejectExample]] = {}
    for entry in manifest.rejects[:MOST_REJECT_FILES]:
        rows = read_rows(store, entry.path)
        counts.update(rows["reason"].to_pylist())
        for reason in [reason for reason in counts if reason != FORGOTTEN and len(shown.setdefault(reason, [])) < EXAMPLES]:
            of_reason = rows.filter(pc.equal(rows["reason"], reason))
            some = of_reason.slice(0, EXAMPLES - len(shown[reason])).select(["id", "reason", "detail"]).to_pylist()
            shown[reason] += [
                RejectExample(id=row["id"], reason=reason, detail=without_secrets(row["detail"] or "")) for row in some
            ]
    if unread := sum(entry.rows for entry in manifest.rejects[MOST_REJECT_FILES:]):
        counts[NOT_READ] = unread
    return dict(counts), tuple(example for examples in shown.values() for example in examples)


def read_merge(store: Store, space_id: str) -> dict[str, Any]:
    """The encoder's merge report, without its rows by weight; empty where there is none."""
    data = store.read(f"{encoder_path(space_id)}/merge_report.json")
    report = json.loads(data) if data is not None else {}
    for member in report.get("members", []):
        member["weights_changed"] = len(member.pop("weights", {}))
    return report


def software() -> dict[str, str]:
    """Installed versions of what makes vectors."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
