"""What a table no longer needs: old versions, and what nothing refers to, once a grace period is over."""

import json
from collections import defaultdict
from dataclasses import dataclass, field

from lora_embed.errors import StorageError
from lora_embed.manifest import Manifest
from lora_embed.schema import Part, encoder_path
from lora_embed.storage import Entry, Store
from lora_embed.versions import CURRENT, RETIRED, listed_versions, move_aside, read_manifest, read_manifest_at


@dataclass(frozen=True, kw_only=True)
class Retained:
    """What stays whatever its age: of the versions kept and those retired within the grace period, and the shards wanted."""

    wanted: frozenset[str]  # shard ids
    files: set[str] = field(default_factory=set)  # paths of published files
    spaces: set[str] = field(default_factory=set)  # whose encoders readers need

    def add(self, manifest: Manifest) -> None:
        """A version that stays; the manifest itself, which may be large, is not held."""
        self.files.update(entry.path for entry in (*manifest.files, *manifest.rejects))
        self.spaces.add(manifest.space_id)


def retire(store: Store, keep: int, grace_s: float, wanted: frozenset[str] = frozenset()) -> int:
    """Retire all but the newest `keep` versions, and remove what nothing has referred to for `grace_s`; returns how much.

    To be called after a commit: `CURRENT` was just written and tells the store's own time. A version is retired by moving
    its manifest to `retired/`; for `grace_s` from then on its files stay, for readers that have it open and for a
    rollback to it or a run that takes rows over from it, which began before. Parts of `wanted` shards stay for as long as a
    run stages more beside them. Raises StorageError, before anything is removed, when the newest version is not among
    those listed.
    """
    written, newest = store.info(CURRENT), read_manifest(store)
    assert written is not None
    assert newest is not None
    oldest = written.modified - grace_s
    listed = listed_versions(store)
    if max(listed, default=0) < newest.version:  # files in use would be removed
        raise StorageError(f"{store.uri}/versions: version {newest.version} is there, but the listing ends before it")
    retained = Retained(wanted=wanted)
    for version in listed[-keep:]:
        if (manifest := read_manifest(store, version)) is not None:
            retained.add(manifest)
    for version in listed[:-keep]:
        move_aside(store, version)
    tombs = store.list_files(RETIRED)
    for tomb in tombs:
        if tomb.modified >= oldest and (manifest := read_manifest_at(store, tomb.path)) is not None:
            retained.add(manifest)
    doomed = _files(store, retained, oldest) + _encoders(store, retained, oldest) + _parts(store, retained, oldest)
    doomed += [tomb.path for tomb in tombs if tomb.modified < oldest]  # last: while it is there, its files may be
    if doomed:
        store.delete(doomed)
    return len(doomed)


def _files(store: Store, retained: Retained, oldest: float) -> list[str]:
    """Published files of no version, and those that a run wrote for a version that it could not create."""
    listed = [*store.list_files("data"), *store.list_files("rejects")]
    referred = retained.files
    return [entry.path for entry in listed if entry.path not in referred and entry.modified < oldest]


def _encoders(store: Store, retained: Retained, oldest: float) -> list[str]:
    """Encoders of no version, with their recipes, unless something was staged with them lately."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in (*store.list_files("encoders"), *store.list_files("staging")):
        found[entry.path.split("/")[1]].append(entry)
    unused = {
        space
        for space, entries in found.items()
        if space not in retained.spaces and max(entry.modified for entry in entries) < oldest
    }
    doomed = [entry.path for space in unused for entry in found[space] if entry.path.startswith(encoder_path(space))]
    for entry in store.list_files("recipes"):
        if entry.modified < oldest and (data := store.read(entry.path)) is not None:
            space = json.loads(data)["space_id"]
            if space in unused or space not in found:  # the second where a removal was interrupted
                doomed.append(entry.path)
    return doomed


def _parts(store: Store, retained: Retained, oldest: float) -> list[str]:
    """Staged parts that were left behind: of shards that are no longer there, and of spaces or layouts given up."""
    staged = store.list_files("staging")
    renewed: dict[str, float] = defaultdict(float)  # when something was staged last, by space and layout
    for entry in staged:
        renewed[entry.path.rpartition("/")[0]] = max(entry.modified, renewed[entry.path.rpartition("/")[0]])
    doomed = []
    for entry in staged:
        folder, _, name = entry.path.rpartition("/")
        part = Part.parse(name)
        is_wanted = part is not None and part.shard_id in retained.wanted and renewed[folder] >= oldest
        is_needed = part is None and entry.path.split("/")[1] in retained.spaces  # what `auto` was resolved to
        if entry.modified < oldest and not is_wanted and not is_needed:
            doomed.append(entry.path)
    return doomed
