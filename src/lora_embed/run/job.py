"""A job from its file to a published version: encoder → plan → embed → verify → publish."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_embed.chain import cluster
from lora_embed.chain.items import Pass
from lora_embed.config.models import JobConfig
from lora_embed.errors import (
    GateFailed,
    IncompleteRun,
    StorageError,
    StoreUnavailable,
    TableError,
    VerificationFailed,
    once_started,
)
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.progress import say
from lora_embed.monitor.runs import Beginning, impatient
from lora_embed.run import journal, preview, publish, work
from lora_embed.run.decide import decide
from lora_embed.run.encoders import has_encoders, renew_encoder, store_encoder
from lora_embed.run.layout import resolve_layout
from lora_embed.run.open import OpenJob, open_job
from lora_embed.run.refuse import refuse_local_paths
from lora_embed.schema import Shard
from lora_embed.shards.listing import Listing
from lora_embed.store.store import Store
from lora_embed.table import retention, staging, versions
from lora_embed.table.manifest import Manifest
from lora_embed.table.parts import part_path
from lora_embed.text import counted, in_lines, number_of

EXAMPLES = 3  # rejects that a run names at its end


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run did; `version` is None when nothing was published."""

    table: str
    space_id: str
    embedded: int  # samples that this run decoded, rejects included
    rejected: int = 0  # rejects among these
    examples: tuple[str, ...] = ()  # a few of them in words
    taken: int = 0  # samples whose vectors it took over from a version
    version: int | None = None
    published: bool = False  # by this run
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage, summed over the workers
    bound: str | None = None  # the stage that limited the speed
    passed_over: dict[str, int] = field(default_factory=dict)  # listed files that are no shards, by kind

    @classmethod
    def of(cls, table: str, space_id: str, effort: Effort) -> "RunResult":
        """The result of embedding; nothing is published yet."""
        bound = effort.bound.by if effort.bound else None
        return cls(
            table=table,
            space_id=space_id,
            embedded=effort.embedded,
            rejected=effort.rejects.total(),
            examples=tuple(f"{few.id}: {few.reason}, {few.detail}" for of in effort.examples.values() for few in of)[:EXAMPLES],
            taken=effort.taken,
            stages=effort.rounded_seconds,
            bound=bound,
        )

    def at(self, manifest: Manifest, *, published: bool = False) -> "RunResult":
        """The same result, with this version as the table's current one."""
        return replace(self, space_id=manifest.space_id, version=manifest.version, counts=manifest.counts, published=published)

    def describe(self) -> str:
        """For a person: a line, and one for each of a few rejects."""
        taken = f", took over {number_of(self.taken, 'vector')}" if self.taken else ""
        rejected = f" ({number_of(self.rejected, 'reject')} among them)" if self.rejected else ""
        done = f"embedded {number_of(self.embedded, 'sample')}{rejected}{taken} in {self.seconds:.0f} s"
        became = f"version {self.version} {'published' if self.published else 'is current'} ({counted(self.counts)}); {done}"
        more = self.rejected - len(self.examples)
        others = [f"  and {number_of(more, 'more reject')}, which the report of the run counts by reason"] if more > 0 else []
        head = f"{self.table}: {f'{done}; not published' if self.version is None else became}"
        return in_lines([head, *(f"  reject {example}" for example in self.examples), *others])


def run_job(job: JobConfig, *, publishes: bool = True, replaces: bool = False, releases: bool = False) -> RunResult:
    """Run a job until a version is published, or until an error or gate stops it.

    With `replaces`, as in the nightly run, vectors of another space may replace the table's: everything is embedded anew
    while the current version stays. With `releases`, also a space that a rollback holds back. Raises ConfigError before
    anything is written. After that, raises IncompleteRun, VerificationFailed or GateFailed: what is committed stays, and
    the same call continues.
    """
    beginning = journal.begin(job)
    with tempfile.TemporaryDirectory() as scratch:
        decision = decide(job, Path(scratch), replaces=replaces, releases=releases)
        opened, encoder = decision.opened, decision.encoder
        opened.listing.say_passed()
        if decision.remark:
            say(f"note: {decision.remark}")
        if decision.is_current:
            return _leave_as_it_is(beginning, opened)
        assert encoder is not None, "it was built"
        cluster.connect()
        topology = cluster.choose_topology(job.resources)
        refuse_local_paths(opened, encoder.base)
        store = versions.claim(opened.store)  # the last check, and the first write
        with once_started(), journal.recorded(beginning, job, store, encoder.space_id, topology) as recording:
            recording.passed_over = opened.listing.passed_over
            if decision.folder is None:
                renew_encoder(encoder, store, job.retain.grace_days)
            else:
                encoder = store_encoder(decision.folder, store)
            layout = resolve_layout(job, store, encoder, opened.current, topology)
            recording.shared = shared = Pass.of(job, store, encoder, layout, opened.base)
            with _retaining(shared, job, opened.shards, beginning.run_id):
                result = _carry_out(recording, opened.current, opened.listing, publishes=publishes, releases=releases)
            recording.version, recording.published = result.version, result.published
    return replace(result, seconds=beginning.seconds, passed_over=opened.listing.passed_over)


