"""A job from its file to a published version: encoder → plan → embed → verify → publish."""

import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from lora_embed import pipeline, plan, publish, table
from lora_embed.config import JobConfig, Recipe, load_recipe
from lora_embed.errors import IncompleteRun, TableError
from lora_embed.model.build import Ingredients, build_encoder, gather, match_adapters
from lora_embed.model.encoder import DESCRIPTION, Description, read_description
from lora_embed.progress import Progress, say
from lora_embed.read import count_samples
from lora_embed.schema import Layout, Manifest, Shard, WorkItem, encoder_path
from lora_embed.storage import Store


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

    def describe(self) -> str:
        """For a person, in a line."""
        counted = ", ".join(f"{number:,} {name}" for name, number in self.counts.items())
        done = f"embedded {self.embedded:,} samples in {self.seconds:.0f} s"
        if self.version is None:
            return f"{self.table}: {done}; not published"
        return f"{self.table}: version {self.version} {'published' if self.published else 'is current'} ({counted}); {done}"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run would do."""

    table: str
    space_id: str | None  # None: the encoder has yet to be built
    version: int | None  # current
    shards: int
    bytes: int
    done: int  # shards published or complete in staging
    partly_done: int
    to_embed: int
    to_embed_bytes: int
    removed: int  # shards of the current version that the input no longer holds

    def describe(self) -> str:
        """For a person."""
        encoder = f"space {self.space_id}" if self.space_id else "not built yet"
        return (
            f"table     {self.table}, {f'version {self.version}' if self.version else 'nothing published'}\n"
            f"encoder   {encoder}\n"
            f"input     {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB\n"
            f"done      {self.done:,} shards, and {self.partly_done:,} in part\n"
            f"to embed  {self.to_embed:,} shards, {self.to_embed_bytes / 1e6:,.1f} MB\n"
            f"removed   {self.removed:,} shards of the current version are not in the input"
        )


def plan_job(job: JobConfig) -> Outlook:
    """List input and table and say what a run would do; writes nothing and starts no cluster.

    Raises ConfigError as `run_job` does, for what can be seen by reading.
    """
    store = Store(job.table, job.table_storage_options)
    shards = plan.list_shards(job.input, job.input_storage_options)
    current = table.read_manifest(store)
    recipe = find_recipe(job.recipe)
    source = gather(recipe) if isinstance(recipe, Recipe) else recipe
    encoder = read_description(source) if isinstance(source, Path) else find_encoder(source, store)
    if encoder is None and not isinstance(source, Path):
        match_adapters(source)
    if encoder is not None:
        refuse_other_space(store, current, encoder)
    layout = known_layout(job, store, encoder, current) if encoder is not None else None
    if encoder is not None and layout is not None:
        items = find_work(job, store, encoder, layout, current, shards)
    else:
        items = [WorkItem(shard=shard) for shard in shards]
    published = set(current.shards) if current is not None else set()
    return Outlook(
        table=job.table,
        space_id=encoder.space_id if encoder else None,
        version=current.version if current else None,
        shards=len(shards),
        bytes=sum(shard.size for shard in shards),
        done=len(shards) - len(items),
        partly_done=sum(1 for item in items if item.done),
        to_embed=len(items),
        to_embed_bytes=sum(item.shard.size for item in items),
        removed=len(published - {shard.id for shard in shards}),
    )


def run_job(job: JobConfig, *, publishes: bool = True) -> RunResult:
    """Run a job to a published version, or to where it must stop.

    Raises a ConfigError before anything is written; IncompleteRun, VerificationFailed or GateFailed afterwards, when
    what is committed stays and the same call goes on.
    """
    started = time.monotonic()
    store = Store(job.table, job.table_storage_options)
    shards = plan.list_shards(job.input, job.input_storage_options)
    recipe = find_recipe(job.recipe)
    source = gather(recipe) if isinstance(recipe, Recipe) else recipe
    store.check_writable()
    current = table.read_manifest(store)
    known = find_encoder(source, store)
    if known is not None and current is not None and _is_current(job, store, known, current, shards):
        counts, seconds = current.counts, round(time.monotonic() - started, 2)
        return RunResult(
            table=job.table, space_id=known.space_id, embedded=0, version=current.version, counts=counts, seconds=seconds
        )

    with tempfile.TemporaryDirectory() as scratch:
        folder = None if known is not None else prepare_encoder(source, Path(scratch) / "encoder")
        prepared = known or read_description(cast(Path, folder))
        refuse_other_space(store, current, prepared)
        pipeline.connect()
        topology = pipeline.choose_topology(job.resources)  # the last that can refuse before anything is written
        encoder = prepared if folder is None else store_encoder(folder, store)
    layout = resolve_layout(job, store, encoder, current, topology)
    work = find_work(job, store, encoder, layout, current, shards)
    say(f"{len(shards)} shards: {len(shards) - len(work)} done, {len(work)} to embed")
    shared = pipeline.Job(input_options=job.input_storage_options, store=store, encoder=encoder, layout=layout)
    result = RunResult(table=job.table, space_id=encoder.space_id, embedded=embed(work, shared, topology))
    if publishes and job.limit is None:
        manifest, is_new = publish.publish(job, shared, shards)
        result = replace(result, version=manifest.version, published=is_new, counts=manifest.counts)
    return replace(result, seconds=round(time.monotonic() - started, 2))


def _is_current(job: JobConfig, store: Store, encoder: Description, current: Manifest, shards: list[Shard]) -> bool:
    """Does the current version hold exactly these shards, made as this job would make them? Then no cluster is needed."""
    refuse_other_space(store, current, encoder)
    layout = known_layout(job, store, encoder, current)
    if layout is None or job.limit is not None or set(current.shards) != {shard.id for shard in shards}:
        return False
    table.clear_absorbed(store, current, layout)
    return True


def embed(work: list[WorkItem], shared: pipeline.Job, topology: pipeline.Topology) -> int:
    """Embed all work items; returns the number of samples. Raises IncompleteRun naming the shards that failed."""
    if not work:
        return 0
    failures: dict[str, str] = {}
    with Progress([item.shard for item in work]) as progress:
        for stats in pipeline.embed_items(work, shared, topology):
            progress.add(stats)
            if stats.error:
                failures[stats.shard_id] = stats.error
    if failures:
        first = "\n".join(f"  {message}" for message in sorted(failures.values())[:10])
        raise IncompleteRun(
            f"{len(failures)} of {len(work)} shards are not complete, so nothing was published; "
            f"what was embedded is kept, and the same command goes on:\n{first}"
        )
    return progress.samples


def find_recipe(uri: str) -> Recipe | Path:
    """A recipe file's content, or the directory of an encoder built before."""
    if Path(uri).is_dir():
        read_description(Path(uri))
        return Path(uri)
    return load_recipe(uri)


