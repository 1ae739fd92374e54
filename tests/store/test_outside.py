"""What a table says does not lead out of it: paths, links, and manifests that somebody else wrote."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_embed.cli.main import run_command
from lora_embed.errors import LoraEmbedError, StorageError, TableError, VerificationFailed
from lora_embed.search.export import export_index
from lora_embed.store.store import Store
from lora_embed.table.lineage import explain_row, forget
from lora_embed.table.manifest import Manifest
from lora_embed.table.read import open_table
from lora_embed.table.retention import collect_garbage
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import roll_back
from tables import SPACE, noise_vectors, publish_vectors

ONE = "0000.tar/000001"
OUTWARD = [
    "../outside/secret", "..", "a/../../outside/secret", "a/..", "/etc/hostname", "//etc/hostname", "file:///etc/hostname",
    "s3://images/secret", "http://127.0.0.1:1/x", "memory://secret", "a\0b", "./secret", "a//b", "a/./b",
]  # fmt: skip
REMOTE_MAY = {"//etc/hostname", "/etc/hostname", "./secret", "a//b", "a/./b"}  # names of objects like any other


def _using(path: str) -> dict[str, Callable[[Store], Any]]:
    return {
        "read": lambda store: store.read(path),
        "open": lambda store: store.open(path),
        "info": lambda store: store.info(path),
        "list": lambda store: store.list_files(path),
        "is_directory": lambda store: store.is_directory(path),
        "create": lambda store: store.create(path, b"planted"),
        "replace": lambda store: store.replace(path, b"planted"),
        "delete": lambda store: store.delete([path]),
        "full_path": lambda store: store.full_path(path),
    }


@pytest.mark.parametrize("path", OUTWARD)
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_no_path_leads_out_of_a_store(tmp_path: Path, path: str, kind: str) -> None:
    """Whatever is to be done with it, and whether or not links are followed."""
    secret = tmp_path / "outside" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"mine")
    (tmp_path / "table" / "a").mkdir(parents=True)
    root = str(tmp_path / "table") if kind == "disk" else "memory://table"
    if kind == "memory" and path in REMOTE_MAY:
        pytest.skip("names an object of an object store")
    for store in (Store(root), Store(root, follows_links=True)):
        for do in _using(path).values():
            with pytest.raises(StorageError, match="does not lie in it"):
                do(store)
    assert secret.read_bytes() == b"mine"
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["a", "outside", "secret", "table"]


@pytest.mark.parametrize(
    "name", ["..a", "a..", "...", "a:b", "a b", "ünï", "#0000of0001", "a\nb", "-rf", "~", "$HOME", "%2e%2e"]
)
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path))
    assert store.create(f"folder/{name}", b"1")
    assert [entry.path for entry in store.list_files()] == [f"folder/{name}"]
    assert store.read(f"folder/{name}") == b"1"
    store.delete([f"folder/{name}"])
    assert store.list_files() == []


def state_of(folder: Path) -> dict[str, bytes | None]:
    """Files and their content below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A table of two versions, and beside it a user's folder."""
    vectors = noise_vectors(8)
    for _ in range(2):
        publish_vectors(tmp_path / "table", {"0000.tar": ([f"{n:06d}" for n in range(8)], vectors)})
    assert Store(str(tmp_path / "table")).create(f"encoders/{SPACE}/encoder.json", b"{}")  # what forgetting asks for
    private = tmp_path / "private"
    (private / "deep").mkdir(parents=True)
    for name in ("keys.txt", "deep/00000001.json", "deep/a.parquet"):
        (private / name).write_text("mine")
    for path in private.rglob("*"):
        os.utime(path, (10**9, 10**9))  # old enough for whatever goes by age
    return tmp_path / "table"


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "verify": lambda table, out: verify_table(open_table(str(table))),
    "gc": lambda table, out: collect_garbage(str(table), {}),
    "forget": lambda table, out: forget(Store(str(table)), [ONE], "asked"),
    "rollback": lambda table, out: roll_back(Store(str(table)), 1, "worse"),
    "explain": lambda table, out: explain_row(open_table(str(table)), ONE),
    "export": lambda table, out: export_index(open_table(str(table)), "faiss-flat", out),
    "rows": lambda table, out: open_table(str(table)).rows([ONE]),
    "dataset": lambda table, out: open_table(str(table)).to_dataset().to_table(),
    "status": lambda table, out: run_command(["status", str(table)]),
    "metrics": lambda table, out: run_command(["status", str(table), "--metrics"]),
    "temporary": lambda table, out: Store(str(table)).clear_temporary(0),
    "delete": lambda table, out: Store(str(table)).delete(
        ["runs/x/keys.txt", "_tmp/keys.txt", "data/keys.txt", "new/keys.txt"]
    ),
    "write": lambda table, out: [
        Store(str(table)).replace(f"{name}/keys.txt", b"") for name in ("runs/x", "_tmp", "new", "data")
    ],
}


