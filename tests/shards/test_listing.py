"""Planning: which files an input names, what identifies a shard, and which inputs are refused."""

import os
import shutil
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_embed.entries import Entries, Entry
from lora_embed.errors import ConfigError, StorageError
from lora_embed.schema import ChunkHead, Shard
from lora_embed.shards import image_groups
from lora_embed.shards.beside import FilesBeside
from lora_embed.shards.listing import list_input, list_shards
from lora_embed.shards.patterns import expand_braces
from lora_embed.store.store import Store
from samples import touch_files


def names(*patterns: str) -> list[str]:
    return [shard.name for shard in list_shards(patterns, {})]


def sample_ids(shards: list[Shard]) -> list[str]:
    heads = [(ChunkHead(shard_id=shard.id, shard_name=shard.name, prefix=shard.prefix), shard) for shard in shards]
    return sorted(head.sample_id(file.path.rpartition("/")[2]) for head, shard in heads for file in shard.files)


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{9..10}", ["9", "10"]),
        ("{b,a,}x", ["bx", "ax", "x"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{a,{b,c}y}", ["xa", "xby", "xcy"]),
        ("{3..1}", []),
    ],
)
def test_brace_ranges(pattern: str, expanded: list[str]) -> None:
    assert sorted(expand_braces(pattern)) == sorted(expanded)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", ["00.tar", "01.tar", "a/00.tar", "a/b/01.tar", "old00.tar"]),
        ("/", ["00.tar", "01.tar", "a/00.tar", "a/b/01.tar", "old00.tar"]),
        ("/*.tar", ["00.tar", "01.tar", "old00.tar"]),
        ("/0?.tar", ["00.tar", "01.tar"]),
        ("/0[!0].tar", ["01.tar"]),
        ("/*/*.tar", ["a/00.tar"]),
        ("/**/*.tar", ["00.tar", "01.tar", "a/00.tar", "a/b/01.tar", "old00.tar"]),
        ("/**/00.tar", ["00.tar", "a/00.tar"]),
        ("/a/**", ["00.tar", "b/01.tar"]),
        ("/**/a/*.tar", ["a/00.tar"]),
        ("/{00..01}.tar", ["00.tar", "01.tar"]),
        ("/{,a/}00.tar", ["00.tar", "a/00.tar"]),
        ("/{0*,a/**/*}.tar", ["00.tar", "01.tar", "a/00.tar", "a/b/01.tar"]),
        ("/a/00.tar", ["00.tar"]),
    ],
)
def test_what_a_pattern_names(tmp_path: Path, tail: str, expected: list[str]) -> None:
    touch_files(tmp_path, "00.tar", "01.tar", "old00.tar", "a/00.tar", "a/b/01.tar", "notes.txt", ".hidden.tar", "_x.tar")
    assert names(f"{tmp_path}{tail}") == expected
    assert list_shards((f"{tmp_path}/",), {}) == list_shards((str(tmp_path),), {})
    if tail:
        assert names(f"file://{tmp_path}{tail}") == expected


def test_kinds_of_input_mix(tmp_path: Path) -> None:
    touch_files(tmp_path, "t/A.TAR", "p/b.parquet", "p/c.pq", "i/x.JPG", "i/y.webp", "i/deep/z.png", "_named.tar")
    shards = list_shards((f"{tmp_path}/t", f"{tmp_path}/p/*", f"{tmp_path}/i", f"{tmp_path}/_named.tar"), {})
    assert [(shard.name, shard.kind, shard.size) for shard in shards] == [
        ("./#0000of0001", "images", 2), ("A.TAR", "tar", 1), ("_named.tar", "tar", 1), ("b.parquet", "parquet", 1),
        ("c.pq", "parquet", 1), ("deep/#0000of0001", "images", 1),
    ]  # fmt: skip
    assert sample_ids([shard for shard in shards if shard.kind == "images"]) == ["deep/z.png", "x.JPG", "y.webp"]
    assert len({shard.id for shard in shards}) == len(shards)


