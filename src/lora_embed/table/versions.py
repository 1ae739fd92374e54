"""The versions of a table: immutable manifests, created one after another, of which the highest is current."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lora_embed.errors import GateFailed, StorageError, TableError, VerificationFailed
from lora_embed.monitor.progress import say
from lora_embed.monitor.runs import announced
from lora_embed.schema import FORMAT, encoder_path
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest, refuse_other_format
from lora_embed.text import utc

MARKER = "table.json"  # the first object of a table
MARKED = b'{"format": %d}\n' % FORMAT
CURRENT = "CURRENT"
RETIRED = "retired"


def manifest_path(version: int) -> str:
    return f"versions/{version:08d}.json"


def tomb_path(version: int) -> str:
    return f"{RETIRED}/{version:08d}.json"


def highest_version(store: Store) -> int:
    """The number of the current version, 0 where there is none."""
    return _hint_and_highest(store)[1]


def _hint_and_highest(store: Store) -> tuple[int, int]:
    """What CURRENT says, which may be anything, and the highest version that is there.

    The listing decides: retention bounds it, and numbers may be missing in it. Only a version that CURRENT names and a
    listing does not have yet is looked for by its name. CURRENT comes first, as a listing then has at least what it names.
    """
    said = (store.read(CURRENT) or b"").strip()
    hint, listed = int(said) if re.fullmatch(rb"[0-9]{1,8}", said) else 0, max(listed_versions(store), default=0)
    return hint, hint if hint > listed and store.info(manifest_path(hint)) is not None else listed


def renew_hint(store: Store) -> int:
    """Bring CURRENT to the highest version, which is returned.

    What was written is looked at again, so that a writer that stalled before its write mends what it has put back.
    """
    hint, highest = _hint_and_highest(store)
    while highest and hint != highest:
        store.replace(CURRENT, f"{highest}\n".encode())
        hint, highest = _hint_and_highest(store)
    return highest


def read_manifest(store: Store, version: int | None = None) -> Manifest | None:
    """One version's manifest, by default the highest; None where there is none."""
    if version is not None:
        return read_manifest_at(store, manifest_path(version))
    retired = 0
    while (number := highest_version(store)) != retired:
        if (manifest := read_manifest_at(store, manifest_path(number))) is not None:
            return manifest
        retired = number  # since it was listed, so there is a higher one
    if retired:
        raise StorageError(f"{store.name(manifest_path(retired))}: is listed, but not there. Run the same command again.")
    return None


def manifest_to_follow(store: Store) -> Manifest | None:
    """The highest version's manifest, for who is to write the next one.

    Raises TableError for a table that a newer release has written to: what that release knows of it would be lost.
    """
    marker, found = store.read(MARKER), None
    if marker is not None:
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(marker)
        refuse_other_format(found, store.name(MARKER))
    manifest = read_manifest(store)
    if manifest is not None:
        _refuse_newer(store, manifest)
    return manifest


def _refuse_newer(store: Store, manifest: Manifest) -> None:
    if manifest.newer:
        raise TableError(
            f"{store.name(manifest_path(manifest.version))}: a newer release of lora-embed wrote it, with "
            f"{manifest.newer[0]!r}, which this one does not know. It can be read; to publish, roll back or forget, use that "
            "release."
        )


def read_manifest_at(store: Store, path: str) -> Manifest | None:
    """The manifest at a path of the table; None where there is none.

    The last ones are kept, and read again where the object is another: of 100,000 shards one has 13 MB, and a night asks for
    the same one several times.
    """
    entry = store.info(path)
    manifest = None
    with contextlib.suppress(FileNotFoundError):  # it was retired in between
        manifest = _manifest_of(store, path, entry.etag) if entry is not None else None
    if manifest is not None and path not in (manifest_path(manifest.version), tomb_path(manifest.version)):
        raise TableError(
            f"{store.name(path)}: says that it is version {manifest.version}, which its name is not. lora-embed has not "
            "written it there; remove it."
        )
    return manifest


@lru_cache(maxsize=2)
def _manifest_of(store: Store, path: str, _etag: str) -> Manifest:
    """Raises FileNotFoundError where it is gone."""
    data = store.read(path)
    if data is None:
        raise FileNotFoundError(path)
    return Manifest.from_json(data, f"{store.uri}/{path}")


def listed_versions(store: Store) -> list[int]:
    """Numbers of all versions whose manifests are there, in order."""
    names = [entry.path.removeprefix("versions/") for entry in store.list_files("versions")]
    return sorted(int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name))


def newest_first(store: Store) -> Iterator[Manifest]:
    """The manifests that are retained, from the highest down."""
    for number in reversed(listed_versions(store)):
        if (manifest := read_manifest(store, number)) is not None:
            yield manifest


