"""Storage: whole objects or none, one winner, nothing left behind, nothing left out of a listing, errors for people."""

import fcntl
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import s3fs
from fsspec.spec import AbstractFileSystem

from lora_embed.entries import Entry
from lora_embed.errors import StorageError
from lora_embed.store.fetch import fetch_directory
from lora_embed.store.local import TEMPORARY, correct_the_path
from lora_embed.store.store import Store

WRITER = """
import sys
from lora_embed.store.store import Store
store, me = Store(sys.argv[1]), sys.argv[2].encode()
print(*(int(store.create(f"parts/{number}", me * 10_000)) for number in range(100)))
"""


def test_create_has_one_winner_and_readers_see_all_or_nothing(tmp_path: Path) -> None:
    store, writers, size = Store(str(tmp_path)), 32, 300_000
    start = threading.Barrier(writers + 4)

    def write(writer: int) -> bool:
        start.wait()
        return store.create("versions/1.json", bytes([writer]) * size)

    def read() -> set[bytes]:
        start.wait()
        seen: set[bytes] = set()
        while not seen:
            seen |= {data for data in (store.read("versions/1.json") for _ in range(20)) if data is not None}
        return seen

    with ThreadPoolExecutor(writers + 4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        won = list(pool.map(write, range(writers)))
        seen = set().union(*(reader.result() for reader in readers))
    assert won.count(True) == 1
    assert seen == {bytes([won.index(True)]) * size}
    assert not list((tmp_path / TEMPORARY).iterdir())


def test_create_has_one_winner_among_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(writer)], stdout=subprocess.PIPE, text=True) for writer in range(3)]
    won = [writer.communicate(timeout=60)[0].split() for writer in writers]
    for number, wins in enumerate(zip(*won, strict=True)):
        assert sorted(wins) == ["0", "0", "1"]
        assert Store(str(tmp_path)).read(f"parts/{number}") == str(wins.index("1")).encode() * 10_000
    assert not list((tmp_path / TEMPORARY).iterdir())


@pytest.mark.parametrize("uri", ["memory://table-of-storage-test/x", "{tmp}", "file://{tmp}"])
def test_round_trip(tmp_path: Path, uri: str) -> None:
    store = Store(uri.format(tmp=tmp_path))
    assert store.list_files() == store.list_files("nowhere") == []
    assert store.read("a/b") is store.info("a/b") is None
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b") == b"first"
    store.replace("CURRENT", b"1")
    store.replace("CURRENT", b"22")
    assert [(entry.path, entry.size) for entry in store.list_files()] == [("CURRENT", 2), ("a/b", 5)]
    assert store.list_files() == [store.info("CURRENT"), store.info("a/b")]
    assert [entry.path for entry in store.list_files("a")] == ["a/b"]
    with store.open("a/b") as file:
        assert file.read() == b"first"
    assert store.is_directory("a")
    assert not store.is_directory("a/b")
    assert store.info("a") is None
    assert pickle.loads(pickle.dumps(store)) == store
    with pytest.raises(StorageError, match=r"a/b/c: expected a directory, found a file"):
        store.create("a/b/c", b"")
    store.delete(["a/b", "a/never-there"])
    assert store.read("a/b") is None


@pytest.mark.parametrize("uri", ["memory://table-of-order-test/x", "{tmp}"])
def test_a_listing_is_in_the_order_of_paths(tmp_path: Path, uri: str) -> None:
    """Not in that of folders: `.` comes before `/`, so a file may come before the content of a folder it is named after."""
    store = Store(uri.format(tmp=tmp_path))
    paths = ["a.b", "a/b", "a/b.c", "b", *(f"c/{number:02d}" for number in range(40))]
    for path in reversed(paths):
        store.create(path, b"")
    assert [entry.path for entry in store.list_files()] == paths
    assert [entry.path for entry in store.list_files("c")] == paths[4:]


def test_nothing_is_left_behind_and_temporary_files_are_not_listed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "folder").mkdir()
    store.create("won", b"1")
    store.create("won", b"2")
    store.replace("won", b"3")
    for act in (store.create, store.replace):
        with pytest.raises(StorageError, match="folder: expected a file, found a directory"):
            act("folder", b"")
        with pytest.raises(StorageError, match="won/below: expected a directory, found a file"):
            act("won/below", b"")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="too-large: File too large"):
            store.create("too-large", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / TEMPORARY).iterdir())
    (tmp_path / TEMPORARY / "half").write_bytes(b"")
    assert [entry.path for entry in store.list_files()] == ["won"]


def test_clear_temporary_spares_what_is_being_written(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.clear_temporary()  # no such folder yet
    for name, age_s in (("abandoned", 7200), ("being-written", 60)):
        path = tmp_path / TEMPORARY / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (time.time() - age_s,) * 2)
    store.clear_temporary()
    assert [path.name for path in (tmp_path / TEMPORARY).iterdir()] == ["being-written"]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    """A linked file's state is its target's, in a listing as in `info`: else it would look changed at once."""
    real, folder = tmp_path / "real", tmp_path / "input"
    (real / "sub").mkdir(parents=True)
    folder.mkdir()
    (real / "sub" / "a.tar").write_bytes(b"123")
    os.utime(real / "sub" / "a.tar", ns=(5, 1_234_567_890_123_456_789))
    (real / "sub" / "up").symlink_to(real)
    (folder / "file.tar").symlink_to(real / "sub" / "a.tar")
    (folder / "linked").symlink_to(real)
    (folder / "nothing").symlink_to(tmp_path / "nowhere")
    (folder / "itself").symlink_to(folder / "itself")
    store = Store(str(folder), follows_links=True)
    state = {"size": 3, "etag": "1234567890123456789"}
    listed, passed_over = store.list_input(follows=True)
    broken = [
        Entry(name, size=0, etag=why, broken=why)
        for name, why in (
            ("itself", f"a link to {folder}/itself, which does not exist"),
            ("nothing", f"a link to {tmp_path}/nowhere, which does not exist"),
        )
    ]
    found = sorted(listed, key=lambda entry: entry.path)
    assert found == [Entry("file.tar", **state), broken[0], Entry("linked/sub/a.tar", **state), broken[1]]
    assert passed_over == {}
    assert found == [store.info(entry.path) for entry in found]
    os.utime(real / "sub" / "a.tar", ns=(5, 1_234_567_890_123_456_790))
    assert store.info("file.tar") != Entry("file.tar", **state)  # a nanosecond is noticed


