"""Remove what a table no longer needs: old versions, and objects that nothing has referred to for the grace period."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from lora_embed.config.foreign import RecipeRecord, read_record, taken_as
from lora_embed.config.models import Retain
from lora_embed.entries import Entry
from lora_embed.errors import LoraEmbedError, StorageError
from lora_embed.monitor.progress import say
from lora_embed.monitor.runs import find_live
from lora_embed.schema import Part
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest
from lora_embed.table.versions import (
    CURRENT,
    RETIRED,
    claim,
    highest_version,
    listed_versions,
    manifest_path,
    move_aside,
    no_version,
    read_manifest,
    renew_hint,
    tomb_path,
)
from lora_embed.text import in_lines, number_of, utc

DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the run that enforces retention needs itself, and so must not remove; empty for `lora-embed gc`."""

    run_id: str = ""
    shards: frozenset[str] | None = None  # ids of the shards in its input; None if the input is not known
    folder: str = ""  # staging/<space>/<layout>


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What retention kept and removed, or would remove in a dry run."""

    table: str
    is_dry_run: bool
    retain: dict[str, float]
    kept: tuple[int, ...]  # versions
    retired: dict[int, str]  # retired versions whose files still exist → time until which the files stay, UTC
    objects: int  # removed
    bytes: int  # removed
    by_folder: dict[str, int]  # removed objects
    going_on: tuple[str, ...]  # ids of live runs and commands; what they need stays, whatever its age

    def describe(self) -> str:
        """For a person."""
        would = "would be removed" if self.is_dry_run else "removed"
        counted = ", ".join(f"{count:,} in {folder}/" for folder, count in sorted(self.by_folder.items()))
        days = number_of(self.retain["grace_days"], "day")
        versions = number_of(self.retain["versions"], "version")
        lines = [f"table     {self.table}: keeps {versions}, and other files for {days} more"]
        lines += [f"versions  {', '.join(map(str, self.kept)) or 'none'}"]
        lines += [f"retired   version {number}; its files stay until {until}" for number, until in self.retired.items()]
        lines += [f"live      run {run_id}; whatever was written since it began stays" for run_id in self.going_on]
        objects = f"{number_of(self.objects, 'object')}, {number_of(self.bytes, 'byte')} ({counted})"
        lines += [f"{would}: {objects}" if self.objects else f"nothing {would}"]
        return in_lines(lines)


@dataclass(kw_only=True)
class _Kept:
    """What stays whatever its age: files of kept versions and of those retired within the grace period, needs of live runs."""

    oldest: float  # a time by the store's clock; objects written after it stay
    needs: Needs
    live: frozenset[str]  # spaces of other live runs
    files: set[str] = field(default_factory=set)  # paths of published files
    spaces: set[str] = field(default_factory=set)
    forgot: set[int] = field(default_factory=set)  # versions that hold forgotten images and so must be retired

    def add(self, data: bytes | None, where: str) -> None:
        """Keep what a version refers to. `data` is its manifest, None if that no longer exists; only its paths are stored."""
        if data is None:
            return
        manifest = Manifest.from_json(data, where)
        self.files.update(entry.path for entry in (*manifest.files, *manifest.rejects))
        self.spaces.add(manifest.space_id)
        self.forgot.update(manifest.lineage.get("forgot", {}).get("held_by", ()))


def retain_of(manifest: Manifest | None) -> Retain:
    """The retention settings of the run that published a version; the defaults if an older release published it."""
    settings = manifest.lineage.get("retain", {}) if manifest is not None else {}
    return taken_as(Retain, settings, "the `retain` of a version")


def enforce(store: Store, retain: Retain, needs: Needs) -> None:
    """Call `collect` at the end of a run. If it fails, that is only logged: the result of the run stays the same."""
    try:
        collect(store, retain, needs)
    except (LoraEmbedError, OSError) as error:
        say(f"{store.uri}: old files could not be removed: {error}. The next run removes them, or `lora-embed gc {store.uri}`.")


def collect_garbage(uri: str, options: dict[str, Any], retain: Retain | None = None, *, is_dry_run: bool = False) -> Collected:
    """Call `collect` for `lora-embed gc`, with `retain` or else the retention settings of the current version's run.

    Raises TableError if nothing was ever published.
    """
    store = Store(uri, options)
    manifest = read_manifest(store)
    if manifest is None:
        raise no_version(uri)
    return collect(store, retain or retain_of(manifest), is_dry_run=is_dry_run)


def collect(store: Store, retain: Retain, needs: Needs | None = None, *, is_dry_run: bool = False) -> Collected:
    """Retire all but the newest versions, and remove objects that nothing has referred to for the grace period.

    A version is retired by moving its manifest to `retired/`. Its files stay for the grace period, for readers that have the
    version open. All ages are measured by the store's own clock. A live run is one that reported within the last hour.
    Objects written since the oldest live run began are kept, and so are encoders and parts of a live run's space. The
    states of runs are read before the versions are listed, so that a version which a run commits just before its end is
    seen. Raises StorageError, before anything is removed, if the listing lacks the current version.
    """
    needs = needs or Needs()
    grace_s = retain.grace_days * DAY_S
    now = store.now()
    live = [run for run in find_live(store, now) if run.state.run_id != needs.run_id]
    oldest = min([now - grace_s, *(run.began for run in live)])
    kept = _Kept(oldest=oldest, needs=needs, live=frozenset(run.state.space_id for run in live))
    kept.spaces |= kept.live | set(needs.folder.split("/")[1:2])
    if not is_dry_run:
        store = claim(store)
        renew_hint(store)
        store.clear_temporary()
    listed, tombs = _listed(store), store.list_files(RETIRED)  # in this order: a version retired in between is in both
    _read_tombs(store, tombs, kept)
    leaving = _retire(store, listed, retain.versions, kept, is_dry_run=is_dry_run)
    doomed = _unreferenced(store, kept) + _unused(store, kept)
    doomed += [tomb for tomb in tombs if tomb.modified < kept.oldest]  # removed last, after the files it lists
    if doomed and not is_dry_run:
        store.delete([entry.path for entry in doomed])
    ends = dict.fromkeys(leaving, now + grace_s)
    ends |= {_number(tomb): tomb.modified + grace_s for tomb in tombs if tomb.modified >= kept.oldest}
    return Collected(
        table=store.uri,
        is_dry_run=is_dry_run,
        retain={"versions": retain.versions, "grace_days": retain.grace_days},
        kept=tuple(sorted(set(listed) - set(leaving))),
        retired={number: utc(math.ceil(end)) for number, end in sorted(ends.items())},
        objects=len(doomed),
        bytes=sum(entry.size for entry in doomed),
        by_folder=dict(Counter(entry.path.partition("/")[0] for entry in doomed)),
        going_on=tuple(run.state.run_id for run in live),
    )


def _listed(store: Store) -> list[int]:
    """All versions, in order. Raises StorageError if the current one is missing: its files would be removed."""
    listed, highest = listed_versions(store), highest_version(store)
    if max(listed, default=0) < highest:
        raise StorageError(
            f"{store.uri}/versions: version {highest} exists, but the storage's listing lacks it, so nothing is removed. Try "
            "again."
        )
    if not listed and store.read(CURRENT) is not None:
        raise StorageError(
            f"{store.uri}/versions: {CURRENT} names a version, but the listing shows none, so nothing is removed. Check the "
            "permission to list, and that nobody removed the manifests."
        )
    return listed


def _retire(store: Store, listed: list[int], keep: int, kept: _Kept, *, is_dry_run: bool) -> list[int]:
    """Retire versions beyond the newest `keep`, and those of an interrupted `forget`; returns their numbers.

    Each manifest is read once, the newest first. A manifest that no longer exists was retired meanwhile; then it is read
    from `retired/`.
    """
    leaving = []
    for place, version in enumerate(reversed(listed)):
        data = store.read(manifest_path(version))
        if data is None:
            kept.add(store.read(tomb_path(version)), store.name(tomb_path(version)))
            continue
        kept.add(data, store.name(manifest_path(version)))
        if place >= keep or (place and version in kept.forgot):
            leaving.append(version)
            if not is_dry_run:
                move_aside(store, version, data)
    return leaving


def _read_tombs(store: Store, tombs: list[Entry], kept: _Kept) -> None:
    """Keep what the versions that were retired within the grace period refer to."""
    for tomb in tombs:
        if tomb.modified >= kept.oldest:
            kept.add(store.read(tomb.path), store.name(tomb.path))


def _number(tomb: Entry) -> int:
    name = tomb.path.rpartition("/")[2].removesuffix(".json")
    return int(name) if name.isdigit() else 0


def _unreferenced(store: Store, kept: _Kept) -> list[Entry]:
    """Data and reject files that no version refers to, such as those of a run that could not create its version."""
    listed = [*store.list_files("data"), *store.list_files("rejects")]
    return [entry for entry in listed if entry.path not in kept.files and entry.modified < kept.oldest]


def _unused(store: Store, kept: _Kept) -> list[Entry]:
    """Encoders that no version uses, with their recipes, unless parts were staged with them lately; and abandoned parts."""
    staged, encoders = store.list_files("staging"), store.list_files("encoders")
    used = kept.spaces | {_space(entry) for entry in (*encoders, *staged) if entry.modified >= kept.oldest}
    doomed = [entry for entry in encoders if _space(entry) not in used]
    for entry in store.list_files("recipes"):
        recipe = read_record(store, entry.path, RecipeRecord) if entry.modified < kept.oldest else None
        if recipe is not None and recipe.space_id not in used:
            doomed.append(entry)
    return doomed + _abandoned(staged, used, kept)


def _space(entry: Entry) -> str:
    return entry.path.split("/")[1]


def _abandoned(staged: list[Entry], used: set[str], kept: _Kept) -> list[Entry]:
    """Staged parts of shards that left the input, and of spaces or layouts that are no longer in use."""
    renewed: dict[str, float] = defaultdict(float)  # time of the newest part, by space and layout
    for entry in staged:
        folder = entry.path.rpartition("/")[0]
        renewed[folder] = max(entry.modified, renewed[folder])
    doomed = []
    for entry in staged:
        folder, _, name = entry.path.rpartition("/")
        part = Part.parse(name)
        if part is None:
            stays = _space(entry) in used  # the record of what `auto` was resolved to
        else:
            in_input = kept.needs.shards is None or part.shard_id in kept.needs.shards
            goes_on = renewed[folder] >= kept.oldest or folder == kept.needs.folder
            stays = (in_input and goes_on) or _space(entry) in kept.live
        if entry.modified < kept.oldest and not stays:
            doomed.append(entry)
    return doomed
