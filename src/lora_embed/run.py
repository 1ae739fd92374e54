"""A job from its file to a published version: encoder → plan → embed → verify → publish."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_embed import cluster, journal, judge, pipeline, plan, preview, publish, retention, staging, versions, work
from lora_embed.config import JobConfig, load_recipe
from lora_embed.errors import ConfigError, EncoderError, GateFailed, IncompleteRun, TableError, VerificationFailed, once_started
from lora_embed.foreign import DeviceRecord, RecipeRecord, read_record
from lora_embed.manifest import Manifest
from lora_embed.model.description import (
    DESCRIPTION,
    BaseReference,
    Description,
    files_of,
    read_description,
)
from lora_embed.model.follow import refuse_elsewhere
from lora_embed.model.keep import keep_id
from lora_embed.progress import say
from lora_embed.runs import impatient
from lora_embed.schema import Layout, Shard, encoder_path
from lora_embed.storage import Store
from lora_embed.write import part_path

if TYPE_CHECKING:
    from lora_embed.model.build import Ingredients

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run did; `version` is None when nothing was published."""

    table: str
    space_id: str
    embedded: int  # samples that this run decoded, rejects included
    version: int | None = None
    published: bool = False  # by this run
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage, summed over the workers
    bound: str | None = None  # the stage that the run had to wait for

    def describe(self) -> str:
        """For a person, in a line."""
        counted = ", ".join(f"{number:,} {name}" for name, number in self.counts.items())
        done = f"embedded {self.embedded:,} samples in {self.seconds:.0f} s"
        if self.version is None:
            return f"{self.table}: {done}; not published"
        return f"{self.table}: version {self.version} {'published' if self.published else 'is current'} ({counted}); {done}"


def run_job(job: JobConfig, *, publishes: bool = True, replaces: bool = False, releases: bool = False) -> RunResult:
    """Run a job to a published version, or to where it must stop.

    With `replaces`, vectors of another space may take the place of the table's: all of them are embedded anew while the
    current version stays, as the nightly run does; with `releases`, also those that a rollback holds back. Raises a
    ConfigError before anything is written; IncompleteRun, VerificationFailed or GateFailed afterwards, when what is
    committed stays and the same call goes on.
    """
    beginning = journal.begin(job)
    judge.limits_of(job)
    store, shards = list_input(job)
    source = find_source(job.recipe)
    store.check_writable()
    current = versions.manifest_to_follow(store)
    base, known = named_base(source), find_encoder(source, store)
    if known is not None:
        _refuse_space(store, current, known, replaces=replaces, releases=releases)
    if known is not None and current is not None and _is_current(job, store, known, current, shards):
        journal.leave_quiet(beginning, job, store, current)
        retention.enforce(impatient(store), job.retain, retention.Needs(shards=frozenset(current.shards)))
        counts, seconds = current.counts, beginning.seconds
        return RunResult(
            table=job.table, space_id=known.space_id, embedded=0, version=current.version, counts=counts, seconds=seconds
        )

    with tempfile.TemporaryDirectory() as scratch:
        folder = None if known is not None else prepare_encoder(source, Path(scratch) / "encoder")
        if folder is not None and current is not None:
            folder = keep_id(
                folder, Path(scratch) / "kept", f"{store.uri}/{encoder_path(current.space_id)}", store.options, base
            )
        prepared = known or read_description(cast(Path, folder))
        _refuse_space(store, current, prepared, replaces=replaces, releases=releases)
        cluster.connect()
        topology = cluster.choose_topology(job.resources)
        refuse_local_paths(job, shards, store, prepared.base)
        store = versions.claim(store)  # the last that can refuse, and the first that writes
        with once_started(), journal.recorded(beginning, job, store, prepared.space_id, topology) as recording:
            encoder = renew_encoder(known, store, job.retain.grace_days) if folder is None else store_encoder(folder, store)
            layout = resolve_layout(job, store, encoder, current, topology)
            recording.shared = shared = pipeline.Job.of(job, store, encoder, layout, base)
            with _retaining(shared, job, shards, beginning.run_id):
                result = _carry_out(recording, current, shards, publishes=publishes, releases=releases)
            recording.version, recording.published = result.version, result.published
    return replace(result, seconds=beginning.seconds)


