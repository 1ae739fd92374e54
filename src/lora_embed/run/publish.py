"""Staged parts → the next version: verify, gates, compact, commit."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from lora_embed.chain import pipeline
from lora_embed.chain.items import Pass
from lora_embed.config.models import JobConfig
from lora_embed.errors import IncompleteRun, StorageError, StoreUnavailable, VerificationFailed
from lora_embed.gates import judge
from lora_embed.gates.checks import Gate
from lora_embed.monitor.progress import say
from lora_embed.run import work
from lora_embed.schema import Part, Shard
from lora_embed.shards.listing import Listing
from lora_embed.store.store import Store
from lora_embed.table import compact, staging, versions
from lora_embed.table.manifest import Manifest, ShardCounts, join_records, place_of
from lora_embed.table.rejects import describe_examples, describe_rejects, read_rejects
from lora_embed.text import agree, number_of

SHARDS_PER_TASK = 64  # to verify one takes milliseconds
BYTES_HERE = 2 * compact.DATA_FILE_BYTES  # vectors up to this size are compacted here, as starting a worker takes seconds


def publish(
    job: JobConfig,
    shared: Pass,
    listing: Listing,
    *,
    replaces: str | None = None,
    releases: bool = False,
    accepted: dict[str, str] | None = None,
) -> tuple[Manifest, bool]:
    """Publish the listed shards as the table's current version. Returns its manifest, and False if it existed already.

    `replaces` is the space whose vectors this run was started to replace; `releases` allows a space that a rollback holds
    back; `accepted` are gates that a person accepts although they fail, with the reason. Raises IncompleteRun,
    VerificationFailed or GateFailed. Staged parts are removed only once a version holds their rows.
    """
    store = shared.store
    by_id = {shard.id: shard for shard in listing.shards}
    hidden = judge.hidden(listing, judge.limits_of(job))
    while True:
        current = versions.manifest_to_follow(store)
        versions.refuse_held(current, shared.encoder.space_id, releases=releases)
        _refuse_backwards(store, current, shared.encoder.space_id, replaces)
        if current is not None and _holds(current, shared, set(by_id)):
            staging.clear_absorbed(store, current, shared.layout)
            return current, False
        try:
            manifest = _next_version(job, shared, current, by_id, accepted or {}, hidden)
            versions.refuse_gone(store, manifest)
            committed = versions.commit_version(store, manifest)
        except (IncompleteRun, VerificationFailed):
            if _version(versions.read_manifest(store)) == _version(current):
                raise
            continue  # another run published meanwhile and removed the parts that it absorbed
        if committed:
            _clear(shared, manifest)
            return manifest, True
        say(f"another run published version {manifest.version} meanwhile; planning the next version from it")


def _holds(version: Manifest, shared: Pass, shard_ids: set[str]) -> bool:
    """Does a version hold exactly these shards, with this pass's encoder and columns?"""
    is_same = (version.space_id, version.pins) == (shared.encoder.space_id, shared.layout.pins)
    return is_same and set(version.shards) == shard_ids


def _clear(shared: Pass, manifest: Manifest) -> None:
    """Remove the staged parts whose rows the new version holds. If that fails, it is only logged."""
    try:
        staging.clear_absorbed(shared.store, manifest, shared.layout)
    except (StorageError, StoreUnavailable) as error:
        say(
            f"version {manifest.version} is published, but its staged parts could not be removed: {error}. The next run "
            "removes them."
        )


def _refuse_backwards(store: Store, current: Manifest | None, space_id: str, replaces: str | None) -> None:
    """Raises IncompleteRun if another run has published a third space meanwhile, which this run must not undo."""
    if current is not None and current.space_id not in (space_id, replaces):
        raise IncompleteRun(
            f"{store.uri}: version {current.version} with vectors of space {current.space_id} was published while this run "
            f"embedded space {space_id}, so nothing was published. What was embedded is kept. To replace that version, run the "
            "same command again."
        )


def _version(manifest: Manifest | None) -> int:
    return manifest.version if manifest is not None else 0


def _next_version(
    job: JobConfig,
    shared: Pass,
    current: Manifest | None,
    shards: dict[str, Shard],
    accepted: dict[str, str],
    hidden: Gate,
) -> Manifest:
    """Write the files of the next version, check its gates, and return its manifest."""
    store, encoder, layout = shared.store, shared.encoder, shared.layout
    before = versions.newest_of(store, encoder.space_id, layout.pins, current)
    forgotten = current.forgotten if current is not None else ()
    reuse = compact.plan_reuse(before, set(shards), set(forgotten) - set(before.forgotten if before is not None else ()))
    kept_ids = set(before.shards) & set(shards) if before is not None else set()
    staged = staging.staged_parts(store, encoder.space_id, layout.layout_id)
    new_parts = {shard_id: staged.get(shard_id, []) for shard_id in shards if shard_id not in kept_ids}
    _refuse_incomplete(new_parts, shards)
    is_small = len(new_parts) <= SHARDS_PER_TASK
    sources, with_rejects = _verified_sources(shared, new_parts, shards, here=is_small)
    counts = join_records(record for source in sources for record in source.shards)
    rejects, removed = _shares(job, current, list(counts.values()), kept_ids)
    drift = _drift(job, shared, before, shards, staged) if before is not None else []
    shares = [_with_reasons(rejects, store, with_rejects, accepted), removed, hidden, *drift]
    judge.decide(job.table, shares, accepted)
    compactions = compact.plan_compactions([*reuse.sources, *sources], layout, encoder.space_id, encoder.dimension, forgotten)
    is_light = is_small and sum(task.vector_bytes for task in compactions) <= BYTES_HERE
    new_files = pipeline.map_tasks(compact.compact, (store,), compactions, here=is_light)
    health = judge.measure(shared, [data for data, _ in new_files], here=is_light)
    recorded_figures = before.lineage.get("figures") if before is not None else None
    manifest = compact.make_manifest(
        _version(current) + 1,
        encoder.space_id,
        encoder.dimension,
        new_files,
        reuse,
        gates={},
        pins=layout.pins,
        forgotten=forgotten,
        held={space: why for space, why in (current.held if current else {}).items() if space != encoder.space_id},
        lineage=_lineage_of(job, shared) | {"figures": recorded_figures or (health.to_dict() if health is not None else None)},
    )
    gates = [*shares, *judge.judge(shared, manifest, health, current, judge.limits_of(job))]
    return replace(manifest, gates=judge.decide(job.table, gates, accepted))


