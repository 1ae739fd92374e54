"""The versions of a table: immutable manifests, created one after another. The one with the highest number is current."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
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
    """The number of the current version, 0 if there is none."""
    return _hint_and_highest(store)[1]


def _hint_and_highest(store: Store) -> tuple[int, int]:
    """The number in CURRENT, which may be wrong, and the highest version that exists.

    The listing of versions/ decides. Retention keeps it short, and numbers may be missing in it. CURRENT is read before the
    listing, so the listing should hold the version that CURRENT names; if it does not, that version is looked up by name.
    """
    content = (store.read(CURRENT) or b"").strip()
    hint, listed = int(content) if re.fullmatch(rb"[0-9]{1,8}", content) else 0, max(listed_versions(store), default=0)
    return hint, hint if hint > listed and store.info(manifest_path(hint)) is not None else listed


def renew_hint(store: Store) -> int:
    """Write the number of the highest version to CURRENT, and return it.

    After writing, both are read again, so that a writer that paused before its write corrects an old number it wrote.
    """
    hint, highest = _hint_and_highest(store)
    while highest and hint != highest:
        store.replace(CURRENT, f"{highest}\n".encode())
        hint, highest = _hint_and_highest(store)
    return highest


def read_manifest(store: Store, version: int | None = None) -> Manifest | None:
    """The manifest of one version, by default of the highest; None if there is none."""
    if version is not None:
        return read_manifest_at(store, manifest_path(version))
    retired = 0
    while (number := highest_version(store)) != retired:
        if (manifest := read_manifest_at(store, manifest_path(number))) is not None:
            return manifest
        retired = number  # since it was listed, so a higher version exists
    if retired:
        raise StorageError(
            f"{store.name(manifest_path(retired))}: is in the listing, but cannot be read. Run the same command again."
        )
    return None


def no_version(uri: str, version: int | None = None) -> TableError:
    """The error for a table that lacks this version, or any."""
    lacks = f"version {version}" if version is not None else "published version"
    return TableError(f"{uri}: has no {lacks}. `lora-embed status {uri}` shows what the table holds.")


def manifest_to_follow(store: Store) -> Manifest | None:
    """The highest version's manifest, for a command that writes the next version.

    Raises TableError for a table that a newer release has written to, because that release's fields would be lost.
    """
    marker, content = store.read(MARKER), None
    if marker is not None:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(marker)
        refuse_other_format(content, store.name(MARKER))
    manifest = read_manifest(store)
    if manifest is not None:
        _refuse_newer(store, manifest)
    return manifest


def _refuse_newer(store: Store, manifest: Manifest) -> None:
    if manifest.newer:
        raise TableError(
            f"{store.name(manifest_path(manifest.version))}: was written by a newer release of lora-embed. It has the field "
            f"{manifest.newer[0]!r}, which this release does not know. Reading works; to publish, roll back or forget, use "
            "the newer release."
        )


def read_manifest_at(store: Store, path: str) -> Manifest | None:
    """The manifest at a path of the table; None if there is none.

    The last manifests are cached and read again when the object has changed: a manifest of 100,000 shards has 13 MB, and a
    nightly run needs the same one several times.
    """
    entry = store.info(path)
    manifest = None
    with contextlib.suppress(FileNotFoundError):  # it was retired in between
        manifest = _manifest_of(store, path, entry.etag) if entry is not None else None
    if manifest is not None and path not in (manifest_path(manifest.version), tomb_path(manifest.version)):
        raise TableError(
            f"{store.name(path)}: holds the manifest of version {manifest.version}, which does not fit its name. lora-embed "
            "did not write it there; remove it."
        )
    return manifest


@lru_cache(maxsize=2)
def _manifest_of(store: Store, path: str, _etag: str) -> Manifest:
    """Read a manifest, or take it from the cache. Raises FileNotFoundError if it no longer exists."""
    data = store.read(path)
    if data is None:
        raise FileNotFoundError(path)
    return Manifest.from_json(data, f"{store.uri}/{path}")


def listed_versions(store: Store) -> list[int]:
    """Numbers of all versions that have a manifest, in order."""
    names = [entry.path.removeprefix("versions/") for entry in store.list_files("versions")]
    return sorted(int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name))


def newest_first(store: Store) -> Iterator[Manifest]:
    """The retained manifests, the highest version first."""
    for number in reversed(listed_versions(store)):
        if (manifest := read_manifest(store, number)) is not None:
            yield manifest


def newest_of(store: Store, space_id: str, pins: dict[str, Any], current: Manifest | None) -> Manifest | None:
    """The newest retained version whose rows a new version of this space can reuse: usually the current version."""
    return newest_with(store, current, lambda manifest: (manifest.space_id, manifest.pins) == (space_id, pins))


def newest_with(store: Store, current: Manifest | None, fits: Callable[[Manifest], bool]) -> Manifest | None:
    """The newest retained version that fits; the others are read only if `current` does not."""
    if current is None or fits(current):
        return current
    return next(filter(fits, newest_first(store)), None)


def refuse_held(current: Manifest | None, space_id: str, *, releases: bool) -> None:
    """Raises GateFailed when a rollback holds vectors of this space back."""
    why = current.held.get(space_id) if current is not None and not releases else None
    if why is not None:
        raise GateFailed(
            f"space {space_id} is not published, because a rollback holds it back ({why}). Change the recipe or an adapter, or "
            "publish it with --release."
        )


def roll_back(store: Store, to: int, why: str) -> Manifest:
    """Publish an earlier version's content as the next version, and hold back the space that it replaces.

    Raises TableError for a version that does not exist or is the current one.
    """
    _rolled_back(store, to, why)  # raises before anything is written
    with writing(store, "rolling back") as store:
        while True:
            manifest = _rolled_back(store, to, why)
            refuse_gone(store, manifest)
            if commit_version(store, manifest):
                return manifest


def _rolled_back(store: Store, to: int, why: str) -> Manifest:
    """The manifest of the next version, with an earlier version's content."""
    current, earlier = manifest_to_follow(store), read_manifest(store, to)
    if current is None or earlier is None:
        existing = ", ".join(map(str, listed_versions(store))) or "none"
        raise TableError(f"{store.uri}: has no version {to}. Existing versions: {existing}. Choose one of them.")
    _refuse_newer(store, earlier)
    if earlier.version == current.version:
        raise TableError(f"{store.uri}: version {to} is already the current version. Choose an earlier one.")
    if set(current.forgotten) - set(earlier.forgotten):
        raise TableError(
            f"{store.uri}: version {to} may hold images that were forgotten after it was published, so a rollback to it is "
            "refused. Choose a later version."
        )
    held_spaces = dict(current.held)
    if current.space_id != earlier.space_id:
        held_spaces[current.space_id] = why
    held_spaces.pop(earlier.space_id, None)
    created = utc()
    lineage = earlier.lineage | {"rollback": {"from": current.version, "to": to, "why": why}}
    lineage |= {key: value for key, value in current.lineage.items() if key == "retain"}  # today's retention settings
    return replace(earlier, version=current.version + 1, created=created, held=held_spaces, lineage=lineage)


