"""No version moves backwards, however long a writer stalls between two requests, and whatever others retire meanwhile."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_publishers import add_shard
from test_table_read import SPACE

from lora_embed.entries import Entry
from lora_embed.store.store import Store
from lora_embed.table.lineage import forget
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import (
    commit_version,
    highest_version,
    listed_versions,
    move_aside,
    read_manifest,
    renew_hint,
    roll_back,
)
from s3 import Proxy, Request, S3Server
from tables import retire

DAY = 86400.0
Others = Callable[[], None]


def filled(store: Store, shards: int = 4) -> Store:
    """A table of as many versions as shards."""
    store.create(f"encoders/{SPACE}/encoder.json", b"{}")
    for number in range(shards):
        add_shard(store, number)
    return store


def overtake(store: Store, seen: list[int]) -> None:
    """What others do while a writer stalls: they publish an image, forget it, which leaves a gap, and publish once more."""
    add_shard(store, 10)
    seen.append(open_at(store))
    forget(store, ["0010.tar/0"], "its owner asked")
    seen.append(open_at(store))
    add_shard(store, 11)
    seen.append(open_at(store))


def open_at(store: Store) -> int:
    return open_table(store.uri, storage_options=store.options).version


def shards_of(store: Store) -> set[str]:
    manifest = read_manifest(store)
    assert manifest is not None
    return {shard.name for shard in manifest.shards.values()}


def names(*numbers: int) -> set[str]:
    return {f"{number:04d}.tar" for number in numbers}


def stall_once(proxy: Proxy, path: str, others: Others) -> None:
    """Hold the next PUT of this object until the others are done."""
    held: list[Request] = []

    def watch(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith(path) and not held:
            held.append(request)
            others()

    proxy.watch = watch


@pytest.fixture(params=["local disk", "S3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> "Place":
    if request.param == "local disk":
        return Place(Store(str(tmp_path / "table")), None)
    server: S3Server = request.getfixturevalue("server")
    name = re.sub(r"\W+", "-", request.node.name)
    return Place(Store(f"s3://images/{name}", server.options()), server)


class Place:
    """A table that one writer reaches slowly."""

    def __init__(self, store: Store, server: S3Server | None) -> None:
        self.store, self.server = store, server

    def stalled(self, path: str, act: Callable[[Store], Any], others: Others, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Act, and stall just before the first write of this object; the others come in between."""
        if self.server is not None:
            with Proxy(self.server.endpoint) as proxy:
                stall_once(proxy, path, others)
                return act(Store(self.store.uri, self.server.options(proxy.endpoint)))
        held: list[str] = []

        def stalling(right: Callable[..., None]) -> Callable[..., None]:
            def write(source: Any, target: Any) -> None:
                if str(target).endswith(path) and not held:
                    held.append(path)
                    others()
                right(source, target)

            return write

        with monkeypatch.context() as patch:
            for name in ("link", "replace"):
                patch.setattr(os, name, stalling(getattr(os, name)))
            return act(Store(self.store.uri))


def test_a_writer_that_stalls_before_the_hint_puts_nothing_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = filled(place.store), [4]
    place.stalled("CURRENT", lambda slow: add_shard(slow, 4), lambda: overtake(store, seen), monkeypatch)
    seen.append(open_at(store))
    assert seen == [4, 6, 7, 8, 8]
    assert listed_versions(store) == [1, 2, 3, 4, 5, 7, 8]
    assert store.read("CURRENT") == b"8\n", "it looks again at what it wrote"
    add_shard(store, 12)
    assert open_at(store) == 9
    assert shards_of(store) == names(0, 1, 2, 3, 4, 10, 11, 12)
    verify_table(open_table(store.uri, storage_options=store.options))


def test_a_hint_that_was_put_back_is_not_believed_and_mended(place: Place) -> None:
    """As by a writer of an older release, or one that died just after its write."""
    store = filled(place.store)
    overtake(store, [])
    for hint in (b"4\n", b"5\n", b"1", b"6"):
        store.replace("CURRENT", hint)
        assert open_at(store) == 7
        retire(store, keep=10, grace_s=DAY)
        assert store.read("CURRENT") == b"7\n"
        store.replace("CURRENT", hint)
        assert forget(store, ["0010.tar/0"], "once more").version == 8
        assert store.read("CURRENT") == b"8\n"
        store.delete(["versions/00000008.json"])