@pytest.mark.parametrize("mode", [0o000, 0o444])  # the second gives names, but neither sizes nor kinds
def test_a_folder_that_may_not_be_listed_is_an_error_and_not_empty(mode: int) -> None:
    """fsspec's own `find` leaves such folders out, and the table would lose their shards."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        Path(folder, "open").mkdir()
        Path(folder, "open", "a.tar").write_bytes(b"")
        Path(folder, "locked").mkdir()
        Path(folder, "locked", "b.tar").write_bytes(b"")
        Path(folder, "locked").chmod(mode)
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)  # root may list anything
        try:
            assert [entry.path for entry in Store(folder).list_files("open")] == ["open/a.tar"]
            with pytest.raises(StorageError, match="access denied"):
                Store(folder).list_files()
        finally:
            os.seteuid(user)


class Locked(AbstractFileSystem):
    protocol = "locked"

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[object]:
        if path.endswith("secret"):
            raise PermissionError("no")
        return [{"name": f"{path}/secret", "type": "directory", "size": 0}]


def test_a_store_that_refuses_part_of_a_listing_is_an_error() -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    with pytest.raises(StorageError, match=r"locked://x: access denied \(no\)"):
        Store("locked://x").list_files()


@pytest.mark.parametrize(
    ("uri", "options", "message"),
    [
        ("nope://bucket", {}, "nope://bucket: unknown kind of storage.*: Protocol not known: nope"),
        ("nope://bucket", {"nested": {"a": 1}}, "nope://bucket: unknown kind of storage.*: Protocol not known: nope"),
        ("abfs://container/x", {}, "needs another package: .*adlfs"),
        ("s3://", {}, "the bucket is missing; expected s3://bucket/path"),
        ("s3://bucket/x", {"kye": "typo"}, r"unknown storage option: .*'kye'\. Options given: \['kye'\]"),
        ("s3://bucket/x", {}, "s3://bucket/x: cannot be reached: Unable to locate credentials"),
    ],
)
def test_unusable_stores(monkeypatch: pytest.MonkeyPatch, uri: str, options: dict[str, object], message: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec would hand out one that an earlier test opened, with its keys
    with pytest.raises(StorageError, match=message):
        Store(uri, options).list_files()


def test_check_writable(tmp_path: Path) -> None:
    Store(str(tmp_path / "not" / "yet")).check_writable()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file is a file, so nothing can be written below it"):
        Store(str(tmp_path / "file" / "table")).check_writable()


def test_paths_below_the_root_of_a_disk_are_not_below_the_current_folder() -> None:
    assert Store("/").full_path("") == "/"
    assert Store("/").full_path("etc/hosts") == "/etc/hosts"
    assert Store("/").info("etc/passwd") is not None


def test_fetched_directories_are_whole_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path))
    store = Store("memory://encoder-of-storage-test")
    store.create("config.json", b"{}")
    store.create("golden/a.png", b"png")
    store.create("other.bin", b"?")
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch_directory(store.uri, None, ("config.json", "golden/*")), range(4)))
    folder = folders[0]
    assert set(folders) == {folder}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == {"config.json", "golden/a.png"}
    assert fetch_directory(store.uri, None, ("config.json", "golden/*")) == folder
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    with pytest.raises(StorageError, match="holds no file that matches weights"):
        fetch_directory(store.uri, None, ("weights",))
    with pytest.raises(StorageError, match="no such directory"):
        fetch_directory("/nowhere/encoder", None, ("*",))


def test_copies_that_nobody_asks_for_any_longer_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path))
    folders = []
    for name in ("old", "in use", "held", "new"):
        store = Store(f"memory://copies-of-storage-test/{name}")
        store.create("config.json", name.encode())
        if name == "new":
            (tmp_path / "fetched" / "killed.0f").mkdir()
            for path in (tmp_path / "fetched").iterdir():
                os.utime(path, (time.time() - 8 * 86400, time.time() - 8 * 86400))
            held = folders[2].with_suffix(".lock").open()
            fcntl.flock(held, fcntl.LOCK_EX)
            fetch_directory("memory://copies-of-storage-test/in use", None, ("*",))
        folders.append(fetch_directory(store.uri, None, ("*",)))
    held.close()
    assert {path.name for path in (tmp_path / "fetched").iterdir() if path.is_dir()} == {path.name for path in folders[1:]}
    assert not folders[0].with_suffix(".lock").exists()


def test_a_path_that_is_almost_right_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert correct_the_path("photo") == "Did you mean photos?"
    assert correct_the_path(tmp_path / "phtoos") == f"Did you mean {tmp_path / 'photos'}?"
    for other in ("table", "nowhere/photos", str(tmp_path / "nowhere" / "photos")):
        assert correct_the_path(other) == "Correct the path."