@contextmanager
def _retaining(shared: Pass, job: JobConfig, shards: list[Shard], run_id: str = "") -> Iterator[None]:
    """Enforce retention after the block, also if it raises, so that runs that publish nothing remove old files as well.

    Parts that this run staged stay, so that the same command can continue.
    """
    folder = part_path(shared.encoder.space_id, shared.layout.layout_id)
    needs = retention.Needs(run_id=run_id, shards=frozenset(shard.id for shard in shards), folder=folder)
    try:
        yield
    except (GateFailed, IncompleteRun, VerificationFailed):
        retention.enforce(impatient(shared.store), job.retain, needs)
        raise
    retention.enforce(impatient(shared.store), job.retain, needs)


def _carry_out(
    recording: journal.Journal, current: Manifest | None, listing: Listing, *, publishes: bool, releases: bool
) -> RunResult:
    """Embed what is missing and publish it. If everything is missing, a sample is embedded and judged first."""
    job, shared, topology, shards = recording.job, recording.shared, recording.topology, listing.shards
    assert shared is not None
    store, space_id = shared.store, shared.encoder.space_id
    recording.before = current.version if current is not None else None
    replaces_space = current is not None and current.space_id != space_id and job.limit is None
    if current is not None and replaces_space and versions.newest_of(store, space_id, shared.layout.pins, current) is None:
        recording.doing = "embedding a sample"
        if not preview.embed_sample(job, shared, current, shards, topology, recording.effort):
            return RunResult.of(job.table, current.space_id, recording.effort).at(current)
    recording.doing = "embedding"
    effort = work.embed_missing(job, shared, shards, topology, recording.effort)
    result = RunResult.of(job.table, space_id, effort)
    if job.limit is not None:
        _clear_trial(shared)
    elif publishes:
        recording.doing = "publishing"
        before = current.space_id if current is not None else None
        manifest, is_new = publish.publish(job, shared, listing, replaces=before, releases=releases)
        result = result.at(manifest, published=is_new)
    return result


def _clear_trial(shared: Pass) -> None:
    """Remove the parts of a trial run that has ended: `status` would show them for days. If that fails, it is only logged."""
    try:
        staging.clear_layout(shared.store, shared.encoder.space_id, shared.layout)
    except (StorageError, StoreUnavailable) as error:
        say(f"the trial's staged parts could not be removed: {error}. A later run removes them.")


def publish_job(job: JobConfig, *, releases: bool = False, accepted: dict[str, str] | None = None) -> RunResult:
    """Publish what is staged, without embedding anything. `accepted` are gates that may fail, each with the reason.

    Raises ConfigError if nothing was embedded for this recipe yet; IncompleteRun, VerificationFailed or GateFailed.
    """
    beginning = Beginning.now()
    nothing = TableError(f"{job.table}: nothing was embedded with this recipe yet. Run `lora-embed run` first.")
    if not has_encoders(Store(job.table, job.table_storage_options)):
        raise nothing
    opened = open_job(job)
    opened.listing.say_passed()
    current, encoder, layout = opened.current, opened.encoder, opened.known_layout()
    if encoder is None or layout is None:
        raise nothing
    cluster.connect()
    before = current.space_id if current is not None else None
    with once_started(), versions.writing(opened.store, "publishing", encoder.space_id) as store:
        shared = Pass.of(job, store, encoder, layout, opened.base)
        with _retaining(shared, job, opened.shards):
            manifest, is_new = publish.publish(
                job, shared, opened.listing, replaces=before, releases=releases, accepted=accepted
            )
    result = RunResult(table=job.table, space_id=encoder.space_id, embedded=0, seconds=beginning.seconds)
    return result.at(manifest, published=is_new)


def _leave_as_it_is(beginning: Beginning, opened: OpenJob) -> RunResult:
    """End a run that has nothing to embed or publish: it is recorded, and retention is enforced."""
    current, job, store, layout = opened.current, opened.job, opened.store, opened.known_layout()
    assert current is not None
    assert layout is not None
    staging.clear_absorbed(store, current, layout)
    journal.leave_quiet(beginning, opened, current)
    retention.enforce(impatient(store), job.retain, retention.Needs(shards=frozenset(current.shards)))
    result = RunResult(
        table=job.table,
        space_id=current.space_id,
        embedded=0,
        seconds=beginning.seconds,
        passed_over=opened.listing.passed_over,
    )
    return result.at(current)
