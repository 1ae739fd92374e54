"""Find what a job has yet to embed, and embed it, in up to three attempts."""

from dataclasses import replace
from typing import Any

from lora_embed.chain import cluster, pipeline
from lora_embed.chain.items import Pass, Staged, WorkItem
from lora_embed.config.models import JobConfig
from lora_embed.errors import IncompleteRun, WorkersLost
from lora_embed.model.description import Description
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.progress import Progress, say
from lora_embed.run import take_over
from lora_embed.schema import ChunkHead, Layout, Part, Shard
from lora_embed.shards.read import count_samples
from lora_embed.store.store import Store
from lora_embed.table import staging, versions
from lora_embed.table.known import KnownRows
from lora_embed.table.manifest import Manifest, prefixes_of_ids
from lora_embed.text import agree, number_of
from lora_embed.vectors.health import seeded_sample

ATTEMPTS = 3
NAMED = 10  # shards that failed, which a message names
MOST_IN_A_ROW = 8  # shards in a row that fail because a store does not answer, before the run is given up


def find_work(job: JobConfig, store: Store, encoder: Description, layout: Layout, shards: list[Shard]) -> list[WorkItem]:
    """The listed shards without those that are published or staged; for a trial run only the first `limit` samples.

    Each has the rows whose vectors may be taken over, of a version of the same space.
    """
    staged = staging.staged_parts(store, encoder.space_id, layout.layout_id)
    current = versions.read_manifest(store)  # read after the listing, since another run may publish and remove parts
    before = versions.newest_of(store, encoder.space_id, layout.pins, current)
    published = set(before.shards) if before is not None else set()
    missing = [shard for shard in shards if shard.id not in published and not staging.is_complete(staged.get(shard.id, []))]
    donor = before or take_over.find_donor(store, encoder, layout, current)
    known = take_over.known_rows(store, donor, layout, shards, missing) if donor is not None and missing else lambda _: None
    items = [_what_is_left(shard, staged.get(shard.id, []), store, encoder, known(shard)) for shard in missing]
    if job.limit is not None:
        items = _first_samples(items, job.limit, layout, job.input_storage_options)
    return items


def _what_is_left(shard: Shard, parts: list[Part], store: Store, encoder: Description, known: KnownRows | None) -> WorkItem:
    last = next((part.chunk for part in parts if part.last), None)
    staged = Staged(store=store, space_id=encoder.space_id, last=last) if parts else None
    return WorkItem(shard=shard, done=frozenset(part.chunk for part in parts), staged=staged, known=known)


def _first_samples(items: list[WorkItem], limit: int, layout: Layout, options: dict[str, Any]) -> list[WorkItem]:
    limited = []
    for item in items:
        if limit <= 0:
            break
        samples = count_samples(item.shard, layout, options, limit)
        limited.append(replace(item, limit=min(samples, limit)))
        limit -= samples
    return limited


def choose_unchanged(current: Manifest, shards: list[Shard], samples: int, seed: int = 0) -> list[Shard]:
    """Unchanged shards of a version, in a seeded order, until they hold that many samples.

    Shards that may hold a forgotten image come last, because parts that are embedded for comparison can stay staged for
    long.
    """
    unchanged = {shard.name: shard for shard in shards if shard.id in current.shards}
    forgotten_prefixes = prefixes_of_ids(current.forgotten) if current.forgotten else set()
    last = {name for name, shard in unchanged.items() if shard.prefix in forgotten_prefixes}
    sample, samples_chosen = [], 0
    for name in [*seeded_sample(unchanged.keys() - last, samples, seed), *seeded_sample(last, samples, seed)]:
        if samples_chosen >= samples:
            break
        sample.append(unchanged[name])
        samples_chosen += current.shards[unchanged[name].id].samples
    return sample


