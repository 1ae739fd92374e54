"""Explain where a row came from, and remove images from a table for good."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow.compute as pc

from lora_embed.config.foreign import read_record
from lora_embed.errors import TableError
from lora_embed.schema import FORGOTTEN, Layout, encoder_path
from lora_embed.store.store import Store
from lora_embed.table import compact, retention, versions
from lora_embed.table.manifest import Manifest
from lora_embed.table.parquet import FIND
from lora_embed.table.read import Table
from lora_embed.text import agree, in_lines, number_of, utc

COLUMNS = ["id", "shard", "key", "width", "height", "sha256"]


@dataclass(frozen=True, kw_only=True)
class _Base:
    uri: str = "unknown"


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    uri: str
    content_hash: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class _Member:
    merge_method: str
    adapters: tuple[_Adapter, ...]


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The fields of an encoder's merge report that an explanation shows."""

    base: _Base = field(default_factory=_Base)
    members: tuple[_Member, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where one row of a table came from."""

    id: str
    version: int
    shard: str
    shard_id: str  # identifies the content of the shard that was embedded
    image_sha256: str
    width: int
    height: int
    space_id: str
    base: str
    adapters: tuple[dict[str, Any], ...]  # uri, content hash, weight
    merge_method: str
    first_version: int  # the first retained version that holds this row

    def describe(self) -> str:
        """For a person."""
        lines = [
            f"image     {self.id}, {self.width}×{self.height} pixels, sha256 {self.image_sha256}",
            f"shard     {self.shard} ({self.shard_id})",
            f"encoder   space {self.space_id}, {self.merge_method} on {self.base}",
        ]
        lines += [f"          {a['uri']} × {a['weight']} ({a['content_hash'][:12]})" for a in self.adapters]
        lines += [f"version   in {self.version}; the first retained one that holds this row is {self.first_version}"]
        return in_lines(lines)


def explain_row(opened: Table, id_: str) -> Explanation:
    """Trace a row back to image, shard, encoder and adapters. Raises TableError for an id that has no row."""
    store, manifest = opened.store, opened.manifest
    rows = opened.rows([id_], COLUMNS)
    if not rows.num_rows:
        raise TableError(f"{store.uri}: version {manifest.version} has {_without_vector(opened, id_)}")
    row = rows.to_pylist()[0]
    shard = next((shard for shard in manifest.shards.values() if shard.name == row["shard"]), None)
    if shard is None:
        raise TableError(
            f"{store.uri}: version {manifest.version} has a row of shard {row['shard']!r}, which its manifest does not "
            f"list. {FIND}"
        )
    report = read_record(store, f"{encoder_path(manifest.space_id)}/merge_report.json", _Report) or _Report()
    holders = [m.version for m in versions.newest_first(store) if m.space_id == manifest.space_id and shard.id in m.shards]
    members = report.members
    return Explanation(
        id=id_,
        version=manifest.version,
        shard=shard.name,
        shard_id=shard.id,
        image_sha256=(row["sha256"] or b"").hex(),
        width=row["width"],
        height=row["height"],
        space_id=manifest.space_id,
        base=report.base.uri,
        adapters=tuple(asdict(adapter) for member in members for adapter in member.adapters),
        merge_method=members[0].merge_method if members else "unknown",
        first_version=min(holders, default=manifest.version),
    )


def _without_vector(opened: Table, id_: str) -> str:
    """What is known of an id that has no vector."""
    rejects = opened.rejects()
    for row in rejects.filter(pc.equal(rejects["id"], id_)).to_pylist():
        if row["reason"] == FORGOTTEN:
            return f"no vector with the id {id_!r}: the image was forgotten, and no later version will hold it."
        detail = f" ({row['detail']})" if row["detail"] else ""
        return (
            f"no vector with the id {id_!r}: the image is a reject, {row['reason']}{detail}. Correct the image, and run the "
            "job again."
        )
    return f"no vector with the id {id_!r}, and no reject either. Correct the id; `open_table(…).to_dataset()` has all ids."


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """The result of `lora-embed forget`."""

    table: str
    version: int  # the new version, without the images
    held_by: tuple[int, ...]  # versions that held one of the images and are retired now
    images: int
    grace_days: float
    files_stay_until: str  # UTC, ISO 8601, by the store's clock

    def describe(self) -> str:
        """For a person."""
        them = agree(self.images, "it", "them")
        lines = [
            f"{self.table}: version {self.version} is published without {number_of(self.images, 'image')}. No later version "
            f"will hold {them}.",
            f"Retired, because they held {them}: versions {', '.join(map(str, self.held_by)) or 'none'}. Their files stay "
            f"until {self.files_stay_until} (grace period of {number_of(self.grace_days, 'day')}).",
            f"After that, the next run removes these files, or `lora-embed gc {self.table}`. `lora-embed gc {self.table} "
            "--dry-run` lists what is still there.",
        ]
        return in_lines(lines)


def forget(store: Store, ids: list[str], why: str) -> Forgotten:
    """Publish a version without these images, keep them out of later versions, and retire the versions that hold them.

    A forgotten image is still counted as a sample of its shard: as a reject with the reason `forgotten`. Raises TableError
    if no retained version holds one of the ids.
    """
    current, held_by = _holders(store, ids)  # raises before anything is written
    with versions.writing(store, "forgetting") as store:
        while True:
            manifest = _without(store, current, ids, why, held_by)
            versions.refuse_gone(store, manifest)
            if versions.commit_version(store, manifest):
                break
            current, held_by = _holders(store, ids)
        for version in held_by:
            versions.move_aside(store, version)
        grace_days = retention.retain_of(current).grace_days
        return Forgotten(
            table=store.uri,
            version=manifest.version,
            held_by=held_by,
            images=len(set(ids)),
            grace_days=grace_days,
            files_stay_until=utc(math.ceil(store.now() + grace_days * retention.DAY_S)),
        )


def _holders(store: Store, ids: list[str]) -> tuple[Manifest, tuple[int, ...]]:
    """The current version, and the numbers of all versions that hold one of these images."""
    current = versions.manifest_to_follow(store)
    if current is None:
        raise versions.no_version(store.uri)
    holders = {m.version: set(_ids_in(store, m, ids)) for m in versions.newest_first(store)}
    unknown = sorted(set(ids) - set(current.forgotten) - set().union(*holders.values()))
    if unknown:
        raise TableError(
            f"{store.uri}: no retained version holds {unknown[0]!r} (unknown ids in all: {len(unknown)}). Correct them."
        )
    return current, tuple(sorted(version for version, ids_held in holders.items() if ids_held))


def _ids_in(store: Store, manifest: Manifest, ids: list[str]) -> list[str]:
    existing: list[str] = Table(store, manifest).rows(ids, ["id"]).column("id").to_pylist()
    return existing


def _without(store: Store, current: Manifest, ids: list[str], why: str, held_by: tuple[int, ...]) -> Manifest:
    """The manifest of the next version: files without any of the images are reused, the others are rewritten.

    It lists the versions that held one of the images, so that retention can retire them if `forget` is interrupted.
    """
    pins = current.pins
    layout = Layout(
        precision=pins["precision"],
        batch_size=1,
        vector_type=pins["vector_type"],
        carry=current.carry,
    )
    forgotten = tuple(sorted({*current.forgotten, *ids}))
    reuse = compact.plan_reuse(current, set(current.shards), forgets=ids)
    tasks = compact.plan_compactions(list(reuse.sources), layout, current.space_id, current.dimension, forgotten)
    new_files = [compact.compact(store, task) for task in tasks]
    manifest = compact.make_manifest(
        current.version + 1,
        current.space_id,
        current.dimension,
        new_files,
        reuse,
        gates=current.gates,
        pins=pins,
        held=current.held,
        forgotten=forgotten,
        lineage=current.lineage,
    )
    forgot = {"images": len(set(ids)), "why": why, "held_by": list(held_by)}
    return replace(manifest, lineage=current.lineage | {"forgot": forgot})
