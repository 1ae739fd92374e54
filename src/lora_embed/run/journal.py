"""Record a run on its table's storage: `runs/<run_id>/state.json`, `record.json`, and the same as a page, `report.html`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_embed.chain import cluster
from lora_embed.chain.items import Pass
from lora_embed.config.foreign import read_json
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed, LoraEmbedError
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.heartbeat import Heartbeat
from lora_embed.monitor.progress import note, say
from lora_embed.monitor.record import OPTIONS, Outcome, RejectExample, RunRecord, RunState, RunSummary
from lora_embed.monitor.runs import BEAT_RETRY_S, Beginning, impatient, prune_runs, state_path
from lora_embed.report.run import run_page
from lora_embed.run.open import OpenJob
from lora_embed.run.prometheus import Meters
from lora_embed.schema import encoder_path
from lora_embed.store.retry import take_retries
from lora_embed.store.store import Store
from lora_embed.table import versions
from lora_embed.table.manifest import Manifest
from lora_embed.table.rejects import read_rejects
from lora_embed.text import utc, without_secrets

PACKAGES = ("lora-embed", "torch", "transformers", "peft", "ray", "pyarrow", "pillow")


def begin(job: JobConfig) -> Beginning:
    """Name a run; all later messages have this name."""
    beginning = Beginning.now()
    note(run_id=beginning.run_id, table=job.table)
    return beginning


@dataclass
class Journal:
    """What is known of a run while it is live."""

    beginning: Beginning
    job: JobConfig
    store: Store
    space_id: str
    topology: cluster.Topology
    shared: Pass | None = None  # once the encoder is on storage
    effort: Effort = field(default_factory=Effort)
    passed_over: dict[str, int] = field(default_factory=dict)
    doing: str = "starting"
    before: int | None = None  # the version that was current when the run began
    version: int | None = None
    published: bool = False
    error: str = ""
    gates: dict[str, Any] = field(default_factory=dict)  # those that stopped the run, and the others that were judged
    has_missed: bool = False  # a state could not be written, and that was logged

    def state(self, outcome: Outcome = "running") -> RunState:
        """The run's state by now."""
        effort = self.effort.now()
        return self.beginning.state(
            outcome=outcome,
            doing=self.doing,
            space_id=self.space_id,
            shards=effort.shards,
            shards_done=effort.shards_done,
            shards_failed=effort.shards_failed,
            embedded=effort.embedded,
            taken=effort.taken,
            rejected=effort.rejects.total(),
            rejects=dict(effort.rejects),
            images_per_s=effort.images_per_s,
            bound=effort.bound.by if effort.bound is not None else None,
            last_chunk=utc(effort.last_chunk) if effort.last_chunk is not None else None,
            version=self.version,
            passed_over=self.passed_over,
            passed_in_tars=effort.passed,
            lacking=dict(effort.lacking),
            error=without_secrets(self.error),
        )


@contextmanager
def recorded(
    beginning: Beginning, job: JobConfig, store: Store, space_id: str, topology: cluster.Topology
) -> Iterator[Journal]:
    """Record the run in this block: its state while it is live, how it ended and, if it embedded something, a report.

    The first state is written before the block begins; from then on, nobody removes what a run of this space needs. A run
    never fails because its state or report cannot be written, and does not wait long for it: the failure is logged.
    """
    journal = Journal(beginning, job, store, space_id, topology)
    cluster.say_where_metrics_are()
    meters = Meters(job.table, beginning.run_id, beginning.started.timestamp())

    def beat() -> None:
        journal.effort.add_retries(take_retries())  # the driver's own
        meters.show(journal.effort.now(), journal.version or journal.before)
        _leave_state(journal)

    _leave_state(journal)
    try:
        with Heartbeat(beat):
            yield journal
    except BaseException as error:
        journal.error = _reason_of(error)
        journal.gates = error.gates if isinstance(error, GateFailed) else {}
        raise
    finally:
        meters.show(journal.effort.now(), journal.version or journal.before)
        state = journal.state(outcome_of(journal))
        note(**asdict(state))
        is_written = leave_state(state, store, job.retain.runs)  # first: a stopped run may be killed soon
        if is_written and (journal.effort.samples or journal.published or journal.gates):
            _leave_report(journal, state)


def _reason_of(error: BaseException) -> str:
    if isinstance(error, LoraEmbedError):
        return str(error)
    return "stopped from outside" if isinstance(error, KeyboardInterrupt | SystemExit) else f"{type(error).__name__}: {error}"