def prepare_encoder(source: Ingredients | Path, out: Path) -> Path:
    """The directory of an encoder that the table has not: given, or built at `out`."""
    if isinstance(source, Path):
        return source
    build_encoder(source, out, say)
    return out


def find_encoder(source: Ingredients | Path, store: Store) -> Description | None:
    """The encoder that this content was built into before, if it is whole on the table's storage."""
    if isinstance(source, Path):
        return stored_encoder(store, read_description(source).space_id)
    recorded = store.read(f"recipes/{source.recipe_id}.json")
    return stored_encoder(store, json.loads(recorded)["space_id"]) if recorded is not None else None


def stored_encoder(store: Store, space_id: str) -> Description | None:
    """The description of an encoder that is whole on the table's storage."""
    raw = store.read(f"{encoder_path(space_id)}/{DESCRIPTION}")
    if raw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / DESCRIPTION).write_bytes(raw)
        return read_description(Path(folder))


def store_encoder(folder: Path, store: Store) -> Description:
    """Copy an encoder to the table, its description last, so that it is whole once that can be read."""
    description = read_description(folder)
    target = encoder_path(description.space_id)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.name == DESCRIPTION):
        store.create(f"{target}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    store.create(f"recipes/{description.recipe_id}.json", json.dumps({"space_id": description.space_id}).encode() + b"\n")
    return description


def refuse_other_space(store: Store, current: Manifest | None, encoder: Description) -> None:
    """Raises TableError when the table's current version holds vectors of another space than the encoder's."""
    if current is not None and current.space_id != encoder.space_id:
        raise TableError(
            f"{store.uri}: version {current.version} holds vectors of space {current.space_id}, this recipe makes space "
            f"{encoder.space_id}; vectors of two spaces never mix. Name another table, or the recipe that made this one."
        )


def resolve_layout(
    job: JobConfig, store: Store, encoder: Description, current: Manifest | None, topology: pipeline.Topology
) -> Layout:
    """The layout, with what `auto` leaves open taken from the table if it was resolved before, else from the device.

    Raises TableError when the current version was made with other settings that all rows share.
    """
    if (layout := known_layout(job, store, encoder, current)) is not None:
        return layout
    device = pipeline.ask_device(topology)
    resolved = json.dumps({"precision": device.precision, "batch_size": device.batch_size}).encode()
    store.create(resolved_path(encoder.space_id), resolved)
    layout = known_layout(job, store, encoder, current)
    assert layout is not None
    return layout


def known_layout(job: JobConfig, store: Store, encoder: Description, current: Manifest | None) -> Layout | None:
    """The layout by job and table alone; None where `auto` was never resolved for this table."""
    values: dict[str, Any] = {"precision": job.precision, "batch_size": job.batch_size}
    if "auto" in values.values():
        raw = store.read(resolved_path(encoder.space_id))
        if raw is None:
            return None
        values |= {key: value for key, value in json.loads(raw).items() if values[key] == "auto"}
    layout = Layout(
        **values,
        chunk_size=job.chunk_size,
        vector_type=job.vector_type,
        carry=tuple((carried.name, carried.type) for carried in job.carry),
        max_pixels=job.max_pixels,
        image_column=job.image_column,
        key_column=job.key_column,
        limit=job.limit,
    )
    if current is not None and current.pins != layout.pins:
        differing = [name for name, value in layout.pins.items() if current.pins[name] != value]
        raise TableError(
            f"{store.uri}: version {current.version} was made with other settings than this job: "
            + "; ".join(f"{name} {current.pins[name]!r}, now {layout.pins[name]!r}" for name in differing)
            + ". All rows of a table share them: set them back, or name another table."
        )
    return layout


def resolved_path(space_id: str) -> str:
    return f"staging/{space_id}/resolved.json"


def find_work(
    job: JobConfig, store: Store, encoder: Description, layout: Layout, current: Manifest | None, shards: list[Shard]
) -> list[WorkItem]:
    """Subtract what is published or staged from the listed shards; a trial run takes the first `limit` samples."""
    published = set(current.shards) if current is not None else set()
    staged = table.staged_parts(store, encoder.space_id, layout.layout_id)
    items = [
        WorkItem(shard=shard, done=frozenset(part.chunk for part in staged.get(shard.id, [])))
        for shard in shards
        if shard.id not in published and not table.is_complete(staged.get(shard.id, []))
    ]
    if job.limit is not None:
        items = _first_samples(items, job.limit, layout, job.input_storage_options)
    return items


def _first_samples(items: list[WorkItem], limit: int, layout: Layout, options: dict[str, Any]) -> list[WorkItem]:
    chosen = []
    for item in items:
        if limit <= 0:
            break
        samples = count_samples(item.shard, layout, options, limit)
        chosen.append(replace(item, limit=min(samples, limit)))
        limit -= samples
    return chosen