@contextmanager
def _retaining(shared: pipeline.Job, job: JobConfig, shards: list[Shard], run_id: str = "") -> Iterator[None]:
    """Retention is enforced whatever becomes of the block: also by nights that publish nothing, however many.

    What was staged for it stays, since the same command goes on with it.
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
    recording: journal.Journal, current: Manifest | None, shards: list[Shard], *, publishes: bool, releases: bool
) -> RunResult:
    """Embed what is missing, a sample first where all of it is, and publish it."""
    job, shared, topology = recording.job, recording.shared, recording.topology
    assert shared is not None
    store, space_id = shared.store, shared.encoder.space_id
    recording.before = current.version if current is not None else None
    if current is not None and job.limit is None and versions.newest_of(store, space_id, shared.layout.pins, current) is None:
        recording.doing = "embedding a sample"
        if not preview.embed_sample(job, shared, current, shards, topology, recording.effort):
            embedded, counts = recording.effort.samples, current.counts
            held, version = current.space_id, current.version
            return RunResult(table=job.table, space_id=held, embedded=embedded, version=version, counts=counts)
    recording.doing = "embedding"
    effort = work.embed_missing(job, shared, shards, topology, recording.effort)
    result = RunResult(
        table=job.table,
        space_id=space_id,
        embedded=effort.samples,
        stages={stage: round(seconds, 3) for stage, seconds in effort.seconds.items()},
        bound=effort.bound.by if effort.bound else None,
    )
    if publishes and job.limit is None:
        recording.doing = "publishing"
        before = current.space_id if current is not None else None
        manifest, is_new = publish.publish(job, shared, shards, replaces=before, releases=releases)
        result = replace(result, version=manifest.version, published=is_new, counts=manifest.counts)
    return result


def publish_job(job: JobConfig, *, releases: bool = False, accepted: dict[str, str] | None = None) -> RunResult:
    """Publish what is staged, without embedding anything; `accepted` gates are let through, each with a reason.

    Raises ConfigError when nothing was ever embedded for this recipe; IncompleteRun, VerificationFailed or GateFailed.
    """
    started = time.monotonic()
    store, shards = list_input(job)
    source = find_source(job.recipe)
    current, encoder = versions.manifest_to_follow(store), find_encoder(source, store)
    layout = known_layout(job, store, encoder, current) if encoder is not None else None
    if encoder is None or layout is None:
        raise TableError(f"{job.table}: nothing was embedded there with this recipe yet. Use `lora-embed run`.")
    cluster.connect()
    before = current.space_id if current is not None else None
    with once_started(), versions.writing(store, "publishing", encoder.space_id) as store:
        shared = pipeline.Job.of(job, store, encoder, layout, named_base(source))
        with _retaining(shared, job, shards):
            manifest, is_new = publish.publish(job, shared, shards, replaces=before, releases=releases, accepted=accepted)
    return RunResult(
        table=job.table,
        space_id=encoder.space_id,
        embedded=0,
        version=manifest.version,
        published=is_new,
        counts=manifest.counts,
        seconds=round(time.monotonic() - started, 2),
    )


def _is_current(job: JobConfig, store: Store, encoder: Description, current: Manifest, shards: list[Shard]) -> bool:
    """Does the current version hold exactly these shards, made as this job would make them? Then no cluster is needed."""
    if current.space_id != encoder.space_id:
        return False
    layout = known_layout(job, store, encoder, current)
    if layout is None or job.limit is not None or set(current.shards) != {shard.id for shard in shards}:
        return False
    staging.clear_absorbed(store, current, layout)
    return True


def list_input(job: JobConfig) -> tuple[Store, list[Shard]]:
    """The table's store and the input's shards; what cannot be reached is said before anything else."""
    store = Store(job.table, job.table_storage_options)
    store.check_reachable()
    return store, plan.list_shards(job.input, job.input_storage_options, follows=job.follow_folder_links)


def refuse_local_paths(job: JobConfig, shards: list[Shard], store: Store, base: BaseReference | None) -> None:
    """Raises ConfigError for a table that goes with the job, and when several nodes would each look on disks of their own."""
    if SUBMITTED in os.environ and store.is_local and Path(job.table).is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{job.table} lies in Ray's copy of the submitted folder and would be lost with it. Name a table outside of it, "
            "such as s3://…"
        )
    roots = {shard.root for shard in shards if Store(shard.root, job.input_storage_options).is_local}
    local = [job.table] * store.is_local + sorted(roots)
    if base is not None and os.path.isabs(base.uri):  # each node rebuilds the encoder from it
        local.append(base.uri)
    nodes = cluster.count_nodes()
    if local and nodes > 1 and not job.shared_filesystem:
        raise ConfigError(
            f"{local[0]} is a local path, but this cluster has {nodes} nodes, each with disks of its own. "
            "Use a URI that all nodes reach, such as s3://…, or set shared_filesystem to true if they all mount it there."
        )


def find_source(uri: str) -> "Ingredients | Path":
    """What a recipe file names, read and hashed, or the directory of an encoder built before."""
    if Path(uri).is_dir():
        read_description(Path(uri))
        return Path(uri)
    recipe = load_recipe(uri)
    from lora_embed.model.build import gather  # with torch and peft, which take seconds

    return gather(recipe)


def named_base(source: "Ingredients | Path") -> str | None:
    """Where the base lies, by the word of the user: of a recipe, or of an encoder in a directory that the user names.

    Raises EncoderError where such an encoder names a base that lies elsewhere.
    """
    if not isinstance(source, Path):
        return source.recipe.base_model
    base = read_description(source).base
    if base is not None:
        refuse_elsewhere(base.uri, str(source))
    return base.uri if base is not None else None


def prepare_encoder(source: "Ingredients | Path", out: Path) -> Path:
    """The directory of an encoder that the table has not: given, or built at `out`."""
    if isinstance(source, Path):
        return source
    from lora_embed.model.build import build_encoder

    build_encoder(source, out, say)
    return out


def find_encoder(source: "Ingredients | Path", store: Store) -> Description | None:
    """The encoder that this content was built into before, if it is whole on the table's storage."""
    if isinstance(source, Path):
        return stored_encoder(store, read_description(source).space_id)
    recorded = read_record(store, record_path(source.recipe_id), RecipeRecord)
    return stored_encoder(store, recorded.space_id) if recorded is not None else None


