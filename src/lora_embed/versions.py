"""The versions of a table: immutable manifests, created one after another, of which the highest is current."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lora_embed.errors import GateFailed, TableError
from lora_embed.manifest import Manifest, refuse_other_format
from lora_embed.schema import FORMAT
from lora_embed.storage import Store

MARKER = "table.json"  # the first object of a table
MARKED = b'{"format": %d}\n' % FORMAT
CURRENT = "CURRENT"
RETIRED = "retired"


def manifest_path(version: int) -> str:
    return f"versions/{version:08d}.json"


def read_manifest(store: Store, version: int | None = None) -> Manifest | None:
    """One version's manifest, by default the highest; None where there is none.

    `CURRENT` is a hint: the search starts there and goes on as long as there is a next version.
    """
    if version is not None:
        return read_manifest_at(store, manifest_path(version))
    hint = (store.read(CURRENT) or b"").strip()
    number = int(hint) if hint.isdigit() else 0
    latest = store.read(manifest_path(number)) if number else None
    if latest is None:
        number = max(listed_versions(store), default=0)
        latest = store.read(manifest_path(number)) if number else None
    while (following := store.read(manifest_path(number + 1))) is not None:
        number, latest = number + 1, following
    return Manifest.from_json(latest, f"{store.uri}/{manifest_path(number)}") if latest is not None else None


def manifest_to_follow(store: Store) -> Manifest | None:
    """The highest version's manifest, for who is to write the next one.

    Raises TableError for a table that a newer release has written to: what that release knows of it would be lost.
    """
    marker, found = store.read(MARKER), None
    if marker is not None:
        with contextlib.suppress(ValueError):
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
    """The manifest at a path of the table; None where there is none."""
    data = store.read(path)
    return Manifest.from_json(data, f"{store.uri}/{path}") if data is not None else None


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
    while True:
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
        created = datetime.now(UTC).isoformat(timespec="seconds")
        lineage = wanted.lineage | {"rollback": {"from": current.version, "to": to, "why": why}}
        manifest = replace(wanted, version=current.version + 1, created=created, held=held, lineage=lineage)
        if commit_version(store, manifest):
            return manifest


def move_aside(store: Store, version: int) -> None:
    """Retire a version: its manifest goes to `retired/`, where its age tells for how long its files stay."""
    data = store.read(manifest_path(version))
    if data is not None:
        store.create(f"{RETIRED}/{version:08d}.json", data)
        store.delete([manifest_path(version)])


def commit_version(store: Store, manifest: Manifest) -> bool:
    """Create the version; False when another run created one of this number first."""
    path, data = manifest_path(manifest.version), manifest.to_json()
    if not store.create(path, data) and store.read(path) != data:  # equal: it is ours, and the store's answer got lost
        return False
    store.replace(CURRENT, f"{manifest.version}\n".encode())
    return True