def test_an_input_in_a_store_in_memory() -> None:
    store = Store("memory://input-of-plan-test")
    for name in ("a/0.tar", "a/1.tar", "b.png"):
        store.create(name, b"x")
    assert names(store.uri) == ["./#0000of0001", "a/0.tar", "a/1.tar"]
    assert names(f"{store.uri}/a/") == names(f"{store.uri}/a/{{0..1}}.tar") == ["0.tar", "1.tar"]
    assert names(f"{store.uri}/a/1.tar") == ["1.tar"]


def test_ids_follow_content_and_not_place(tmp_path: Path) -> None:
    def ids(folder: Path) -> dict[str, str]:
        return {shard.name: shard.id for shard in list_shards((str(folder),), {})}

    folder = tmp_path / "here" / "shards"
    touch_files(folder, "0.tar", "1.tar", "c.parquet", "images/a.jpg")
    before = ids(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "shards"))
    assert ids(moved) == before
    assert {shard.id for shard in list_shards((f"{moved}/*.tar", f"{moved}/c.parquet"), {})} < set(before.values())

    (moved / "0.tar").write_bytes(b"longer")  # another size, the old time
    os.utime(moved / "0.tar", (1_700_000_000, 1_700_000_000))
    os.utime(moved / "1.tar", ns=(0, 1_700_000_000_000_000_001))  # another time, the old size
    os.utime(moved / "images" / "a.jpg", (1, 1))
    after = ids(moved)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] == before[name]] == ["c.parquet"]
    assert not set(ids(Path(shutil.copytree(folder, tmp_path / "renamed"))).values()) & set(before.values())


def images(number: int, folder: str = "f") -> list[Entry]:
    return [Entry(f"{folder}/{index:05d}.jpg", 7, "1") for index in range(number)]


def grouped(entries: list[Entry], known: Iterable[str] = ()) -> list[Shard]:
    divided = image_groups.divided_groups(known)
    return list(image_groups.image_groups("/root", {"f": Entries(entry.state for entry in entries)}, FilesBeside(()), divided))


GROUPED = {shard.name: shard.id for shard in grouped(images(3000))}


@settings(max_examples=15)
@given(st.text(min_size=1, max_size=20).filter(lambda name: "/" not in name))
def test_a_new_image_touches_one_group(name: str) -> None:
    entries = [*images(3000), Entry(f"f/new-{name}.jpg", 7, "1")]
    after = {shard.name: shard.id for shard in grouped(entries)}
    assert len(GROUPED) == 4
    assert after.keys() == GROUPED.keys()
    assert sum(after[group] != GROUPED[group] for group in GROUPED) == 1


def test_sample_ids_stay_when_groups_are_dealt_anew() -> None:
    few, many = grouped(images(1024)), grouped(images(1025))
    assert (len(few), len(many)) == (1, 2)
    assert set(sample_ids(many)) - set(sample_ids(few)) == {"f/01024.jpg"}
    assert len(sample_ids(many)) == 1025
    assert max(len(shard.files) for shard in grouped(images(5000))) < 2 * image_groups.IMAGES_PER_GROUP


@pytest.mark.parametrize("number", [1023, 1024, 2048, 4095, 8192])
def test_a_folder_that_a_table_holds_passes_any_number_with_one_group_changed(number: int) -> None:
    before = {shard.name: shard.id for shard in grouped(images(number))}
    after = {shard.name: shard.id for shard in grouped(images(number + 2), before)}
    assert after.keys() == before.keys()
    assert sum(after[name] != before[name] for name in before) <= 2


def test_a_folder_grows_without_a_day_on_which_all_is_new() -> None:
    """From 1,000 to 9,000 images, 100 a day: each is embedded again as its group is divided, on days of their own."""
    entries, known, embedded, days = images(9000), dict[str, Shard](), list[float](), range(1000, 9001, 100)
    for number in days:
        shards = grouped(entries[:number], known)
        assert sample_ids(shards) == [entry.path for entry in entries[:number]]
        assert max(len(shard.files) for shard in shards) <= 2048
        embedded.append(sum(len(shard.files) for shard in shards if shard.name not in known) / number)
        known = {shard.name: shard for shard in shards}
    assert sum(share == 0 for share in embedded) > len(days) / 2
    assert max(share for number, share in zip(days, embedded, strict=True) if number > 5000) < 0.5
    assert {shard.name for shard in grouped(entries[:8500], known)} == set(known), "they stay when it gets smaller"