def stored_encoder(store: Store, space_id: str) -> Description | None:
    """The description of an encoder that is whole on the table's storage."""
    raw = store.read(f"{encoder_path(space_id)}/{DESCRIPTION}")
    if raw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / DESCRIPTION).write_bytes(raw)
        description = read_description(Path(folder))
    if description.space_id != space_id:
        raise EncoderError(
            f"{store.name(encoder_path(space_id))}: holds an encoder that says it is of space {description.space_id}. It was "
            "changed since: bring it back, or remove it."
        )
    return description


def record_path(recipe_id: str) -> str:
    return f"recipes/{recipe_id}.json"


def renew_encoder(encoder: Description | None, store: Store, grace_days: float) -> Description:
    """Write an old encoder's description again: one that no version refers to is removed after the grace period.

    Raises IncompleteRun where that has just happened.
    """
    assert encoder is not None
    path = f"{encoder_path(encoder.space_id)}/{DESCRIPTION}"
    entry, data = store.info(path), store.read(path)
    if entry is None or data is None:
        raise IncompleteRun(f"{store.name(path)}: was removed while this run began. Run the same command again.")
    if store.now() - entry.modified > grace_days * retention.DAY_S / 2:
        store.replace(path, data)
    return encoder


def store_encoder(folder: Path, store: Store) -> Description:
    """Copy an encoder to the table, its description last, so that it is whole once that can be read.

    Returns the table's encoder of this recipe. That is another one where a run on another kind of processor, whose numbers
    differ in their last digits, has stored its own in the meantime: a recipe has one space in a table.
    """
    description = read_description(folder)
    target, record = encoder_path(description.space_id), record_path(description.recipe_id)
    own = json.dumps({"space_id": description.space_id}).encode() + b"\n"
    for file in sorted(files_of(folder, description, str(folder)), key=lambda file: (file.name == DESCRIPTION, file)):
        store.create(f"{target}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    if not store.create(record, own):
        recorded = read_record(store, record, RecipeRecord)
        settled = stored_encoder(store, recorded.space_id if recorded is not None else description.space_id)
        if settled is not None:
            return settled
        store.replace(record, own)  # its encoder was removed, since no version needed it
    return description


def _refuse_space(store: Store, current: Manifest | None, encoder: Description, *, replaces: bool, releases: bool) -> None:
    if not replaces:
        refuse_other_space(store, current, encoder)
    versions.refuse_held(current, encoder.space_id, releases=releases)


def refuse_other_space(store: Store, current: Manifest | None, encoder: Description) -> None:
    """Raises TableError when the table's current version holds vectors of another space than the encoder's."""
    if current is not None and current.space_id != encoder.space_id:
        raise TableError(
            f"{store.uri}: version {current.version} holds vectors of space {current.space_id}, this recipe makes space "
            f"{encoder.space_id}; vectors of two spaces never mix. Name another table or the recipe that made this one, or "
            "let jobs/reembed_nightly.py replace them all."
        )


def resolve_layout(
    job: JobConfig, store: Store, encoder: Description, current: Manifest | None, topology: cluster.Topology
) -> Layout:
    """The layout, with what `auto` leaves open taken from the table if it was resolved before, else from the device.

    Raises TableError when the current version was made with other settings that all rows share.
    """
    if (layout := known_layout(job, store, encoder, current)) is not None:
        return layout
    store.create(resolved_path(encoder.space_id), json.dumps(ask_device(topology)).encode())
    layout = known_layout(job, store, encoder, current)
    assert layout is not None
    return layout


def known_layout(job: JobConfig, store: Store, encoder: Description, current: Manifest | None) -> Layout | None:
    """The layout by job and table alone; None where `auto` was never resolved for this table."""
    resolved: dict[str, Any] = {}
    if leaves_open(job):
        device = read_record(store, resolved_path(encoder.space_id), DeviceRecord)
        if device is None:
            return None
        resolved = asdict(device)
    layout = layout_of(job, resolved)
    if current is not None and current.pins != layout.pins:
        differing = [name for name, value in layout.pins.items() if current.pins[name] != value]
        raise TableError(
            f"{store.uri}: version {current.version} was made with other settings than this job: "
            + "; ".join(f"{name} {current.pins[name]!r}, now {layout.pins[name]!r}" for name in differing)
            + ". All rows of a table share them: set them back, or name another table."
        )
    return layout


def leaves_open(job: JobConfig) -> bool:
    """Is precision or batch size up to the device?"""
    return "auto" in (job.precision, job.batch_size)


def ask_device(topology: cluster.Topology) -> dict[str, Any]:
    """What `auto` is on the device of the actors."""
    device = pipeline.ask_device(topology)
    return {"precision": device.precision, "batch_size": device.batch_size}


def layout_of(job: JobConfig, resolved: dict[str, Any]) -> Layout:
    """The job's layout, with `precision` and `batch_size` as resolved where the job leaves them to the device."""
    return Layout(
        precision=resolved["precision"] if job.precision == "auto" else job.precision,
        batch_size=resolved["batch_size"] if job.batch_size == "auto" else job.batch_size,
        chunk_size=job.chunk_size,
        vector_type=job.vector_type,
        carry=tuple((carried.name, carried.type) for carried in job.carry),
        max_pixels=job.max_pixels,
        max_bytes=job.max_bytes,
        image_column=job.image_column,
        key_column=job.key_column,
        limit=job.limit,
    )


def resolved_path(space_id: str) -> str:
    return f"staging/{space_id}/resolved.json"
