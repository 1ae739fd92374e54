"""What a table no longer needs: old versions, and what nothing refers to, once a grace period is over."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from lora_embed.config.foreign import RecipeRecord, read_record, taken_as
from lora_embed.config.models import Retain
from lora_embed.errors import LoraEmbedError, StorageError, TableError
from lora_embed.monitor.progress import say
from lora_embed.monitor.runs import find_live
from lora_embed.schema import Entry, Part
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
    read_manifest,
    renew_hint,
    tomb_path,
)
from lora_embed.text import in_lines

DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What whoever enforces retention needs itself; a run knows it, a person at a command line does not."""

    run_id: str = ""
    shards: frozenset[str] | None = None  # ids of its input; None: any may be of an input
    folder: str = ""  # staging/<space>/<layout>


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What retention kept and removed, or would remove."""

    table: str
    is_dry_run: bool
    retain: dict[str, float]
    kept: tuple[int, ...]  # versions
    retired: dict[int, str]  # versions whose files are still there → until when they stay, UTC
    objects: int
    bytes: int
    by_folder: dict[str, int]  # objects
    going_on: tuple[str, ...]  # runs and commands, whose needs stay whatever their age

    def describe(self) -> str:
        """For a person."""
        would = "would be removed" if self.is_dry_run else "removed"
        counted = ", ".join(f"{count:,} in {folder}/" for folder, count in sorted(self.by_folder.items()))
        days = f"{self.retain['grace_days']:g} days"
        lines = [
            f"table     {self.table}, which keeps {self.retain['versions']} versions, and for {days} what they do not need"
        ]
        lines += [f"versions  {', '.join(map(str, self.kept)) or 'none'}"]
        lines += [f"retired   version {number}: its files stay until {until}" for number, until in self.retired.items()]
        lines += [f"waits     for {run_id}, which goes on: what is younger than it stays" for run_id in self.going_on]
        lines += [
            f"{would}: {self.objects:,} objects, {self.bytes:,} bytes ({counted})" if self.objects else f"nothing {would}"
        ]
        return in_lines(lines)


@dataclass(kw_only=True)
class _Kept:
    """What stays, whatever its age: of the versions kept, of those retired within the grace period, and of live runs."""

    oldest: float  # by the store's clock: what is younger stays
    needs: Needs
    live: frozenset[str]  # spaces of other runs
    files: set[str] = field(default_factory=set)  # paths of published files
    spaces: set[str] = field(default_factory=set)
    forgot: set[int] = field(default_factory=set)  # versions that a forgetting retires

    def add(self, data: bytes | None, where: str) -> None:
        """A version that stays, unless it is gone; its manifest, which may be large, is not held."""
        if data is None:
            return
        found = Manifest.from_json(data, where)
        self.files.update(entry.path for entry in (*found.files, *found.rejects))
        self.spaces.add(found.space_id)
        self.forgot.update(found.lineage.get("forgot", {}).get("held_by", ()))


def retain_of(manifest: Manifest | None) -> Retain:
    """What the run that published a version was told to retain; the defaults where an older release published it."""
    said = manifest.lineage.get("retain", {}) if manifest is not None else {}
    return taken_as(Retain, said, "the `retain` of a version")


def enforce(store: Store, retain: Retain, needs: Needs) -> None:
    """`collect` at the end of a run, which ends as it does whether or not that succeeds."""
    try:
        collect(store, retain, needs)
    except (LoraEmbedError, OSError) as error:
        say(f"what {store.uri} no longer needs could not be removed; the next run or `lora-embed gc` will: {error}")


def collect_garbage(uri: str, options: dict[str, Any], retain: Retain | None = None, *, is_dry_run: bool = False) -> Collected:
    """`collect` for a person: by what the current version's run was told to retain, unless told otherwise.

    Raises TableError where nothing was ever published.
    """
    store = Store(uri, options)
    manifest = read_manifest(store)
    if manifest is None:
        raise TableError(f"{uri}: has no published version; `lora-embed status {uri}` says what is there")
    return collect(store, retain or retain_of(manifest), is_dry_run=is_dry_run)


def collect(store: Store, retain: Retain, needs: Needs | None = None, *, is_dry_run: bool = False) -> Collected:
    """Retire all but the newest versions, and remove what nothing has referred to for the grace period.

    A version is retired by moving its manifest to `retired/`; for the grace period its files stay, for readers that have
    it open. All ages are by the store's own clock. Nothing that is younger than the oldest run that may go on is removed,
    nor encoders and parts of such a run's space: a live run is one that was heard of within the hour. Its state is read
    before the versions are listed, so that what it has committed before its end is seen. Raises StorageError, before
    anything is removed, when the current version is not among those listed.
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
    listed, tombs = _listed(store), store.list_files(RETIRED)  # in this order: what is retired in between is in both
    _read_tombs(store, tombs, kept)
    leaving = _retire(store, listed, retain.versions, kept, is_dry_run=is_dry_run)
    doomed = _unreferenced(store, kept) + _unused(store, kept)
    doomed += [tomb for tomb in tombs if tomb.modified < kept.oldest]  # last: while it is there, its files may be
    if doomed and not is_dry_run:
        store.delete([entry.path for entry in doomed])
    ends = dict.fromkeys(leaving, now + grace_s)
    ends |= {_number(tomb): tomb.modified + grace_s for tomb in tombs if tomb.modified >= kept.oldest}
    return Collected(
        table=store.uri,
        is_dry_run=is_dry_run,
        retain={"versions": retain.versions, "grace_days": retain.grace_days},
        kept=tuple(sorted(set(listed) - set(leaving))),
        retired={number: utc(end) for number, end in sorted(ends.items())},
        objects=len(doomed),
        bytes=sum(entry.size for entry in doomed),
        by_folder=dict(Counter(entry.path.partition("/")[0] for entry in doomed)),
        going_on=tuple(run.state.run_id for run in live),
    )