@pytest.mark.parametrize(
    "known",
    [
        ["f/#0000of0000", "f/#9999of0001", "f/#0003of0003", "f/#9999999999of9999999999", "f/#0001of4294967296"],
        ["f/#0000of0001", "f/#0000of0002", "f/#0001of0002"],  # of two inputs that both hold images of the folder
        ["g/#0000of0001", "0.tar", "f/x/#0000of0001", "f"],
    ],
)
def test_whatever_names_a_table_has_no_image_is_lost(known: list[str]) -> None:
    assert sorted(sample_ids(grouped(images(3000), known))) == [entry.path for entry in images(3000)]
    if len(known) < 5:
        assert {shard.name: shard.id for shard in grouped(images(3000), known)} == GROUPED


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["nothing.tar"], "nothing.tar: no such file or directory"),
        (["empty"], r"empty: matches no tar, Parquet or image file among 0 files below .*/empty\."),
        (["{5..6}.tar"], r"matches no tar, Parquet or image file among 10 files"),
        (["{3..1}.tar"], "matches no tar, Parquet or image file"),
        (["{0..3}.tar"], r"2 of the 4 files that it names do not exist; the first is .*/2.tar. Correct the range, or use \*"),
        (
            ["notes.txt"],
            "notes.txt begins with 1 bytes of text, not an image: 'x'. Expected a tar, a Parquet file or an image.",
        ),
        (["{0.tar,notes.txt}"], "notes.txt begins with 1 bytes of text, not an image"),
        (
            ["hidden"],
            r"matches no tar, Parquet or image file among 2 files below .*It passes over 2 files \(hidden .tar 1, macOS ._ 1\)",
        ),
        (
            ["a", "b"],
            "duplicate ids: .*/a and .*/b both hold s.tar, whose images would get the same ids. Name the folder",
        ),
        (["*.tar", "0.tar"], "duplicate ids: two inputs both name .*/0.tar. Name it in one of them"),
        (["a/*.jpg", "a/*.png"], "duplicate ids: two inputs hold loose images of one folder, . below .*/a and below .*/a"),
        (["0.tar", "clash"], "duplicate ids: .*/0.tar is a file, but below .*/clash there is a folder of that name"),
        (["notes.txt/*.tar"], "expected a directory, found a file"),
    ],
)
def test_refused_inputs(tmp_path: Path, patterns: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    touch_files(tmp_path, "0.tar", "1.tar", "a/s.tar", "b/s.tar", "a/x.jpg", "a/y.png", "notes.txt", "clash/0.tar/i.png")
    touch_files(tmp_path, "hidden/_a.tar", "hidden/._b.jpg")
    with pytest.raises(ConfigError, match=message):
        list_shards(tuple(f"{tmp_path}/{pattern}" for pattern in patterns), {})


def test_one_image_through_two_inputs_is_refused_also_when_their_groups_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_groups, "IMAGES_PER_GROUP", 2)
    touch_files(tmp_path, *(f"a/{number}.png" for number in range(5)), "b/3.png")
    with pytest.raises(ConfigError, match=r"duplicate ids: two inputs hold an image 3\.png\. Name the folder"):
        names(f"{tmp_path}/a", f"{tmp_path}/b")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"the file name 'caf\\udce9.png' is not UTF-8, but ids must be. Rename"):
        names(str(tmp_path))


def test_a_range_of_very_many_files_is_matched_quickly(tmp_path: Path) -> None:
    touch_files(tmp_path, *expand_braces("{0000..4999}.tar"))
    started = time.process_time()
    assert len(names(f"{tmp_path}/{{0000..4999}}.tar")) == 5000
    assert time.process_time() - started < 5  # each name against each file takes half a minute


