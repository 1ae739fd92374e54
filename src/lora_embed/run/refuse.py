"""Checks before a run writes anything: all nodes must reach its paths, and its space must be the table's."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_embed.chain import cluster
from lora_embed.errors import ConfigError, TableError
from lora_embed.model.description import BaseReference, Description
from lora_embed.monitor.progress import say
from lora_embed.run.layout import any_layout
from lora_embed.run.open import OpenJob
from lora_embed.schema import Shard
from lora_embed.shards.look import absent_fields, unusable
from lora_embed.store.store import Store
from lora_embed.table import versions

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job


def refuse_local_paths(opened: OpenJob, base: BaseReference | None) -> None:
    """Raises ConfigError for a table inside a submitted folder, and for local paths on a cluster of several nodes."""
    job, store = opened.job, opened.store
    if SUBMITTED in os.environ and store.is_local and Path(job.table).is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{job.table}: is in Ray's copy of the submitted folder, which Ray removes after the job. Name a table outside of "
            "it, such as s3://…"
        )
    local = local_places(store, opened.shards, job.input_storage_options)
    if base is not None and os.path.isabs(base.uri):  # each node rebuilds the encoder from it
        local.append(base.uri)
    if not job.shared_filesystem:
        refuse_unshared(
            local,
            "Use a URI that all nodes reach, such as s3://…, or set shared_filesystem to true if all nodes mount the path.",
        )


def refuse_unusable(opened: OpenJob) -> None:
    """Raises ConfigError if no image can be read from the first shards, because the job names other columns or members."""
    problem = unusable(opened.shards, any_layout(opened.job), opened.job.input_storage_options)
    if problem is not None:
        raise ConfigError(problem)


def refuse_absent_fields(opened: OpenJob) -> None:
    """Raises ConfigError for a carried field that no sample seems to have; if the table has the column, that is only said."""
    job, current = opened.job, opened.current
    needed = tuple((carried.name, carried.type) for carried in job.carry if not carried.optional)
    layout = replace(any_layout(job), carry=needed)
    absent = absent_fields(opened.shards, layout, job.input_storage_options)
    if not absent:
        return
    says = "\n".join(f"carry names {absence.describe()}." for absence in absent)
    columns = current.pins["carry"] if current is not None else []
    if all([absence.name, absence.type] in columns for absence in absent):
        say(f"{says} Its column will be null.", level="warning")
        return
    example = f"carry: [{{name: {absent[0].name}, optional: true}}]"
    raise ConfigError(f"{says} Correct carry in the job. If few samples have it, begin all the same with {example}.")


def local_places(store: Store, shards: Iterable[Shard], input_options: dict[str, Any]) -> list[str]:
    """Those of the store and the roots of these shards that are local paths. A list itself is read by the driver alone."""
    lists = {shard.rows.folder for shard in shards if shard.rows is not None and shard.rows.has_local}
    roots = lists | {shard.root for shard in shards if shard.rows is None and Store(shard.root, input_options).is_local}
    return [store.uri] * store.is_local + sorted(roots)


def refuse_unshared(local: list[str], remedy: str) -> None:
    """Raises ConfigError for local paths on a cluster of several nodes, each of which has its own disks."""
    nodes = cluster.count_nodes()
    if local and nodes > 1:
        raise ConfigError(f"{local[0]} is a local path, but this cluster has {nodes} nodes with separate disks. {remedy}")


def refuse_space(opened: OpenJob, encoder: Description, *, replaces: bool, releases: bool) -> None:
    """Raises TableError or GateFailed for a space that this run may not publish: not the table's, or held back."""
    if not replaces:
        refuse_other_space(opened, encoder)
    versions.refuse_held(opened.current, encoder.space_id, releases=releases)


def refuse_other_space(opened: OpenJob, encoder: Description) -> None:
    """Raises TableError if the table's current version holds vectors of another space than the encoder's."""
    current = opened.current
    if current is not None and current.space_id != encoder.space_id:
        raise TableError(
            f"{opened.store.uri}: version {current.version} holds vectors of space {current.space_id}, but this recipe makes "
            f"space {encoder.space_id}, and vectors of two spaces must never mix. Name another table, or the recipe that made "
            "this table. To replace all vectors, run `lora-embed run` with --nightly, or jobs/reembed_nightly.py."
        )
