"""Versions that live: rollback, what it holds back, and what a table no longer needs."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_table_read import LAYOUT, SPACE, publish, stage

from lora_embed.chain.items import Pass
from lora_embed.config.models import JobConfig
from lora_embed.entries import Entry
from lora_embed.errors import GateFailed, StorageError, StoreUnavailable, TableError
from lora_embed.run.encoders import renew_encoder
from lora_embed.run.publish import _clear
from lora_embed.store.store import Store
from lora_embed.table.compact import plan_reuse
from lora_embed.table.manifest import Manifest, ShardCounts
from lora_embed.table.read import open_table
from lora_embed.table.staging import verify_parts
from lora_embed.table.status import describe_table
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import (
    MARKED,
    MARKER,
    commit_version,
    listed_versions,
    newest_of,
    read_manifest,
    refuse_held,
    roll_back,
)
from samples import described
from tables import retire

OTHER = "07e207e207e2"
DAY = 86400.0
SHARD = ShardCounts(id="ee", name="e.tar", samples=2, vectors=2, rejects=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three versions of one space: shards a; a and b; a and b and c, in files of their own."""
    store = Store(str(tmp_path / "table"))
    store.create(MARKER, MARKED)
    store.create(f"encoders/{SPACE}/encoder.json", b"{}")
    current, names = None, {}
    for number, name in enumerate(("a", "b", "c"), start=1):
        names[name * 2] = f"{name}.tar"
        stats = verify_parts(store, SPACE, LAYOUT, stage(store, name * 2, f"{name}.tar", 5))
        current = publish(store, number, {name * 2: stats}, plan_reuse(current, set(names)), names)
    return store


def current_of(store: Store) -> Manifest:
    manifest = read_manifest(store)
    assert manifest is not None
    return manifest


def age(store: Store, days: float, below: str = "") -> None:
    """Make what lies there older, by the store's own clock, but for CURRENT."""
    for path in (Path(store.uri) / below).rglob("*"):
        if path.is_file() and path.name != "CURRENT":
            when = path.stat().st_mtime - days * DAY
            os.utime(path, (when, when))


def files_below(store: Store, folder: str) -> set[str]:
    return {entry.path for entry in store.list_files(folder)}


def other_space(store: Store) -> Manifest:
    """A version of another space, with rows of its own."""
    current = current_of(store)
    manifest = replace(current, version=current.version + 1, space_id=OTHER)
    store.create(f"encoders/{OTHER}/encoder.json", b"{}")
    assert commit_version(store, manifest)
    return manifest


def test_a_rollback_is_the_next_version_with_an_earlier_ones_content(store: Store) -> None:
    manifest = roll_back(store, 1, "c was mislabelled")
    assert (manifest.version, manifest.files) == (4, read_manifest(store, 1).files)  # type: ignore[union-attr]
    assert manifest.lineage["rollback"] == {"from": 3, "to": 1, "why": "c was mislabelled"}
    assert manifest.held == {}  # of one space: the next run publishes the input again
    assert open_table(store.uri).version == 4
    verify_table(open_table(store.uri))
    verify_table(open_table(store.uri, version=3))


def test_a_rollback_holds_the_space_that_it_replaces_back(store: Store) -> None:
    other_space(store)
    manifest = roll_back(store, 3, "search got worse")
    assert manifest.held == {OTHER: "search got worse"}
    with pytest.raises(
        GateFailed, match=f"space {OTHER} is not published, because a rollback holds it back \\(search got worse\\)"
    ):
        refuse_held(current_of(store), OTHER, releases=False)
    refuse_held(current_of(store), OTHER, releases=True)
    refuse_held(current_of(store), SPACE, releases=False)
    said = describe_table(store.uri).describe()
    assert f"held back space {OTHER}: search got worse" in said
    assert "retained  versions 1, 2, 3, 4, 5" in said
    forward = roll_back(store, 4, "it was the index")
    assert forward.held == {SPACE: "it was the index"}