def _leave_state(journal: Journal) -> None:
    """Write the state. The first failure is logged, since `status` on another machine will show the run as dead."""
    try:
        impatient(journal.store, BEAT_RETRY_S).replace(state_path(journal.beginning.run_id), journal.state().to_json())
    except (LoraEmbedError, OSError) as error:
        if not journal.has_missed:
            journal.has_missed = True
            say(
                f"the run's state could not be written, so `status` does not show it; the run continues: {error}",
                level="warning",
            )


def leave_quiet(beginning: Beginning, opened: OpenJob, current: Manifest) -> None:
    """Write the state of a run that found nothing to do, so that it does not look as if there was no run."""
    passed_over = opened.listing.passed_over
    state = beginning.state(outcome="current", space_id=current.space_id, version=current.version, passed_over=passed_over)
    note(**asdict(state))
    leave_state(state, opened.store, opened.job.retain.runs)


def leave_state(state: RunState, store: Store, keep: int) -> bool:
    """Write how a run ended, and remove the files of runs that are too old; False if the store cannot be written to."""
    try:
        impatient(store).replace(state_path(state.run_id), state.to_json())
        prune_runs(impatient(store), keep)
    except (LoraEmbedError, OSError) as error:
        say(f"the end of the run could not be written to its table, so `status` does not show it: {error}", level="warning")
        return False
    return True


def _leave_report(journal: Journal, state: RunState) -> None:
    store, run_id = impatient(journal.store), state.run_id
    try:
        record = make_record(journal, state, store)
        store.create(f"runs/{run_id}/report.html", run_page(record).encode(errors="backslashreplace"))
        store.create(f"runs/{run_id}/record.json", record.to_json())  # last: if it exists, the report exists too
    except (LoraEmbedError, OSError, ValueError, TypeError, LookupError) as error:  # files of another release, too
        say(f"the run's report could not be written: {error}")
    else:
        say(f"report: {store.uri}/runs/{run_id}/report.html")


def make_record(journal: Journal, state: RunState, store: Store) -> RunRecord:
    """The record of a run that has ended with this state."""
    job, shared, effort, workers = journal.job, journal.shared, journal.effort, journal.topology.workers
    assert shared is not None, "a run that embedded something has it"
    manifest = versions.read_manifest(store, journal.version) if journal.version is not None else None
    of_run = tuple(example for examples in effort.examples.values() for example in examples)
    rejects, examples = find_rejects(store, manifest) if manifest is not None else (dict(effort.rejects), of_run)
    options = job.model_dump(mode="json")
    facts = {
        "job": {key: options[key] for key in OPTIONS},
        "encoder": {key: getattr(shared.encoder, key) for key in ("space_id", "recipe_id", "dimension")},
        "layout": asdict(shared.layout) | {"layout_id": shared.layout.layout_id},
        "stages": effort.rounded_seconds,
        "bound": {"by": effort.bound.by, "says": effort.bound.says} if effort.bound is not None else {},
        "workers": asdict(workers),
        "gates": manifest.gates if manifest is not None else journal.gates,
        "lineage": manifest.lineage if manifest is not None else {},
        "merge": read_merge(store, shared.encoder.space_id),
    }
    return RunRecord(
        **{summed.name: getattr(state, summed.name) for summed in fields(RunSummary) if summed.name != "rejects"},
        readings=effort.timeline.readings(),
        counts=manifest.counts if manifest is not None else {},
        rejects=rejects,
        examples=examples,
        software=software(),
        **without_secrets(facts),
    )


def outcome_of(journal: Journal) -> Outcome:
    if journal.error:
        return "failed"
    if journal.version is None:
        return "not published"
    return "published" if journal.published else "current"


def find_rejects(store: Store, manifest: Manifest) -> tuple[dict[str, int], tuple[RejectExample, ...]]:
    """A version's rejects by reason, and a few examples of each."""
    return read_rejects(store, ((entry.path, entry.rows) for entry in manifest.rejects))


def read_merge(store: Store, space_id: str) -> dict[str, Any]:
    """The encoder's merge report without its rows by weight; empty if there is none."""
    data = store.read(f"{encoder_path(space_id)}/merge_report.json")
    report = read_json(data, store.name(f"{encoder_path(space_id)}/merge_report.json")) if data is not None else {}
    for member in report.get("members", []):
        member["weights_changed"] = len(member.pop("weights", {}))
    return report


def software() -> dict[str, str]:
    """Installed versions of the packages that make vectors."""
    versions_of = {}
    for package in PACKAGES:
        try:
            versions_of[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions_of
