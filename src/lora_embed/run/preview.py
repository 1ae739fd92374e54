"""Decide whether a new encoder is worth embedding everything: embed a seeded sample and compare it with the version."""

import json

import pyarrow as pa
import pyarrow.compute as pc

from lora_embed.chain import cluster
from lora_embed.chain.items import Pass
from lora_embed.config.foreign import SampleRecord, read_record
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed
from lora_embed.gates import judge, reembed
from lora_embed.gates.reembed import Decision, Policy
from lora_embed.monitor.effort import Effort
from lora_embed.monitor.progress import say
from lora_embed.monitor.stages import Workers, seconds_an_image
from lora_embed.run import work
from lora_embed.schema import Shard
from lora_embed.table import parquet, staging
from lora_embed.table.manifest import Manifest
from lora_embed.text import number_of
from lora_embed.vectors.health import combine, measure_rows


def embed_sample(
    job: JobConfig, shared: Pass, current: Manifest, shards: list[Shard], topology: cluster.Topology, effort: Effort
) -> bool:
    """Embed whole shards until the sample is full, compare them, and log the decision of the job's policy.

    Returns whether to embed everything. The sample is counted in `effort` and staged like other parts, so it is not embedded
    twice. Raises GateFailed if a person must decide.
    """
    sample = work.choose_unchanged(current, shards, job.reembed.sample)
    if not sample:
        return True
    work.embed_missing(job, shared, sample, topology, effort)
    samples = sum(current.shards[shard.id].samples for shard in sample)
    rate = _seconds_an_image(shared, effort, topology.workers)
    hours = rate * (current.counts["samples"] - samples) / 3600
    decision = _decide(job, shared, current, sample, hours)
    say(f"sample of {number_of(samples, 'image')} in {number_of(len(sample), 'shard')}: {decision.says}")
    if decision.action == "ask":
        raise GateFailed(
            f"{job.table}: not embedded anew, version {current.version} stays: {decision.says} Correct the recipe, or set "
            "reembed.sample to 0 to embed everything without a sample."
        )
    return decision.action == "go on"


def _decide(job: JobConfig, shared: Pass, current: Manifest, sample: list[Shard], hours: float) -> Decision:
    limits = judge.limits_of(job)
    policy = Policy(skip_overlap=job.reembed.skip_overlap, skip_gain=job.reembed.skip_gain, limits=limits)
    staged = staging.staged_parts(shared.store, shared.encoder.space_id, shared.layout.layout_id)
    paths = [path for s in sample for path in staging.part_paths(shared.encoder.space_id, shared.layout, staged.get(s.id, []))]
    parts = [parquet.read_rows(shared.store, path, shared.part_schema) for path in paths]
    health = combine([measure_rows(part) for part in parts]) if parts else None
    figures = health.figures() if health is not None and health.count else None
    extra = judge.judge_space(shared.store, current, shared.encoder.space_id, figures, limits)
    embedded = pa.concat_tables(parts).filter(pc.field("reason").is_null()) if parts else None
    rows = judge.by_id(judge.some_rows(embedded, job.reembed.sample)) if embedded is not None else {}
    compared = judge.compare_rows(judge.rows_of(shared.store, current, list(rows)), rows)
    return reembed.re_embed_decision(compared, policy, hours, extra)


def _seconds_an_image(shared: Pass, effort: Effort, workers: Workers) -> float:
    """Seconds per image when the sample was embedded, which may have been in an earlier run."""
    path = f"staging/{shared.encoder.space_id}/sample.json"
    if effort.samples:
        measured = seconds_an_image(effort.seconds, effort.samples, workers)
        shared.store.create(path, json.dumps({"seconds_an_image": measured}).encode())
    record = read_record(shared.store, path, SampleRecord)
    return record.seconds_an_image if record is not None else 0.0