@pytest.mark.parametrize("act", ["publish", "forget", "roll back"])
def test_a_writer_that_stalls_at_its_manifest_does_not_take_a_number_that_is_free_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    store, seen = filled(place.store), [4]
    acts: dict[str, Callable[[Store], Any]] = {
        "publish": lambda slow: add_shard(slow, 4),
        "forget": lambda slow: forget(slow, ["0000.tar/1"], "another owner"),
        "roll back": lambda slow: roll_back(slow, 3, "too many"),
    }
    if act == "roll back":  # to a version that holds nothing of what is forgotten meanwhile: refused, not done
        with pytest.raises(Exception, match="images that were forgotten after it was published"):
            place.stalled("versions/00000005.json", acts[act], lambda: overtake(store, seen), monkeypatch)
    else:
        place.stalled("versions/00000005.json", acts[act], lambda: overtake(store, seen), monkeypatch)
    assert seen == [4, 5, 6, 7]
    new = {"publish": 8, "forget": 8, "roll back": 7}[act]
    assert open_at(store) == highest_version(store) == new
    kept = {"publish": [1, 2, 3, 4, 6, 7, 8], "forget": [8], "roll back": [1, 2, 3, 4, 6, 7]}[act]
    assert listed_versions(store) == kept, "5 is not taken a second time"
    assert shards_of(store) == names(0, 1, 2, 3, 10, 11) | (names(4) if act == "publish" else set())
    rows = open_table(store.uri, storage_options=store.options).rows(["0010.tar/0", "0000.tar/1"]).column("id").to_pylist()
    assert rows == ([] if act == "forget" else ["0000.tar/1"])
    verify_table(open_table(store.uri, storage_options=store.options))


def test_a_writer_that_comes_late_takes_no_number_below_the_highest(place: Place) -> None:
    store = filled(place.store)
    late = read_manifest(store, 3)
    assert late is not None
    for version in (2, 3):
        move_aside(store, version)
    store.delete(["retired/00000003.json"])  # its grace period is over
    assert not commit_version(store, late)
    assert listed_versions(store) == [1, 4]


def test_who_published_and_was_retired_while_it_stalled_has_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(place.store)

    def others() -> None:
        forget(store, ["0004.tar/0"], "of the version that is just made")

    assert place.stalled("CURRENT", lambda slow: add_shard(slow, 4), others, monkeypatch) == 1, "it does not publish again"
    assert listed_versions(store) == [1, 2, 3, 4, 6]
    assert shards_of(store) == names(0, 1, 2, 3, 4)


def test_a_version_that_a_listing_does_not_have_yet_is_found_by_its_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store, right = filled(place.store), Store.list_files

    def late(self: Store, prefix: str = "") -> list[Entry]:
        return [entry for entry in right(self, prefix) if not entry.path.endswith("00000004.json")]

    monkeypatch.setattr(Store, "list_files", late)
    assert open_at(store) == 4


def test_a_version_that_is_retired_between_listing_and_reading_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, right = filled(Store(str(tmp_path / "table"))), Store.read
    raced: list[str] = []

    def read(self: Store, path: str) -> bytes | None:
        if path == "versions/00000004.json" and not raced:
            raced.append(path)
            forget(store, ["0003.tar/0"], "just now")
        return right(self, path)

    monkeypatch.setattr(Store, "read", read)
    assert open_at(store) == 5


def test_a_version_is_not_created_whose_files_are_gone(tmp_path: Path) -> None:
    """As of a writer that slept for longer than the grace period."""
    store = filled(Store(str(tmp_path / "table")))
    first = read_manifest(store, 1)
    assert first is not None
    store.delete([first.files[0].path])
    with pytest.raises(Exception, match=r"is missing, but version 5 needs it \(missing in all: 1\)"):
        roll_back(store, 1, "too early")
    assert highest_version(store) == 4


def test_the_hint_of_an_empty_table_is_left_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "table"))
    assert (renew_hint(store), read_manifest(store), store.read("CURRENT")) == (0, None, None)