def newest_of(store: Store, space_id: str, pins: dict[str, Any], current: Manifest | None) -> Manifest | None:
    """The newest retained version whose rows a version of this space can take over; mostly the current one."""
    if current is None or (current.space_id, current.pins) == (space_id, pins):
        return current
    return next((m for m in newest_first(store) if (m.space_id, m.pins) == (space_id, pins)), None)


def refuse_held(current: Manifest | None, space_id: str, *, releases: bool) -> None:
    """Raises GateFailed when a rollback holds vectors of this space back."""
    why = current.held.get(space_id) if current is not None and not releases else None
    if why is not None:
        raise GateFailed(
            f"space {space_id} is held back since a rollback ({why}), so it is not published. Change the recipe or an "
            "adapter, or publish it with --release."
        )


def roll_back(store: Store, to: int, why: str) -> Manifest:
    """Publish an earlier version's content as the next version, and hold the space that it replaces back.

    Raises TableError for a version that is not there, or is the current one.
    """
    _rolled_back(store, to, why)  # refused before anything is written
    with writing(store, "rolling back") as store:
        while True:
            manifest = _rolled_back(store, to, why)
            refuse_gone(store, manifest)
            if commit_version(store, manifest):
                return manifest


def _rolled_back(store: Store, to: int, why: str) -> Manifest:
    """The next version, with an earlier one's content."""
    current, wanted = manifest_to_follow(store), read_manifest(store, to)
    if current is None or wanted is None:
        there = ", ".join(map(str, listed_versions(store))) or "none"
        raise TableError(f"{store.uri}: has no version {to} to return to; versions there: {there}")
    _refuse_newer(store, wanted)
    if wanted.version == current.version:
        raise TableError(f"{store.uri}: version {to} is the current one already")
    if set(current.forgotten) - set(wanted.forgotten):
        raise TableError(f"{store.uri}: version {to} is older than a forgetting of images, so it is not brought back")
    held = dict(current.held)
    if current.space_id != wanted.space_id:
        held[current.space_id] = why
    held.pop(wanted.space_id, None)
    created = utc()
    lineage = wanted.lineage | {"rollback": {"from": current.version, "to": to, "why": why}}
    lineage |= {key: value for key, value in current.lineage.items() if key == "retain"}  # as the table is kept today
    return replace(wanted, version=current.version + 1, created=created, held=held, lineage=lineage)


def move_aside(store: Store, version: int, data: bytes | None = None) -> None:
    """Retire a version: its manifest goes to `retired/`, where its age tells for how long its files stay.

    `data` are the manifest's bytes where they are known.
    """
    data = data if data is not None else store.read(manifest_path(version))
    if data is not None:
        store.create(tomb_path(version), data)
        store.delete([manifest_path(version)])


def claim(store: Store) -> Store:
    """The store as it is to be written to: marked as a table's, and known to honour conditional PUT, or not, and said so."""
    if store.exclusive is None:
        store = store.claim(MARKER, MARKED)
        if not store.exclusive:
            say(f"{store.uri}: this store ignores conditional PUT: never run two jobs on this table at the same time")
    return store


@contextlib.contextmanager
def writing(store: Store, doing: str, space_id: str = "") -> Iterator[Store]:
    """For a command that writes to the table: the store is claimed, and what the command needs is not removed meanwhile."""
    store = claim(store)
    with announced(store, doing, space_id):
        yield store


def refuse_gone(store: Store, manifest: Manifest) -> None:
    """For a version that is about to be created. Raises VerificationFailed when what it refers to is not there.

    Nothing removes what a writer needs that was heard of within the hour; one that slept for longer finds out here.
    """
    needed = [entry.path for entry in (*manifest.files, *manifest.rejects)]
    folders = {path.rpartition("/")[0] for path in needed}
    there = {entry.path for folder in folders for entry in store.list_files(folder)}
    gone = [path for path in needed if path not in there]
    if store.info(f"{encoder_path(manifest.space_id)}/encoder.json") is None:
        gone.append(encoder_path(manifest.space_id))
    if gone:
        raise VerificationFailed(
            f"{store.name(gone[0])}: is gone, the first of {len(gone)} that version {manifest.version} would refer to, so it "
            "was not created. Run the same command again."
        )


def commit_version(store: Store, manifest: Manifest) -> bool:
    """Create the version; False when another run created one of this number, or a higher one, first.

    A retired version's number is free again, and is not taken a second time: neither by a writer that comes late, nor by
    one whose request was under way while others published and retired it. The latter finds another version's tomb.
    """
    store = claim(store)
    path, data = manifest_path(manifest.version), manifest.to_json()
    if highest_version(store) >= manifest.version:
        return False
    if not store.create(path, data) and store.read(path) != data:  # equal: it is ours, and the store's answer got lost
        return False
    if renew_hint(store) > manifest.version and store.read(tomb_path(manifest.version)) not in (None, data):
        store.delete([path])
        return False
    return True
