"""Parts that are committed but not yet in a version: list, check and verify them, and remove them once a version has them."""

from collections import defaultdict
from dataclasses import dataclass

import pyarrow as pa

from lora_embed.errors import VerificationFailed
from lora_embed.schema import Layout, Part
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest
from lora_embed.table.parquet import opened_file
from lora_embed.table.parts import FOOTER_BYTES, part_path, read_footer


def staged_parts(store: Store, space_id: str, layout_id: str) -> dict[str, list[Part]]:
    """Committed parts of one layout by shard id, from one listing."""
    parts_of_shard: dict[str, list[Part]] = defaultdict(list)
    for entry in store.list_files(part_path(space_id, layout_id)):
        part = Part.parse(entry.path.rsplit("/", 1)[-1])
        if part is not None:
            parts_of_shard[part.shard_id].append(part)
    return {shard: sorted(parts, key=lambda part: part.chunk) for shard, parts in parts_of_shard.items()}


def part_paths(space_id: str, layout: Layout, parts: list[Part]) -> tuple[str, ...]:
    return tuple(part_path(space_id, layout.layout_id, part) for part in parts)


def is_complete(parts: list[Part]) -> bool:
    """Do these sorted parts cover a shard without a gap, from its first chunk to its last?"""
    chunks = [part.chunk for part in parts]
    return bool(parts) and parts[-1].last and chunks == list(range(len(parts)))


@dataclass(frozen=True, kw_only=True)
class VerifiedShard:
    """A complete shard, with the counts from the footers of its parts."""

    shard_id: str
    samples_of_parts: tuple[int, ...]
    vectors_of_parts: tuple[int, ...]

    @property
    def rejects_of_parts(self) -> tuple[int, ...]:
        return tuple(samples - good for samples, good in zip(self.samples_of_parts, self.vectors_of_parts, strict=True))

    @property
    def samples(self) -> int:
        return sum(self.samples_of_parts)

    @property
    def vectors(self) -> int:
        return sum(self.vectors_of_parts)

    @property
    def rejects(self) -> int:
        return self.samples - self.vectors


def verify_parts(store: Store, space_id: str, layout: Layout, parts: list[Part]) -> VerifiedShard:
    """Check that the footers of one complete shard's parts fit their names and the layout; returns the shard's counts.

    Raises VerificationFailed for a part of another space or layout, a gap, or counts that do not add up.
    """
    start = 0
    samples: list[int] = []
    vectors: list[int] = []
    for part in parts:
        path = part_path(space_id, layout.layout_id, part)
        with opened_file(store, path, pa.schema([]), FOOTER_BYTES) as file:
            metadata = file.metadata
        facts = read_footer(metadata)
        full = layout.chunk_size if not part.last else metadata.num_rows
        expected = {
            "space_id": space_id,
            "layout_id": layout.layout_id,
            "start": start,
            "samples": full,
        }
        if facts is None or {key: facts.get(key) for key in expected} != expected or metadata.num_rows != full:
            raise VerificationFailed(
                f"{store.uri}/{path}: its footer says {facts}, expected {expected}. Remove the file and run the same command "
                "again."
            )
        start += metadata.num_rows
        samples.append(metadata.num_rows)
        vectors.append(facts["vectors"])
    return VerifiedShard(shard_id=parts[0].shard_id, samples_of_parts=tuple(samples), vectors_of_parts=tuple(vectors))


def clear_layout(store: Store, space_id: str, layout: Layout) -> None:
    """Remove all staged parts of a layout: those of a trial run, which no version will hold."""
    for parts in staged_parts(store, space_id, layout.layout_id).values():
        store.delete(list(part_paths(space_id, layout, parts)))


def clear_absorbed(store: Store, manifest: Manifest, layout: Layout) -> None:
    """Remove the staged parts of shards that a version holds, also those that a run left which died after its commit."""
    staged = staged_parts(store, manifest.space_id, layout.layout_id)
    absorbed = [staged[shard_id] for shard_id in staged.keys() & manifest.shards.keys()]
    store.delete([path for parts in absorbed for path in part_paths(manifest.space_id, layout, parts)])
    store.clear_temporary()