def utc(moment: float) -> str:
    """ISO 8601, in seconds, not before the moment."""
    return datetime.fromtimestamp(-(-moment // 1), UTC).isoformat(timespec="seconds")


def _listed(store: Store) -> list[int]:
    """All versions, in order; StorageError where the current one is missing among them, whose files would be removed."""
    listed, highest = listed_versions(store), highest_version(store)
    if max(listed, default=0) < highest:
        raise StorageError(f"{store.uri}/versions: version {highest} is there, but the listing ends before it")
    if not listed and store.read(CURRENT) is not None:
        raise StorageError(f"{store.uri}/versions: {CURRENT} names a version, but none is there, so nothing is removed")
    return listed


def _retire(store: Store, listed: list[int], keep: int, kept: _Kept, *, is_dry_run: bool) -> list[int]:
    """Move aside what is too old, and what held images of a forgetting that was interrupted; returns these versions.

    Each manifest is read once, the newest first. One that is gone was retired meanwhile: then its tomb is read.
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
    """What versions refer to that were retired within the grace period."""
    for tomb in tombs:
        if tomb.modified >= kept.oldest:
            kept.add(store.read(tomb.path), store.name(tomb.path))


def _number(tomb: Entry) -> int:
    name = tomb.path.rpartition("/")[2].removesuffix(".json")
    return int(name) if name.isdigit() else 0


def _unreferenced(store: Store, kept: _Kept) -> list[Entry]:
    """Published files of no version, and those that a run wrote for a version that it could not create."""
    listed = [*store.list_files("data"), *store.list_files("rejects")]
    return [entry for entry in listed if entry.path not in kept.files and entry.modified < kept.oldest]


def _unused(store: Store, kept: _Kept) -> list[Entry]:
    """Encoders of no version, with their recipes, unless something was staged with them lately; and parts left behind."""
    staged, encoders = store.list_files("staging"), store.list_files("encoders")
    used = kept.spaces | {_space(entry) for entry in (*encoders, *staged) if entry.modified >= kept.oldest}
    doomed = [entry for entry in encoders if _space(entry) not in used]
    for entry in store.list_files("recipes"):
        recipe = read_record(store, entry.path, RecipeRecord) if entry.modified < kept.oldest else None
        if recipe is not None and recipe.space_id not in used:
            doomed.append(entry)
    return doomed + _left_behind(staged, used, kept)


def _space(entry: Entry) -> str:
    return entry.path.split("/")[1]


def _left_behind(staged: list[Entry], used: set[str], kept: _Kept) -> list[Entry]:
    """Staged parts of shards that are no longer there, and of spaces or layouts given up."""
    renewed: dict[str, float] = defaultdict(float)  # when something was staged last, by space and layout
    for entry in staged:
        folder = entry.path.rpartition("/")[0]
        renewed[folder] = max(entry.modified, renewed[folder])
    doomed = []
    for entry in staged:
        folder, _, name = entry.path.rpartition("/")
        part = Part.parse(name)
        if part is None:
            stays = _space(entry) in used  # what `auto` was resolved to
        else:
            is_wanted = kept.needs.shards is None or part.shard_id in kept.needs.shards
            goes_on = renewed[folder] >= kept.oldest or folder == kept.needs.folder
            stays = (is_wanted and goes_on) or _space(entry) in kept.live
        if entry.modified < kept.oldest and not stays:
            doomed.append(entry)
    return doomed