def move_aside(store: Store, version: int, data: bytes | None = None) -> None:
    """Retire a version: its manifest moves to `retired/`, and its age there decides how long the version's files stay.

    `data` holds the manifest's bytes if the caller has read them already.
    """
    data = data if data is not None else store.read(manifest_path(version))
    if data is not None:
        store.create(tomb_path(version), data)
        store.delete([manifest_path(version)])


def claim(store: Store) -> Store:
    """Prepare the store for writing: mark it as a table, test conditional PUT, and warn if the store ignores it."""
    if store.exclusive is None:
        store = store.claim(MARKER, MARKED)
        if not store.exclusive:
            say(f"{store.uri}: this store ignores conditional PUT. Never run two jobs on this table at the same time.")
    return store


@contextlib.contextmanager
def writing(store: Store, doing: str, space_id: str = "") -> Iterator[Store]:
    """For a command that writes to the table: claim the store, and protect the files that the command needs from removal."""
    store = claim(store)
    with announced(store, doing, space_id):
        yield store


def refuse_gone(store: Store, manifest: Manifest) -> None:
    """Raises VerificationFailed if a file or encoder that a version refers to is missing, before the version is created.

    The files of a writer that reported within the last hour are never removed. A writer that was paused for longer is
    stopped here.
    """
    needed_paths = [entry.path for entry in (*manifest.files, *manifest.rejects)]
    folders = {path.rpartition("/")[0] for path in needed_paths}
    existing = {entry.path for folder in folders for entry in store.list_files(folder)}
    missing = [path for path in needed_paths if path not in existing]
    if store.info(f"{encoder_path(manifest.space_id)}/encoder.json") is None:
        missing.append(encoder_path(manifest.space_id))
    if missing:
        raise VerificationFailed(
            f"{store.name(missing[0])}: is missing, but version {manifest.version} needs it (missing in all: {len(missing)}), "
            "so the version was not created. Run the same command again."
        )


def commit_version(store: Store, manifest: Manifest) -> bool:
    """Create the version; False if another run created this number, or a higher one, first.

    When a version is retired, its manifest's path is free again, but the number must not be used twice. A writer that comes
    late sees a higher version. A writer whose request was under way while others published and retired the number sees
    their manifest in `retired/`, and removes its own.
    """
    store = claim(store)
    path, data = manifest_path(manifest.version), manifest.to_json()
    if highest_version(store) >= manifest.version:
        return False
    if not store.create(path, data) and store.read(path) != data:  # equal: we created it, and the store's answer got lost
        return False
    if renew_hint(store) > manifest.version and store.read(tomb_path(manifest.version)) not in (None, data):
        store.delete([path])
        return False
    return True