def link(place: Path, target: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "_tmp": lambda table, private: link(table / "_tmp", private),
    "a run's folder": lambda table, private: link(table / "runs" / "x", private),
    "all runs": lambda table, private: link(table / "runs", private),
    "data": lambda table, private: link(table / "data" / "new", private),
    "a space's data": lambda table, private: link(next((table / "data").iterdir()), private),
    "staged parts": lambda table, private: link(table / "staging", private),
    "encoders": lambda table, private: link(table / "encoders" / "0123456789ab", private),
    "retired": lambda table, private: link(table / "retired", private / "deep"),
    "a new folder": lambda table, private: link(table / "new", private),
    "a data file": lambda table, private: link(next((table / "data").rglob("*.parquet")), private / "deep" / "a.parquet"),
    "CURRENT": lambda table, private: link(table / "CURRENT", private / "keys.txt"),
    "a version": lambda table, private: link(table / "versions" / "00000009.json", private / "deep" / "00000001.json"),
}


@pytest.mark.parametrize("what", LINKS)
def test_no_link_in_a_table_is_followed(shared: Path, tmp_path: Path, what: str) -> None:
    """Each command ends as it does without the link, or says which it is; the user's folder stays as it is."""
    LINKS[what](shared, tmp_path / "private")
    before, said = state_of(tmp_path / "private"), 0
    for name, command in COMMANDS.items():
        try:
            command(shared, tmp_path / f"index of {name}")
        except LoraEmbedError as error:
            said += "is a link, and links in a table are not followed" in str(error)
        assert state_of(tmp_path / "private") == before, f"{name} went through the link"
    assert said


def test_a_table_may_lie_behind_a_link(shared: Path, tmp_path: Path) -> None:
    """Its root is what the user names; what is below is not."""
    (tmp_path / "linked").symlink_to(shared)
    assert open_table(str(tmp_path / "linked")).rows([ONE]).num_rows == 1
    assert forget(Store(str(tmp_path / "linked")), [ONE], "asked").version == 3


@pytest.mark.parametrize("name", ["CURRENT", "table.json", "versions/00000002.json", "runs/x"])
def test_a_pipe_is_not_read(shared: Path, name: str) -> None:
    """It would never end."""
    place = shared / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    os.mkfifo(place)
    with pytest.raises(StorageError, match="is neither a file nor a folder"):
        Store(str(shared)).read(name)
    for command in (COMMANDS["gc"], COMMANDS["forget"], COMMANDS["status"]):
        with contextlib.suppress(LoraEmbedError):  # some never look at it
            command(shared, shared)


OUT_OF_IT = {
    "a file outside": lambda m, private: m["files"][0].update(path="../private/data.parquet"),
    "an absolute file": lambda m, private: m["files"][0].update(path=f"{private}/data.parquet"),
    "a file of a scheme": lambda m, private: m["files"][0].update(path=f"file://{private}/data.parquet"),
    "a file through data": lambda m, private: m["files"][0].update(path="data/../../private/data.parquet"),
    "a file that is no data file": lambda m, private: m["files"][0].update(path="table.json"),
    "rejects outside": lambda m, private: m["rejects"].append(m["files"][0] | {"path": "../private/data.parquet"}),
    "a space outside": lambda m, private: m.update(space_id="../../outside"),
    "a space of another form": lambda m, private: m.update(space_id="0123456789AB"),
    "a held space": lambda m, private: m.update(held={"../outside": "why"}),
    "a version that is another": lambda m, private: m.update(version=7),
    "no version": lambda m, private: m.update(version=0),
    "a shard's id": lambda m, private: m["files"][0]["shards"][0].update(id="../../outside"),
    "a file without shards": lambda m, private: m["files"][0].update(shards=[]),
    "rows that are text": lambda m, private: m["files"][0].update(rows="8"),
    "fewer rows than none": lambda m, private: m["files"][0].update(rows=-1),
    "a count of many digits": lambda m, private: m["counts"].update(vectors=10**30),
    "counts that lack one": lambda m, private: m["counts"].pop("vectors"),
    "no dimension": lambda m, private: m.update(dimension=0),
    "a gate without a limit": lambda m, private: m.update(gates={"rejects": {"value": 1.0}}),
    "a gate that is text": lambda m, private: m.update(gates={"rejects": {"value": "1", "limit": 1.0}}),
    "a carried type": lambda m, private: m["pins"].update(carry=[["label", "object"]]),
    "a carried name": lambda m, private: m["pins"].update(carry=[[["label"], "string"]]),
    "a type of vector": lambda m, private: m["pins"].update(vector_type="object"),
    "forgetting of versions": lambda m, private: m["lineage"].update(forgot={"held_by": ["../../outside"]}),
    "retention that is text": lambda m, private: m["lineage"].update(retain="all"),
    "an input that is a number": lambda m, private: m["lineage"].update(input=7),
}


