"""Staged parts → the next version: verify, gates, compact, commit."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from lora_embed.chain import pipeline
from lora_embed.config.models import JobConfig
from lora_embed.errors import IncompleteRun, StorageError, StoreUnavailable, VerificationFailed
from lora_embed.gates import judge
from lora_embed.gates.checks import Gate
from lora_embed.monitor.progress import say
from lora_embed.run import work
from lora_embed.schema import Part, Shard
from lora_embed.store.store import Store
from lora_embed.table import compact, staging, versions
from lora_embed.table.manifest import Manifest, ShardCounts, join_records

SHARDS_PER_TASK = 64  # to verify one takes milliseconds
BYTES_HERE = 2 * compact.DATA_FILE_BYTES  # of vectors that are compacted in this process: a worker takes seconds to start
_GROUP = re.compile(r"/#\d+of\d+$")  # as `plan._image_groups` names them


def publish(
    job: JobConfig,
    shared: pipeline.Job,
    shards: list[Shard],
    *,
    replaces: str | None = None,
    releases: bool = False,
    accepted: dict[str, str] | None = None,
) -> tuple[Manifest, bool]:
    """Make the shards the table's current version; False beside the manifest when they already are.

    `replaces` is the space whose vectors the run set out to replace, if another one; `releases` publishes a space that a
    rollback holds back; `accepted` are gates that a person lets through, with the reason. Raises IncompleteRun,
    VerificationFailed or GateFailed; staged parts are removed only once a version holds their rows.
    """
    store = shared.store
    wanted = {shard.id: shard for shard in shards}
    while True:
        current = versions.manifest_to_follow(store)
        versions.refuse_held(current, shared.encoder.space_id, releases=releases)
        _refuse_backwards(store, current, shared.encoder.space_id, replaces)
        if current is not None and current.space_id == shared.encoder.space_id and set(current.shards) == set(wanted):
            staging.clear_absorbed(store, current, shared.layout)
            return current, False
        try:
            manifest = _next_version(job, shared, current, wanted, accepted or {})
            versions.refuse_gone(store, manifest)
            committed = versions.commit_version(store, manifest)
        except (IncompleteRun, VerificationFailed):
            if _version(versions.read_manifest(store)) == _version(current):
                raise
            continue  # another run published meanwhile and removed the parts that it absorbed
        if committed:
            _clear(shared, manifest)
            return manifest, True
        say(f"version {manifest.version} was published by another run meanwhile; planning again from it")


def _clear(shared: pipeline.Job, manifest: Manifest) -> None:
    """Remove the parts that the new version has absorbed; it is published whether or not that succeeds."""
    try:
        staging.clear_absorbed(shared.store, manifest, shared.layout)
    except (StorageError, StoreUnavailable) as error:
        say(f"version {manifest.version} is published, but what it replaces could not be cleared; the next one will: {error}")


def _refuse_backwards(store: Store, current: Manifest | None, space_id: str, replaces: str | None) -> None:
    """A run that took long must not put back what another one has replaced meanwhile."""
    if current is not None and current.space_id not in (space_id, replaces):
        raise IncompleteRun(
            f"{store.uri}: version {current.version} has vectors of space {current.space_id} by now, published while this run "
            f"made those of space {space_id}. What was embedded is kept: if that is still wanted, run it again."
        )


def _version(manifest: Manifest | None) -> int:
    return manifest.version if manifest is not None else 0


def _next_version(
    job: JobConfig, shared: pipeline.Job, current: Manifest | None, wanted: dict[str, Shard], accepted: dict[str, str]
) -> Manifest:
    """The next version's manifest, its files written and its gates passed."""
    store, encoder, layout = shared.store, shared.encoder, shared.layout
    before = versions.newest_of(store, encoder.space_id, layout.pins, current)
    forgotten = current.forgotten if current is not None else ()
    reuse = compact.plan_reuse(before, set(wanted), set(forgotten) - set(before.forgotten if before is not None else ()))
    kept = set(before.shards) & set(wanted) if before is not None else set()
    staged = staging.staged_parts(store, encoder.space_id, layout.layout_id)
    new = {shard_id: staged.get(shard_id, []) for shard_id in wanted if shard_id not in kept}
    _refuse_incomplete(new, wanted)
    few = len(new) <= SHARDS_PER_TASK
    sources = _verified_sources(shared, new, wanted, here=few)
    counts = join_records(record for source in sources for record in source.shards)
    shares = _shares(job, current, list(counts.values()), kept)
    if before is not None:
        again = _embedded_again(job, shared, before, wanted, staged)
        drift = judge.drift(shared, before, again, job.reembed.drift)
        shares += [drift] if drift is not None else []
    judge.decide(job.table, shares, accepted)
    compactions = compact.plan_compactions([*reuse.sources, *sources], layout, encoder.space_id, encoder.dimension, forgotten)
    light = few and sum(task.vector_bytes for task in compactions) <= BYTES_HERE
    written = pipeline.map_tasks(compact.compact, (store,), compactions, here=light)
    health = judge.measure(shared, [data for data, _ in written], here=light)
    known = before.lineage.get("figures") if before is not None else None
    manifest = compact.make_manifest(
        _version(current) + 1,
        encoder.space_id,
        encoder.dimension,
        written,
        reuse,
        gates={},
        pins=layout.pins,
        forgotten=forgotten,
        held={space: why for space, why in (current.held if current else {}).items() if space != encoder.space_id},
        lineage=_lineage_of(job, shared) | {"figures": known or (health.to_dict() if health is not None else None)},
    )
    judged = [*shares, *judge.judge(shared, manifest, health, current, judge.limits_of(job))]
    return replace(manifest, gates=judge.decide(job.table, judged, accepted))


