"""The gates after compaction: measure a version's files on storage before it is created, and compare it with the current."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lora_embed.chain import pipeline
from lora_embed.chain.items import Pass
from lora_embed.config.foreign import read_json, taken_as
from lora_embed.config.models import JobConfig, check_options
from lora_embed.errors import GateFailed
from lora_embed.gates import checks
from lora_embed.gates.checks import Gate, Limits
from lora_embed.model import golden
from lora_embed.model.description import DESCRIPTION
from lora_embed.schema import encoder_path
from lora_embed.shards.listing import Listing
from lora_embed.store.store import Store
from lora_embed.table.manifest import FileEntry, Manifest
from lora_embed.table.parquet import file_batches, read_rows
from lora_embed.table.read import Table
from lora_embed.text import agree, number_of
from lora_embed.vectors.health import Figures, Health, combine, measure_rows, seeded_sample

Rows = dict[str, dict[str, Any]]
SAMPLE_SHARDS, SAMPLE_IMAGES = 200, 2000
FLOAT16_STEP = 2**-10  # relative step between float16 values; two almost equal values may be rounded to different ones
LABEL = "label"  # the carried field that evaluation takes for an image's class


def limits_of(job: JobConfig) -> Limits:
    """The job's limits, with defaults for those that it does not set. Raises ConfigError for an unknown name."""
    types_and_defaults = {limit.name: (float, limit.default) for limit in fields(Limits)}
    return Limits(**check_options("gates", types_and_defaults, job.gates))


def hidden(listing: Listing, limits: Limits) -> Gate:
    """Check that few files of the input are passed over because their names hide them, of all that look like input."""
    says = f"passed over by the listing: {listing.describe()}. Files that are hidden by their names count here"
    if listing.hidden_share > limits.passed_over:
        says += "; name them in a pattern such as folder/**/{*,_*} to embed them"
    return Gate(name="passed_over", value=listing.hidden_share, limit=limits.passed_over, direction="at most", says=says)


def measure(shared: Pass, written: list[FileEntry], *, here: bool) -> Figures | None:
    """Figures of the files that were written for a version; None if they hold no vector."""
    measured = pa.schema([shared.part_schema.field(name) for name in ("id", "sha256", "embedding")])
    parts = pipeline.map_tasks(measure_file, (shared.store, measured), [entry for entry in written if entry.rows], here=here)
    health = combine(parts) if parts else None
    return health.figures() if health is not None and health.count else None


def measure_file(store: Store, schema: pa.Schema, entry: FileEntry) -> Health:
    """Measure the vectors of one data file, read with these columns in batches; memory holds a sample of each batch."""
    batches = file_batches(store, entry.path, schema)
    return combine([measure_rows(pa.Table.from_batches([batch])) for batch in batches])


def judge(shared: Pass, new: Manifest, figures: Figures | None, before: Manifest | None, limits: Limits) -> list[Gate]:
    """The gates of a version whose files are written; `figures` are those of its new rows.

    `before` is the current version. In the same space, the new rows must be similar to its rows. In another space, a seeded
    sample of the images that both hold is compared.
    """
    gates = judge_space(shared.store, before, new.space_id, figures, limits)
    if before is None or before.space_id == new.space_id:
        return gates
    compared = compare(shared.store, before, new)
    return gates + (checks.comparison_gates(compared, limits) if compared is not None else [])


def drift(shared: Pass, before: Manifest, part_paths: list[str], count: int) -> Gate | None:
    """Check that unchanged images still get the same vectors; `part_paths` are those that were embedded again.

    The figure is the largest relative L2 difference of a seeded sample. The limit is that of the golden vectors in the same
    precision, plus the rounding of float16 if vectors are stored in it. None if there is nothing to compare.
    """
    parts = [read_rows(shared.store, path, shared.part_schema) for path in part_paths]
    rows = by_id(some_rows(pa.concat_tables(parts).filter(pc.field("reason").is_null()), count)) if parts else {}
    old, new = align(rows_of(shared.store, before, list(rows)), rows)[1:]
    if not len(old):
        return None
    value = golden.relative_difference(new, old)
    limit = golden.BOUNDS[shared.layout.precision] + (FLOAT16_STEP if shared.layout.vector_type == "float16" else 0.0)
    says = (
        f"{number_of(len(old), 'unchanged image')} {agree(len(old), 'was', 'were')} embedded again; the vectors differ by up "
        f"to {value:.1e} from those of version "
        f"{before.version}. If changed libraries or another device are the cause, restore them and remove "
        f"{shared.store.uri}/staging/{shared.encoder.space_id} before the next run"
    )
    return Gate(name="drift", value=value, limit=limit, direction="at most", says=says)