@pytest.mark.parametrize(
    ("to", "message"),
    [(9, "has no version 9. Existing versions: 1, 2, 3"), (3, "version 3 is already the current version")],
)
def test_a_rollback_to_nowhere_is_refused(store: Store, to: int, message: str) -> None:
    with pytest.raises(TableError, match=message):
        roll_back(store, to, "why")
    assert listed_versions(store) == [1, 2, 3]


def test_rows_are_taken_over_from_the_newest_version_of_the_space(store: Store) -> None:
    pins = current_of(store).pins
    assert newest_of(store, SPACE, pins, current_of(store)) == current_of(store)
    last, other = current_of(store), other_space(store)
    assert newest_of(store, SPACE, pins, other) == last
    assert newest_of(store, OTHER, pins, other) == other
    assert newest_of(store, "0" * 12, pins, other) is None
    assert newest_of(store, SPACE, pins | {"precision": "bfloat16"}, other) is None
    assert newest_of(store, SPACE, pins, None) is None


def test_retired_versions_go_after_the_grace_period_and_not_before(store: Store) -> None:
    roll_back(store, 1, "to leave b and c to the retired ones")
    retire(store, keep=2, grace_s=DAY)
    assert listed_versions(store) == [3, 4]
    everything = files_below(store, "data")
    retire(store, keep=1, grace_s=DAY)
    assert listed_versions(store) == [4]
    assert files_below(store, "data") == everything
    age(store, 2)
    store.replace("CURRENT", b"4\n")
    assert retire(store, keep=1, grace_s=DAY) > 0
    assert files_below(store, "data") == {entry.path for entry in current_of(store).files}
    assert files_below(store, "retired") == set()
    verify_table(open_table(store.uri))


def test_old_files_of_a_retired_version_stay_through_all_nights_of_the_grace_period(store: Store) -> None:
    """They were written long before, and only the retired manifest still names them."""
    roll_back(store, 1, "to leave b and c to the retired ones")
    age(store, 30)
    everything = files_below(store, "data")
    for _ in range(3):
        retire(store, keep=1, grace_s=DAY)
        assert listed_versions(store) == [4]
        assert files_below(store, "data") == everything
    age(store, 2)
    retire(store, keep=1, grace_s=DAY)
    assert files_below(store, "data") == {entry.path for entry in current_of(store).files}


def test_a_rollback_that_began_before_a_version_was_retired_finds_its_files(store: Store) -> None:
    """The race: the manifest was read, then another run retired it, then the rollback is committed."""
    old = read_manifest(store, 1)
    assert old is not None
    age(store, 30)
    store.replace("CURRENT", b"3\n")
    retire(store, keep=1, grace_s=DAY)
    assert listed_versions(store) == [3]
    assert commit_version(store, replace(old, version=4))
    verify_table(open_table(store.uri))


def test_what_nothing_refers_to_is_removed_by_age(store: Store) -> None:
    kept = {path for path in files_below(store, "") if not path.startswith("staging/")}
    for path in (
        f"data/{SPACE}/lost-race.parquet",
        f"encoders/{OTHER}/encoder.json",
        f"staging/{SPACE}/old-layout/aa-00000000.parquet",
    ):
        store.create(path, b"{}")
    store.create("recipes/abc.json", b'{"space_id": "%s"}' % OTHER.encode())
    store.create(f"staging/{SPACE}/resolved.json", b"{}")
    store.create(f"staging/{SPACE}/{LAYOUT.layout_id}/ff-00000000.parquet", b"in progress")
    store.replace("CURRENT", b"3\n")
    assert retire(store, keep=5, grace_s=DAY) == 0
    age(store, 2)
    store.create(f"staging/{SPACE}/{LAYOUT.layout_id}/ff-00000001.parquet", b"in progress")
    store.replace("CURRENT", b"3\n")
    retire(store, keep=5, grace_s=DAY, wanted=frozenset({"ff"}))
    assert files_below(store, "") == kept | {
        f"staging/{SPACE}/resolved.json",
        f"staging/{SPACE}/{LAYOUT.layout_id}/ff-00000000.parquet",
        f"staging/{SPACE}/{LAYOUT.layout_id}/ff-00000001.parquet",
    }