def choose_again(job: JobConfig, layout: Layout, before: Manifest, shards: list[Shard]) -> list[tuple[Shard, int]]:
    """A few unchanged shards, others for each version, and for each the chunk to embed again: see `judge.drift`."""
    if not job.reembed.drift or job.limit is not None:
        return []
    unchanged = choose_unchanged(before, shards, job.reembed.drift, seed=before.version)
    full_chunks = [before.shards[shard.id].samples // layout.chunk_size for shard in unchanged]
    return [(shard, before.version % max(1, full)) for shard, full in zip(unchanged, full_chunks, strict=True)]


def find_drift_work(job: JobConfig, shared: Pass, shards: list[Shard]) -> list[WorkItem]:
    """Chunks to embed again to notice drift, except those embedded again since the version was committed."""
    store, layout, space_id = shared.store, shared.layout, shared.encoder.space_id
    before = versions.newest_of(store, space_id, layout.pins, versions.read_manifest(store))
    if before is None:
        return []
    committed = store.info(versions.manifest_path(before.version))
    staged = staging.staged_parts(store, space_id, layout.layout_id)
    items = []
    for shard, chunk in choose_again(job, layout, before, shards):
        parts = [part for part in staged.get(shard.id, []) if part.chunk == chunk]
        (path,) = staging.part_paths(space_id, layout, parts) or (None,)
        entry = store.info(path) if path is not None else None
        if path is not None and entry is not None:
            if committed is not None and entry.modified > committed.modified:
                continue
            store.delete([path])  # the version was made from this part, so a comparison with it would show nothing
        chunks = -(-before.shards[shard.id].samples // layout.chunk_size)
        items.append(WorkItem(shard=shard, done=frozenset(range(chunks)) - {chunk}))
    return items


def embed_missing(
    job: JobConfig, shared: Pass, shards: list[Shard], topology: cluster.Topology, effort: Effort | None = None
) -> Effort:
    """Embed what is neither published nor staged.

    A few published chunks are embedded again as well, but not counted: their vectors must be the same as before. If workers
    were lost for good or a store did not answer, what is missing is tried again, in up to `ATTEMPTS` attempts. `effort`
    counts what was done, also if embedding fails. Raises IncompleteRun naming the shards that failed.
    """
    effort = effort or Effort()
    for attempt in range(1, ATTEMPTS + 1):
        work = find_work(job, shared.store, shared.encoder, shared.layout, shards)
        done = f"{len(shards) - len(work):,} done, " if job.limit is None else ""  # a trial run does not need the others
        say(f"{number_of(len(shards), 'shard')}: {done}{len(work):,} to embed")
        if not work:
            break
        effort.begin(len(work))
        failures: dict[str, ChunkHead] = {}
        with Progress([item.shard for item in work], topology.workers, effort=effort) as progress:
            try:
                _embed(work, find_drift_work(job, shared, shards), shared, topology, progress, failures)
            except WorkersLost as error:
                if attempt == ATTEMPTS:
                    raise
                say(f"{error}\nTrying again to embed what is missing.")
                continue
        if not failures:
            say_passed(effort.passed, is_named=bool(job.image_member))
            say_lacking(effort)
            break
        if attempt == ATTEMPTS or not all(failure.may_pass for failure in failures.values()):
            raise _incomplete(failures, work, len(shards))
        say(f"{number_of(len(failures), 'shard')} could not be read; trying again")
    return effort


def say_lacking(effort: Effort) -> None:
    """Say which carried fields some of the embedded samples do not have in their type."""
    if effort.lacking:
        by_name = ", ".join(f"{name} {number:,}" for name, number in effort.lacking.items())
        samples = number_of(effort.samples, "embedded sample")
        say(f"Of {samples}, these have no value for a carried field: {by_name}. There it is null")


def say_passed(passed: dict[str, int], *, is_named: bool) -> None:
    """Say which images of tars were passed over, because another one of the same sample was embedded, or they are hidden."""
    if passed:
        ordered = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
        by_kind = ", ".join(f"{kind} {number:,}" for kind, number in ordered)
        remedy = "" if is_named else ". To embed others, name them with image_member, such as image_member: left.png"
        say(f"Images in tars that are passed over, beside the image of their sample or hidden: {by_kind}{remedy}")


def _embed(
    work: list[WorkItem],
    drift_items: list[WorkItem],
    shared: Pass,
    topology: cluster.Topology,
    progress: Progress,
    failures: dict[str, ChunkHead],
) -> None:
    """Run the chain once and count what it yields. Raises IncompleteRun if many shards in a row fail."""
    in_a_row = 0
    uncounted = {item.shard.id for item in drift_items}
    for stats in pipeline.embed_items([*drift_items, *work], shared, topology):
        if stats.shard_id in uncounted:  # also if it failed: its vectors are published, and only the drift check lacks it
            continue
        progress.add(stats)
        in_a_row = in_a_row + 1 if stats.may_pass else 0
        if stats.error:
            failures[stats.shard_id] = stats
        if in_a_row >= MOST_IN_A_ROW:
            raise _incomplete(failures, work)


def _incomplete(failures: dict[str, ChunkHead], work: list[WorkItem], shards: int = 0) -> IncompleteRun:
    """The error that names the shards that failed, and says how to go on without those that will fail again.

    Where most of an input's `shards` fail, the cause is a permission or a disk, and leaving them out does not help.
    """
    first = "\n".join(f"  {message}" for message in sorted(failure.error for failure in failures.values())[:NAMED])
    lasting = sorted(places_to_leave_out(failures, work))
    lasting = lasting if len(lasting) <= NAMED and 2 * len(lasting) <= shards else []
    go_on = "Run the same command again to continue"
    if lasting:
        go_on += (
            " once the files below can be read. Or publish the others without them: with leave_out: "
            f"[{', '.join(lasting)}] in the job, they are counted as passed over"
        )
    of_all = f"{len(failures):,} of {number_of(len(work), 'shard')} {agree(len(failures), 'is', 'are')}"
    error = IncompleteRun(f"{of_all} not complete, so nothing was published. What was embedded is kept. {go_on}:\n{first}")
    error.advice = "correct or leave out what it names, then run it again" if lasting else error.advice
    return error


def places_to_leave_out(failures: dict[str, ChunkHead], work: list[WorkItem]) -> set[str]:
    """The files that can be left out of the input, of shards that failed for another reason than a store's silence.

    Of loose images, this is the file that the error names. A list of references is no such file: its rows name the images.
    """
    places = set()
    for shard in (item.shard for item in work if item.shard.id in failures):
        failure = failures[shard.id]
        named = failure.error.partition(": ")[0]
        if not failure.may_pass and shard.kind != "references" and named.startswith(shard.root):
            places.add(named if shard.kind == "images" else f"{shard.root.rstrip('/')}/{shard.name}")
    return places