def judge_space(store: Store, before: Manifest | None, space_id: str, figures: Figures | None, limits: Limits) -> list[Gate]:
    """The gates that do not compare images one by one: figures of vectors, and how another space prepares images."""
    same_space = before is not None and before.space_id == space_id
    recorded = before.lineage.get("figures") if before is not None else None
    old = taken_as(Figures, recorded, f"{store.uri}: the `figures` of its current version") if recorded else None
    gates = checks.health_gates(figures, old, same_space=same_space, limits=limits) if figures is not None else []
    if before is not None and not same_space:
        gates.append(checks.processor(_preprocessing(store, before.space_id), _preprocessing(store, space_id)))
    return gates


def compare(store: Store, before: Manifest, new: Manifest) -> checks.Comparison | None:
    """Compare two versions on a seeded sample of the images that both hold; None for too few images."""
    ids = _common_ids(store, before, new)
    return compare_rows(rows_of(store, before, ids), rows_of(store, new, ids))


def compare_rows(before: Rows, new: Rows) -> checks.Comparison | None:
    """Compare two spaces on the images whose rows both have, with the same bytes; None for too few images."""
    ids, old_vectors, new_vectors = align(before, new)
    if not ids:
        return None
    labels = [new[id_].get(LABEL) for id_ in ids]
    return checks.compare(ids, old_vectors, new_vectors, labels if any(label is not None for label in labels) else None)


def align(before: Rows, new: Rows) -> tuple[list[str], NDArray[np.float32], NDArray[np.float32]]:
    """The ids whose images both have with the same bytes, and the vectors of both, (n, d) each."""
    ids = [id_ for id_ in before if id_ in new and before[id_]["sha256"] == new[id_]["sha256"]]
    old_vectors, new_vectors = (np.array([rows[id_]["embedding"] for id_ in ids], np.float32) for rows in (before, new))
    return ids, old_vectors, new_vectors


def some_rows(rows: pa.Table, count: int) -> pa.Table:
    """At most `count` of the rows, drawn by seed."""
    ids = seeded_sample(rows.column("id").to_pylist(), count)
    return rows.filter(pc.field("id").isin(pa.array(ids, pa.string())))  # typed, since an empty list would have type null


def rows_of(store: Store, manifest: Manifest, ids: list[str]) -> Rows:
    """A version's rows of these ids, with the columns that a comparison needs."""
    return by_id(Table(store, manifest).rows(ids, _columns_of(manifest)))


def _columns_of(manifest: Manifest) -> list[str]:
    return ["id", "sha256", "embedding", *(name for name, _ in manifest.carry if name == LABEL)]


def _common_ids(store: Store, before: Manifest, new: Manifest) -> list[str]:
    names = {shard.name for shard in before.shards.values()} & {shard.name for shard in new.shards.values()}
    sampled_names = set(seeded_sample(names, SAMPLE_SHARDS))
    holding = tuple(entry for entry in new.files if any(shard.name in sampled_names for shard in entry.shards))
    ids: list[str] = []
    for batch in Table(store, replace(new, files=holding)).batches(["id", "shard"]):
        keep = [name in sampled_names for name in batch.column("shard").to_pylist()]
        ids += batch.column("id").filter(pa.array(keep, pa.bool_())).to_pylist()
    return seeded_sample(ids, SAMPLE_IMAGES)


def by_id(rows: pa.Table) -> Rows:
    """Rows as dictionaries, by id."""
    return {row["id"]: row for row in rows.to_pylist()}


def _preprocessing(store: Store, space_id: str) -> dict[str, Any]:
    where = f"{encoder_path(space_id)}/{DESCRIPTION}"
    description = read_json(store.read(where) or b"{}", store.name(where))
    settings = description.get("preprocessing") if isinstance(description, dict) else None
    return settings if isinstance(settings, dict) else {}


def decide(where: str, gates: Iterable[Gate], accepted: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The gates as the manifest has them. Raises GateFailed for gates that fail and are not accepted."""
    results = {gate.name: gate.to_dict() for gate in gates}
    failed = [gate for gate in gates if not gate.holds and gate.name not in accepted]
    if failed:
        lines = "".join(
            "\n    ".join(
                [f"\n  {gate.name}: {gate.says} ({gate.value:.4g}, {gate.direction} {gate.limit:.4g})", *gate.details]
            )
            for gate in failed
        )
        raise GateFailed(
            f"{where}: not published. Readers get what they got before, and what was embedded is kept. Correct the input or "
            "the recipe and run again, or accept the gate with "
            f"`lora-embed publish JOB --accept {failed[0].name} --why …`. Failed:{lines}",
            results | {gate.name: gate.to_dict() | {"details": gate.details} for gate in failed},
        )
    for name in accepted.keys() & results.keys():
        results[name]["accepted"] = accepted[name]
    return results
