"""Find, for each shard to embed, the rows of a version that may be of the same images, so that their vectors are taken over."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lora_embed.model.description import Description
from lora_embed.schema import MAX_BYTES, Layout, Shard
from lora_embed.shards.image_groups import may_share
from lora_embed.store.store import Store
from lora_embed.table import versions
from lora_embed.table.known import Files, KnownRows
from lora_embed.table.manifest import FileEntry, Manifest, ShardCounts, place_of
from lora_embed.text import agree

_READING = ("image_column", "key_column", "image_member")  # settings that choose the images and keys of a shard
Known = Callable[[Shard], KnownRows | None]


def find_donor(store: Store, encoder: Description, layout: Layout, current: Manifest | None) -> Manifest | None:
    """The newest version whose vectors are of the same space, precision and type; its other columns do not matter."""
    return versions.newest_with(
        store, current, lambda m: m.space_id == encoder.space_id and layout.numeric.items() <= m.pins.items()
    )


def known_rows(store: Store, donor: Manifest, layout: Layout, shards: list[Shard], missing: list[Shard]) -> Known:
    """A function of a shard in `missing` → the rows of `donor` that may be of its images; None if there are none.

    They are those of the same shard, if the donor has it (with other columns), or else of the shards at its place that are
    not among the listed `shards`: the tar or Parquet file of its name, the groups of its folder, the ranges of its list.
    """
    listed = {shard.id for shard in shards}
    gone: dict[str, list[ShardCounts]] = defaultdict(list)
    for shard in donor.shards.values():
        if shard.id not in listed and shard.vectors:
            gone[place_of(shard.name)].append(shard)
    needed = {shard.id for shard in missing} | {shard.id for at_place in gone.values() for shard in at_place}
    paths, of_rejects = _paths_by_shard(donor.files, needed), _paths_by_shard(donor.rejects, needed)

    def of(shard: Shard) -> KnownRows | None:
        same = donor.shards.get(shard.id)
        if same is not None:
            old, is_same = [same], _reads_the_same(donor, layout)
        else:
            old, is_same = (
                [before for before in gone.get(place_of(shard.name), []) if may_share(shard.name, before.name)],
                False,
            )
        if not old:
            return None
        return KnownRows(
            store=store,
            dimension=donor.dimension,
            vector_type=donor.pins["vector_type"],
            files=_files_of(old, paths),
            rejects=_files_of(old, of_rejects) if is_same else (),
            is_same_shard=is_same,
        )

    return of


def _reads_the_same(donor: Manifest, layout: Layout) -> bool:
    """Whether the donor's job took the same images and keys from a shard as this job does, and no larger ones."""
    settings = donor.lineage.get("layout") or {}
    if layout.max_bytes < (settings.get("max_bytes") or MAX_BYTES):
        return False
    return all(_plain(settings.get(name)) == _plain(getattr(layout, name)) for name in _READING)


def kept_reading(current: Manifest, layout: Layout) -> str:
    """What says that shards of the current version keep the keys and images that a job now chooses in another way.

    Empty if the job chooses them as the one that made the version.
    """
    settings = current.lineage.get("layout") or {}
    changed = [name for name in _READING if _plain(settings.get(name)) != _plain(getattr(layout, name))]
    if not changed or current.carry != layout.carry:  # for other columns all shards are read again
        return ""
    before = ", ".join(f"{name} {_plain(settings.get(name)) or 'not set'}" for name in changed)
    return (
        f"version {current.version} was made with {before}. Shards that it has and that did not change keep their ids and "
        f"images; the new {agree(len(changed), 'setting counts', 'settings count')} for all others. For new ids of all images, "
        "make another table."
    )


def _plain(setting: Any) -> Any:
    """A setting of a layout as JSON has it; one that is not set is null or left out."""
    return (list(setting) if isinstance(setting, tuple) else setting) or None


def _paths_by_shard(files: tuple[FileEntry, ...], needed: set[str]) -> dict[str, list[str]]:
    """Paths of the files that hold a shard's rows, in the order of these, by the shard's id."""
    records = sorted((shard.start, shard.id, entry.path) for entry in files for shard in entry.shards if shard.id in needed)
    paths: dict[str, list[str]] = defaultdict(list)
    for _, shard_id, path in records:
        paths[shard_id].append(path)
    return paths


def _files_of(shards: list[ShardCounts], paths: dict[str, list[str]]) -> Files:
    names: dict[str, set[str]] = defaultdict(set)
    for shard in shards:
        for path in paths.get(shard.id, ()):
            names[path].add(shard.name)
    return tuple((path, frozenset(of_file)) for path, of_file in names.items())