def _lineage_of(job: JobConfig, shared: Pass) -> dict[str, Any]:
    """The recipe, input and layout that a version comes from, and its retention settings."""
    return {
        "recipe_id": shared.encoder.recipe_id,
        "input": list(job.input),
        "layout": asdict(shared.layout),
        "retain": job.retain.model_dump(),
    }


def _verified_sources(
    shared: Pass, new_parts: dict[str, list[Part]], shards: dict[str, Shard], *, here: bool
) -> tuple[list[compact.Source], list[tuple[str, int]]]:
    """Check the footers of new shards' parts. Returns the parts as sources of data files, and those that hold rejects."""
    store, space_id, layout = shared.store, shared.encoder.space_id, shared.layout
    where = (store, space_id, layout)
    checked = pipeline.map_tasks(staging.verify_parts, where, list(new_parts.values()), each_has=SHARDS_PER_TASK, here=here)
    vector_bytes = compact.row_bytes(shared.encoder.dimension, layout.vector_type)
    sources, with_rejects = [], []
    for verified in checked:
        parts = staging.part_paths(space_id, layout, new_parts[verified.shard_id])
        sources += compact.cut_shard(shards[verified.shard_id], verified, parts, vector_bytes)
        with_rejects += [(path, rejects) for path, rejects in zip(parts, verified.rejects_of_parts, strict=True) if rejects]
    return sources, with_rejects


def _with_reasons(rejects: Gate, store: Store, files: list[tuple[str, int]], accepted: dict[str, str]) -> Gate:
    """The gate `rejects`; if it stops the version, with the reasons, their counts and a few examples."""
    if rejects.holds or rejects.name in accepted:
        return rejects
    counts, examples = read_rejects(store, files)
    return replace(rejects, says=f"{rejects.says}: {describe_rejects(counts)}", details=tuple(describe_examples(examples)))


def _drift(
    job: JobConfig, shared: Pass, before: Manifest, shards: dict[str, Shard], staged: dict[str, list[Part]]
) -> list[Gate]:
    """The gate that compares the parts that were embedded again with the version before; none if there are none."""
    chunks = work.choose_again(job, shared.layout, before, list(shards.values()))
    part_paths = [
        path
        for shard, chunk in chunks
        for part in staged.get(shard.id, [])
        if part.chunk == chunk
        for path in staging.part_paths(shared.encoder.space_id, shared.layout, [part])
    ]
    gate = judge.drift(shared, before, part_paths, job.reembed.drift)
    return [gate] if gate is not None else []


def _refuse_incomplete(new_parts: dict[str, list[Part]], shards: dict[str, Shard]) -> None:
    incomplete = [shards[shard_id].name for shard_id, parts in new_parts.items() if not staging.is_complete(parts)]
    if incomplete:
        raise IncompleteRun(
            f"{number_of(len(incomplete), 'shard')} {agree(len(incomplete), 'is', 'are')} not complete, such as "
            f"{incomplete[0]}. "
            "Run the same command again to continue."
        )


def _shares(job: JobConfig, current: Manifest | None, new_shards: list[ShardCounts], kept_ids: set[str]) -> list[Gate]:
    """The gates `rejects` and `removed`, which need counts alone, before anything is written.

    A group of loose images stays a shard also if most of its images are removed, so `removed` also counts images.
    """
    samples, rejects = _samples(new_shards), sum(shard.rejects for shard in new_shards)
    before = current.shards if current is not None else {}
    replaced = [shard for shard_id, shard in before.items() if shard_id not in kept_ids]
    samples_now, samples_before = _by_place(new_shards), _by_place(replaced)
    removed = sum(1 for shard in replaced if place_of(shard.name) not in samples_now)
    lost, total = (samples_before - samples_now).total(), _samples(before.values())
    figures = {
        "rejects": (
            rejects / max(samples, 1),
            job.max_rejects,
            f"{rejects:,} of {number_of(samples, 'new sample')} cannot be embedded",
        ),
        "removed": (
            max(removed / max(len(before), 1), lost / max(total, 1)),
            job.max_removed,
            f"{removed:,} of {number_of(len(before), 'shard')} and {lost:,} of {number_of(total, 'image')} of the version "
            "before are missing",
        ),
    }
    return [
        Gate(name=name, value=value, limit=limit, direction="at most", says=says)
        for name, (value, limit, says) in figures.items()
    ]


def _samples(shards: Iterable[ShardCounts]) -> int:
    return sum(shard.samples for shard in shards)


def _by_place(shards: Iterable[ShardCounts]) -> Counter[str]:
    samples: Counter[str] = Counter()
    for shard in shards:
        samples[place_of(shard.name)] += shard.samples
    return samples
