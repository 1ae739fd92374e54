"""What a table of somebody else names is opened only in its own store, or where the user says so."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from listener import Listener, listening
from lora_embed.cli import main
from lora_embed.errors import ConfigError
from lora_embed.search.index import Hit
from lora_embed.search.places import lies_within
from lora_embed.search.search import find_pictures
from lora_embed.shards.listing import list_shards
from lora_embed.shards.patterns import expand_braces
from lora_embed.table.read import Table
from samples import png, tar_of
from tables import noise_vectors, publish_vectors

HIT = Hit(id="a.tar/0", score=1.0, shard="a.tar", key="0")


@pytest.fixture
def listener() -> Any:
    with listening() as listener:
        yield listener


def table_of(folder: Path, shards: Path, *named: str) -> Table:
    """A table whose only row is of the tar there, and which names these inputs."""
    shards.mkdir(parents=True, exist_ok=True)
    (shards / "a.tar").write_bytes(tar_of([("0.png", png(0))]))
    listed = tuple(list_shards((str(shards),), {}))
    return publish_vectors(folder / "table", {"a.tar": (["0"], noise_vectors(1))}, inputs=named, listed=listed)


REMOTE = [
    "http://{host}/shards/a.tar",
    "HTTP://{host}/shards/a.tar",
    "s3://bucket/shards",
    "s3a://bucket/shards/*.tar",
    "s3://{{bucket,other}}/shards",
    "simplecache::http://{host}/a.tar",
    "zip://a.tar::http://{host}/a.zip",
    "tar://a.tar::simplecache::http://{host}/a.tar",
    "blockcache::s3://bucket/a.tar",
    "webhdfs://{host}/shards",
    "ftp://{host}/a.tar",
    "reference://::http://{host}/refs.json",
    "file://{table}/../::http://{host}/a.tar",
    "{table}::http://{host}/a.tar",
    "http://{host}/{table}/a.tar",
    "hf://datasets/owner/name/a.tar",
]


@pytest.mark.parametrize("named", REMOTE)
def test_no_request_is_sent_to_what_a_table_names(
    named: str, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with this machine's keys, and not without them."""
    for name in ("AWS_ENDPOINT_URL", "HF_ENDPOINT"):
        monkeypatch.setenv(name, f"http://{listener.host}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    place = named.format(host=listener.host, table=tmp_path / "table")
    table = table_of(tmp_path, tmp_path / "shards", place)
    assert find_pictures(table, (HIT,)) == {}
    assert listener.requests == []
    said = " ".join(capsys.readouterr().err.split())
    assert "outside of the table. A table that somebody else wrote could name any place" in said
    assert "--input" in said


def test_a_user_who_names_the_place_gets_the_request(listener: Listener, tmp_path: Path) -> None:
    """So the listener hears what is sent."""
    place = f"http://{listener.host}/shards/a.tar"
    table = table_of(tmp_path, tmp_path / "shards", place)
    assert find_pictures(table, (HIT,), {"retry_s": 0}, inputs=(f"http://{listener.host}/shards",)) == {}
    assert listener.requests


LOCAL = ["{private}", "{private}/a.tar", "{private}/*.tar", "file://{private}", "local://{private}/a.tar", "{table}/../private",
         "{table}/link", "{table}/link/*.tar", "{table}/{{../private,x}}/a.tar", "{table}/./../private", "file:{private}",
         "{relative}", "{private}/{{a..b}}.tar", "~/private"]  # fmt: skip


@pytest.mark.parametrize("named", LOCAL)
def test_no_file_outside_of_the_table_is_read(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    private = tmp_path / "private"
    relative = os.path.relpath(private)
    place = named.format(private=private, table=tmp_path / "table", relative=relative)
    table = table_of(tmp_path, private, place)
    (tmp_path / "table" / "link").symlink_to(private)
    assert find_pictures(table, (HIT,)) == {}


def test_what_lies_in_the_table_or_is_named_is_read(tmp_path: Path) -> None:
    inside = tmp_path / "table" / "shards"
    table = table_of(tmp_path, inside, str(inside))
    assert set(find_pictures(table, (HIT,))) == {HIT.id}
    shutil.move(inside, tmp_path / "shards")
    lineage = table.manifest.lineage | {"input": [f"{tmp_path}/shards/*.tar"]}
    moved = Table(table.store, replace(table.manifest, lineage=lineage))
    assert find_pictures(moved, (HIT,)) == {}
    for named in (f"{tmp_path}/shards", f"{tmp_path}/shards/", f"file://{tmp_path}/shards", f"{tmp_path}/shards/*.tar"):
        assert set(find_pictures(moved, (HIT,), inputs=(named,))) == {HIT.id}, named


@pytest.mark.parametrize(
    ("uri", "place", "lies"),
    [
        ("s3://bucket/tables/a/x", "s3://bucket/tables/a", True),
        ("s3://bucket/tables/ab", "s3://bucket/tables/a", False),
        ("s3://bucket/tables/a/../../x", "s3://bucket/tables/a", False),
        ("s3://bucket/tables/a/%2e%2e/x", "s3://bucket/tables/a", False),
        ("s3://bucket/tables/a/..%2fx", "s3://bucket/tables/a", False),
        ("s3://bucket2/tables/a", "s3://bucket/tables/a", False),
        ("s3://bucket", "s3://bucket/tables/a", False),
        ("http://host:81/a", "http://host/a", False),
        ("http://host@other/a", "http://host/a", False),
        ("http://host\\@other/a", "http://host/a", False),
        ("http:///a", "http://", False),
        ("/table/x\0y", "/table", False),
        ("/table/", "/table", True),
        ("table/x", "table", True),
        ("s3:/bucket/x", "s3://bucket", False),
    ],
)
def test_what_lies_within_a_place(uri: str, place: str, lies: bool) -> None:
    assert lies_within(uri, place) is lies


@pytest.mark.parametrize(
    "lineage",
    [{"input": "s3://bucket"}, {"input": [7]}, {"input": {"a": "b"}}, {"layout": []}, {"layout": {"chunk_size": "many"}}, {}],
)
def test_a_lineage_of_other_types_shows_no_pictures(lineage: dict[str, Any], tmp_path: Path) -> None:
    table = table_of(tmp_path, tmp_path / "table" / "shards", str(tmp_path / "table" / "shards"))
    kept = table.manifest.lineage | lineage if lineage else {}
    assert find_pictures(Table(table.store, replace(table.manifest, lineage=kept)), (HIT,)) == {}


@pytest.mark.parametrize("braces", ["{0..99999999999}", "{0..9999}{0..9999}", "{a,b}" * 40, "{0..999999999999999999}"])
def test_braces_of_more_names_than_anybody_has_are_refused_at_once(braces: str) -> None:
    with pytest.raises(ConfigError, match="expected at most 10,000,000"):
        expand_braces(braces)


def test_no_command_opens_what_a_manifest_names(
    listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever in it a URI stands: as input, in gates, in what else a lineage may hold."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{listener.host}")
    table = Path(table_of(tmp_path, tmp_path / "shards", "s3://bucket/shards").store.uri)
    path = table / "versions" / "00000001.json"
    found = json.loads(path.read_text())
    uri = f"http://{listener.host}/x"
    found["lineage"] |= {"recipe": uri, "base": {"uri": uri}, "figures": None, "table": uri, "encoder": uri}
    path.write_text(json.dumps(found))
    report = {"base": {"uri": uri}, "members": [{"merge_method": "linear", "adapters": []}]}
    (table / "encoders" / found["space_id"]).mkdir(parents=True)
    (table / "encoders" / found["space_id"] / "merge_report.json").write_text(json.dumps(report))
    codes = [
        main.run_command([*command, *more])
        for command, *more in (
            (["status", str(table)],),
            (["status", str(table)], "--metrics"),
            (["explain", str(table)], "a.tar/0"),
            (["verify", str(table)],),
            (["gc", str(table)], "--dry-run"),
            (["export", str(table)], "--to", "faiss-flat", "--out", str(tmp_path / "index")),
        )
    ]
    said = capsys.readouterr()
    assert codes[0] == codes[2] == codes[5] == 0, said.err
    assert f"linear on {uri}" in said.out  # named, and not opened
    assert listener.requests == []
