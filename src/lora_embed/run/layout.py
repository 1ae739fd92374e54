"""The layout of a job's parts: the job's settings, with `auto` resolved by the device of the actors."""

import json
from dataclasses import asdict
from typing import Any

from lora_embed.chain import cluster, pipeline
from lora_embed.config.foreign import DeviceRecord, read_record
from lora_embed.config.models import JobConfig
from lora_embed.errors import TableError
from lora_embed.model.description import Description
from lora_embed.schema import Layout
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest


def resolve_layout(
    job: JobConfig, store: Store, encoder: Description, current: Manifest | None, topology: cluster.Topology
) -> Layout:
    """The layout of a job. `auto` has the value that the table recorded before, or else is resolved by the device.

    Raises TableError if the current version's vectors were made with other settings.
    """
    if (layout := known_layout(job, store, encoder, current)) is not None:
        return layout
    store.create(resolved_path(encoder.space_id), json.dumps(ask_device(topology)).encode())
    layout = known_layout(job, store, encoder, current)
    assert layout is not None
    return layout


def known_layout(job: JobConfig, store: Store, encoder: Description, current: Manifest | None) -> Layout | None:
    """The layout from job and table alone; None if `auto` was never resolved for this table."""
    resolved: dict[str, Any] = {}
    if leaves_open(job):
        device = read_record(store, resolved_path(encoder.space_id), DeviceRecord)
        if device is None:
            return None
        resolved = asdict(device)
    layout = layout_of(job, resolved)
    differing = [name for name, value in layout.numeric.items() if current is not None and current.pins[name] != value]
    if current is not None and differing:
        raise TableError(
            f"{store.uri}: version {current.version} was made with other settings than this job has: "
            + "; ".join(f"{name} {current.pins[name]!r}, now {layout.numeric[name]!r}" for name in differing)
            + ". All vectors of a table must have the same: set them back, or name another table."
        )
    return layout


def leaves_open(job: JobConfig) -> bool:
    """Is precision or batch size `auto`?"""
    return "auto" in (job.precision, job.batch_size)


def ask_device(topology: cluster.Topology) -> dict[str, Any]:
    """The values of `auto` on the device of the actors."""
    device = pipeline.ask_device(topology)
    return {"precision": device.precision, "batch_size": device.batch_size}


def layout_of(job: JobConfig, resolved: dict[str, Any]) -> Layout:
    """The job's layout, with the resolved `precision` and `batch_size` where the job has `auto`."""
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
        image_member=job.image_member,
    )


def any_layout(job: JobConfig) -> Layout:
    """How the job reads samples; precision and batch size do not matter for that."""
    return layout_of(job, {"precision": "float32", "batch_size": 1})


def resolved_path(space_id: str) -> str:
    return f"staging/{space_id}/resolved.json"