def _lineage_of(job: JobConfig, shared: pipeline.Job) -> dict[str, Any]:
    """Where a version comes from, and how long what it leaves behind is kept."""
    return {
        "recipe_id": shared.encoder.recipe_id,
        "input": list(job.input),
        "layout": asdict(shared.layout),
        "retain": job.retain.model_dump(),
    }


def _verified_sources(
    shared: pipeline.Job, new: dict[str, list[Part]], wanted: dict[str, Shard], *, here: bool
) -> list[compact.Source]:
    """What the parts of new shards give to data files, once their footers are checked."""
    store, space_id, layout = shared.store, shared.encoder.space_id, shared.layout
    where = (store, space_id, layout)
    checked = pipeline.map_tasks(staging.verify_parts, where, list(new.values()), each_has=SHARDS_PER_TASK, here=here)
    vector_bytes = compact.row_bytes(shared.encoder.dimension, layout.vector_type)
    sources = []
    for verified in checked:
        parts = staging.part_paths(space_id, layout, new[verified.shard_id])
        sources += compact.cut_shard(wanted[verified.shard_id], verified, parts, vector_bytes)
    return sources


def _embedded_again(
    job: JobConfig, shared: pipeline.Job, before: Manifest, wanted: dict[str, Shard], staged: dict[str, list[Part]]
) -> list[str]:
    """Paths of the parts that were embedded again to notice drift; of all others that a version holds, none is read."""
    chosen = work.choose_again(job, shared.layout, before, list(wanted.values()))
    return [
        path
        for shard, chunk in chosen
        for part in staged.get(shard.id, [])
        if part.chunk == chunk
        for path in staging.part_paths(shared.encoder.space_id, shared.layout, [part])
    ]


def _refuse_incomplete(new: dict[str, list[Part]], wanted: dict[str, Shard]) -> None:
    incomplete = [wanted[shard_id].name for shard_id, parts in new.items() if not staging.is_complete(parts)]
    if incomplete:
        raise IncompleteRun(f"{len(incomplete)} shards are not complete, first {incomplete[0]}; run the same command again")


def _shares(job: JobConfig, current: Manifest | None, new: list[ShardCounts], kept: set[str]) -> list[Gate]:
    """The gates that counts alone decide, before anything is written.

    A group of loose images is there whatever it still holds, so `removed` looks at images as well as at shards.
    """
    samples, rejects = _samples(new), sum(shard.rejects for shard in new)
    before = current.shards if current is not None else {}
    replaced = [shard for shard_id, shard in before.items() if shard_id not in kept]
    now, then = _by_place(new), _by_place(replaced)
    removed = sum(1 for shard in replaced if _place(shard) not in now)
    lost, held = (then - now).total(), _samples(before.values())
    figures = {
        "rejects": (rejects / max(samples, 1), job.max_rejects, f"{rejects:,} of {samples:,} new samples cannot be embedded"),
        "removed": (
            max(removed / max(len(before), 1), lost / max(held, 1)),
            job.max_removed,
            f"{removed:,} of {len(before):,} shards and {lost:,} of {held:,} images of the version before are gone",
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
        samples[_place(shard)] += shard.samples
    return samples


def _place(shard: ShardCounts) -> str:
    """A shard's name, or the folder of loose images, whose groups are dealt anew when it has doubled."""
    return _GROUP.sub("", shard.name)