def lattice(folder: Path, depth: int) -> None:
    """Each folder holds two links to its parent: 2^depth ways to each file for whoever follows them all."""
    for level in range(depth):
        folder = folder / f"d{level}"
        touch_files(folder, "a.png")
        for name in ("one", "two"):
            (folder / name).symlink_to(folder.parent)


@pytest.mark.parametrize("shape", ["lattice", "chain", "to the root", "by its whole path"])
@pytest.mark.parametrize("follows", [False, True])
def test_each_folder_of_an_input_is_listed_once(tmp_path: Path, shape: str, follows: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    lattice(source, 15)
    if shape == "chain":
        for number in range(30):
            (source / f"l{number}").symlink_to(source / f"l{number + 1}" if number < 29 else source / "d0")
    if shape == "to the root":
        (source / "root").symlink_to("/")
        if follows:
            pytest.skip("would list this machine")
    if shape == "by its whole path":
        (source / "again").symlink_to(tmp_path)
    started = time.process_time()
    listed = list_input((str(source),), {}, follows=follows).shards
    assert sorted(shard.prefix for shard in listed) == ["/".join(f"d{n}" for n in range(level + 1)) for level in range(15)]
    assert time.process_time() - started < 5


def test_links_out_of_an_input_are_named_and_followed_only_where_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link to a file is read: a Hugging Face cache is made of them."""
    touch_files(tmp_path / "private", "secret.png", "deep/b.png")
    touch_files(tmp_path / "input", "own/a.png")
    touch_files(tmp_path / "blobs", "0f3a.tar")
    (tmp_path / "input" / "model.tar").symlink_to("../blobs/0f3a.tar")
    for name, target in (
        ("out", tmp_path / "private"),
        ("own/up", tmp_path / "private" / "deep"),
        ("in", tmp_path / "input/own"),
    ):
        (tmp_path / "input" / name).symlink_to(target)
    for pattern in ("input", "input/**"):
        listed = list_input((f"{tmp_path}/{pattern}",), {})
        assert {shard.name for shard in listed.shards} == {"own/#0000of0001", "model.tar"}
        assert listed.passed_over == {"linked folder": 2}
        assert listed.describe() == "0 files (linked folder 2)"
        said = " ".join(capsys.readouterr().err.split())
        assert f"are ignored: out (to {tmp_path}/private), own/up (to {tmp_path}/private/deep). To read those folders" in said
    names = {shard.name for shard in list_input((f"{tmp_path}/input",), {}, follows=True).shards}
    assert names == {"own/#0000of0001", "model.tar", "out/#0000of0001", "out/deep/#0000of0001"}
    assert capsys.readouterr().err == ""


class Endless(BaseHTTPRequestHandler):
    """A store whose listings go on for 100 pages, each bucket in its way: longer than anybody should ask."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        bucket, number = self.path.split("?")[0].strip("/"), self.asked
        key = {"same-token": f"k{number}.tar", "same-keys": "k.tar", "no-keys": "", "no-token": "k.tar"}[bucket]
        token = {"same-token": "t", "no-token": ""}.get(bucket, f"t{number}")
        listed = f"<Contents><Key>{key}</Key><Size>1</Size><ETag>e</ETag></Contents>" if key else ""
        more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
        goes_on = f"<IsTruncated>{str(number < 100).lower()}</IsTruncated>"
        body = f'<?xml version="1.0"?><ListBucketResult>{goes_on}{listed}{more}</ListBucketResult>'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("bucket", ["same-token", "same-keys", "no-keys", "no-token"])
def test_a_listing_without_end_ends(bucket: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    Endless.asked = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "us-east-1"}
        with pytest.raises(StorageError, match=f"s3://{bucket}: its listing never ends: after .* pages"):
            Store(f"s3://{bucket}", {"key": "k", "secret": "s", "client_kwargs": place}).list_files()
    finally:
        server.shutdown()
        server.server_close()
    assert Endless.asked <= 12