@pytest.mark.parametrize("what", OUT_OF_IT)
def test_a_manifest_that_leads_out_is_refused_by_every_command(shared: Path, tmp_path: Path, what: str) -> None:
    data = next((shared / "data").rglob("*.parquet"))
    shutil.copy(data, tmp_path / "private" / "data.parquet")
    path = shared / "versions" / "00000002.json"
    manifest = json.loads(path.read_text())
    OUT_OF_IT[what](manifest, tmp_path / "private")
    path.write_text(json.dumps(manifest))
    before = state_of(tmp_path)
    for name in ("verify", "gc", "forget", "rollback", "explain", "export", "rows", "dataset"):
        with pytest.raises(TableError, match=r"00000002\.json: .*lora-embed did not write it") as raised:
            COMMANDS[name](shared, tmp_path / "index")
        assert "\n" not in str(raised.value)
    assert run_command(["status", str(shared)]) == 2
    assert state_of(tmp_path) == before


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"format": 1}', b'{"format": 1' + b"0" * 5000 + b"}", b'{"format": 1, "files": {"0": 1}}', b"\0" * 100,
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_one_message(data: bytes) -> None:
    with pytest.raises(TableError) as raised:
        Manifest.from_json(data, "versions/00000001.json")
    assert str(raised.value).startswith("versions/00000001.json: ")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("retain", {"versions": "many"}), ("retain", {"grace_days": -1}), ("retain", {"versions": 1}),
        ("retain", {"grace_days": float("nan")}),
    ],
)  # fmt: skip
def test_a_lineage_that_does_not_fit_is_one_message(shared: Path, where: str, value: Any) -> None:
    path = shared / "versions" / "00000002.json"
    manifest = json.loads(path.read_text())
    manifest["lineage"][where] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(TableError, match=rf"`{where}` of a version: .*lora-embed has not written it"):
        collect_garbage(str(shared), {})


def bent_file(how: str, path: Path) -> None:
    """A data file of other columns, or none at all."""
    table = pq.read_table(path)
    if how == "a type of Ray's, with a pickle":
        import ray.data  # noqa: F401  # registers it

        about = {b"ARROW:extension:name": b"ray.data.arrow_tensor_v2", b"ARROW:extension:metadata": b"\x80\x04hostile"}
        field = pa.field("embedding", pa.list_(pa.float32()), metadata=about)
        table = table.set_column(1, field, table.column("embedding").cast(pa.list_(pa.float32())))
    elif how == "two columns of one name":
        table = table.append_column("id", table.column("key"))
    elif how == "text for vectors":
        table = table.set_column(1, "embedding", table.column("key"))
    elif how == "vectors of another dimension":
        values = pa.array(np.zeros(8 * 3, np.float32))
        table = table.set_column(1, "embedding", pa.FixedSizeListArray.from_arrays(values, 3))
    elif how == "no column of ids":
        table = table.drop_columns(["id"])
    pq.write_table(table, path)
    if how == "no Parquet":
        path.write_bytes(b"PAR1" * 100)
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "how",
    ["a type of Ray's, with a pickle", "two columns of one name", "text for vectors", "vectors of another dimension",
     "no column of ids", "no Parquet", "cut short"],
)  # fmt: skip
def test_a_data_file_of_another_kind_is_one_message(shared: Path, tmp_path: Path, how: str) -> None:
    bent_file(how, next((shared / "data").rglob("*.parquet")))
    for name in ("verify", "forget", "export", "rows"):
        with pytest.raises(VerificationFailed) as raised:
            COMMANDS[name](shared, tmp_path / f"index of {name}")
        assert len(str(raised.value)) < 700
        assert "\n" not in str(raised.value)


def test_what_a_table_holds_today_is_read_as_it_was(shared: Path) -> None:
    """Every field comes back as it went, key by key and in its order."""
    data = (shared / "versions" / "00000002.json").read_bytes()
    manifest = Manifest.from_json(data, "here")
    assert manifest.to_json() == data
    assert np.all(np.isfinite(open_table(str(shared)).rows([ONE]).column("embedding").to_pylist()[0]))