def test_what_was_staged_for_an_encoder_that_was_given_up_goes(store: Store) -> None:
    """Also where the shards are there still, and where a removal was interrupted between the encoder and its recipe."""
    kept = {path for path in files_below(store, "") if not path.startswith("staging/")}
    store.create(f"encoders/{OTHER}/encoder.json", b"{}")
    store.create(f"staging/{OTHER}/layout/aa-00000000.parquet", b"of its sample")
    store.create("recipes/abc.json", b'{"space_id": "0123456789ab"}')
    age(store, 2)
    store.replace("CURRENT", b"3\n")
    retire(store, keep=5, grace_s=DAY, wanted=frozenset({"aa"}))
    assert files_below(store, "") == kept


def test_an_encoder_in_use_is_kept_whatever_its_age(store: Store) -> None:
    store.create(f"encoders/{OTHER}/encoder.json", b"{}")
    age(store, 30)
    store.create(f"staging/{OTHER}/layout/aa-00000000.parquet", b"staged today")
    store.replace("CURRENT", b"3\n")
    retire(store, keep=5, grace_s=DAY)
    assert store.info(f"encoders/{OTHER}/encoder.json") is not None
    age(store, 2, f"staging/{OTHER}")
    store.replace("CURRENT", b"3\n")
    retire(store, keep=5, grace_s=DAY)
    assert store.info(f"encoders/{OTHER}/encoder.json") is None


def test_an_old_encoder_is_renewed_when_it_is_used_again(store: Store) -> None:
    path, encoder = f"encoders/{SPACE}/encoder.json", type("Encoder", (), {"space_id": SPACE})
    fresh = store.info(path)
    renew_encoder(encoder, store, grace_days=7)  # type: ignore[arg-type]
    assert store.info(path) == fresh
    age(store, 4)
    old = store.info(path)
    renew_encoder(encoder, store, grace_days=7)  # type: ignore[arg-type]
    renewed = store.info(path)
    assert old is not None
    assert renewed is not None
    assert renewed.modified > old.modified + 3 * DAY


def test_what_cannot_be_cleared_does_not_undo_a_publication(
    store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise StoreUnavailable("s3://bucket/table: no usable answer in 120 s and 12 tries")

    monkeypatch.setattr(Store, "delete", fails)
    stage(store, "ee", "e.tar", 2)  # what the version absorbed
    manifest = replace(current_of(store), files=(replace(current_of(store).files[0], shards=(SHARD,)),))
    job = JobConfig(recipe="r", input=("i",), table=store.uri)
    _clear(Pass.of(job, store, described(space_id=SPACE), LAYOUT), manifest)
    said = capfd.readouterr().err
    assert "version 3 is published, but its staged parts could not be removed" in said
    assert "no usable answer in 120 s and 12 tries" in said


def test_a_listing_that_ends_early_removes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest version is found by its name, so what it refers to is in use whatever the listing says."""
    held = {path: (Path(store.uri) / path).read_bytes() for path in (entry.path for entry in store.list_files("data"))}
    assert held
    right = Store.list_files

    def short(self: Store, folder: str = "", **options: Any) -> list[Entry]:
        return [] if folder == "versions" else right(self, folder, **options)

    monkeypatch.setattr(Store, "list_files", short)
    with pytest.raises(StorageError, match="exists, but the storage's listing lacks it"):
        retire(store, 2, 0.0, frozenset())
    assert {path: (Path(store.uri) / path).read_bytes() for path in held} == held
