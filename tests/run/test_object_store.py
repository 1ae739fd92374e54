"""Object storage: a real S3 server, and faults between it and the job."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from jobs import job_of, read_rows, start_job, tiny_recipe, write_job, write_tars
from lora_embed import load_encoder, open_table
from lora_embed.chain import pipeline
from lora_embed.cli.main import run_command
from lora_embed.config.models import load_job, load_recipe
from lora_embed.errors import StorageError, StoreUnavailable
from lora_embed.model.build import build_encoder
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import gather
from lora_embed.run.job import run_job
from lora_embed.store import remote
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest
from lora_embed.table.verify import verify_table
from lora_embed.table.versions import claim, commit_version, read_manifest
from s3 import Faults, Proxy, Request, S3Server, s3_server

HASTY = {"config_kwargs": {"read_timeout": 1.0}}  # a stall costs a second, not fifteen


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with Proxy(server.endpoint) as proxy:
        yield proxy


def store_at(server: S3Server, proxy: Proxy, name: str, retry_s: float = 10.0) -> Store:
    return Store(f"s3://images/{name}", server.options(proxy.endpoint) | HASTY | {"retry_s": retry_s})


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Path:
    """A job on this disk that has been run, and the same shards on the server."""
    folder = tmp_path_factory.mktemp("local")
    source = write_tars(folder / "shards", shards=20, images=10)
    run_job(job_of(folder, tiny_recipe(folder), source, chunk_size=4))
    Store("s3://images", server.options()).filesystem.put(str(source), "images/shards", recursive=True)
    return folder


def remote_job(local: Path, folder: Path, options: dict[str, Any], name: str, **changes: Any) -> Path:
    """The job of `local` with shards and table on the server."""
    places = {"input": "s3://images/shards", "table": f"s3://images/{name}"}
    both = {"input_storage_options": options, "table_storage_options": options}
    return write_job(folder, local / "recipe.yaml", local, **{"chunk_size": 4} | places | both | changes)


def rows_at(server: S3Server, name: str) -> pa.Table:
    opened = open_table(f"s3://images/{name}", storage_options=server.options())
    verify_table(opened)
    return opened.to_dataset().to_table().sort_by("id")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_table_on_s3_is_the_one_on_a_disk_whatever_fails_in_between(
    tmp_path: Path, server: S3Server, proxy: Proxy, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 % of all requests fail and 1 % stall; and the run takes two waves."""
    monkeypatch.setattr(pipeline, "WAVE", 12)
    proxy.faults = Faults(seed=5, error=0.02, reset=0.01, cut=0.01, lost_answer=0.01, stall=0.01, stall_s=20)
    job = remote_job(local, tmp_path, server.options(proxy.endpoint) | HASTY | {"retry_s": 60}, "faulty")
    assert run_job(load_job(job)).counts["vectors"] == 200
    faults = [request.fault for request in proxy.requests if request.fault]
    print(f"\n{len(faults)} of {len(proxy.requests)} requests failed: { {kind: faults.count(kind) for kind in set(faults)} }")
    assert len(set(faults)) >= 4
    assert rows_at(server, "faulty").equals(read_rows(local / "table"))
    proxy.faults = Faults()
    assert run_job(load_job(job)).embedded == 0


@pytest.mark.slow
def test_a_run_told_to_end_before_ray_has_started_says_so(tmp_path: Path, server: S3Server, proxy: Proxy, local: Path) -> None:
    job = remote_job(local, tmp_path, server.options(proxy.endpoint), "told")
    listing = threading.Event()
    proxy.watch = lambda request: listing.set() if "list-type=2" in request.query else None
    process = start_job(job, tmp_path / "log")
    assert listing.wait(60)
    process.send_signal(signal.SIGTERM)
    said = f"{process.wait(60)} {(tmp_path / 'log').read_text()}"
    assert said.startswith("1 ")
    assert "stopped by a signal. What is committed stays" in said
    assert "end: not done, exit 1" in said


def test_base_and_adapters_on_s3_make_the_encoder_of_those_on_a_disk(
    tmp_path: Path, server: S3Server, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path / "cache"))
    remote._connect_cached.cache_clear()  # an earlier test of this process may have connected without these keys
    S3FileSystem.clear_instance_cache()
    for folder in ("base", "ten", "more"):
        Store("s3://images").filesystem.put(str(local / folder), f"images/models/{folder}", recursive=True)
    here = load_recipe(local / "recipe.yaml")
    adapters = tuple(spec.model_copy(update={"path": f"s3://images/models/{Path(spec.path).name}"}) for spec in here.adapters)
    there = here.model_copy(update={"base_model": "s3://images/models/base", "adapters": adapters})
    for name, limit in (("whole", None), ("kept", Limit())):
        spaces = []
        for place, recipe in (("here", here), ("there", there)):
            out = tmp_path / name / place
            spaces.append(build_encoder(gather(recipe), out, lambda message: None, limit).space_id)
            assert load_encoder(out, base=recipe.base_model).space_id == spaces[-1]
        assert spaces[0] == spaces[1]


@pytest.mark.usefixtures("cluster")
@pytest.mark.long
def test_an_outage_longer_than_the_limit_ends_the_run_and_loses_nothing(
    tmp_path: Path, server: S3Server, proxy: Proxy, local: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """After 20 parts the server takes no more, for good as far as this run is concerned."""
    parts: list[Request] = []

    def breaks(request: Request) -> None:
        if request.method == "PUT" and "/staging/" in request.path and request.status == 200:
            parts.append(request)
            if len(parts) == 20:
                proxy.faults = Faults(error=1.0, only=lambda request: request.method == "PUT")

    proxy.answered = breaks
    job = remote_job(local, tmp_path, server.options(proxy.endpoint) | HASTY | {"retry_s": 3}, "outage")
    assert run_command(["run", str(job)]) == 1
    said = capfd.readouterr().err
    assert "no usable answer in" in said
    assert "the same command" in said
    assert "Traceback" not in said

    proxy.answered, proxy.faults = None, Faults()
    store = store_at(server, proxy, "outage")
    kept = {entry.path: entry.etag for entry in store.list_files("staging")}
    assert len(kept) >= 20
    before = len(proxy.requests)
    assert run_command(["run", str(job), "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["embedded"] <= 200 - 3 * len(kept)
    written = {r.path.removeprefix("/images/outage/") for r in proxy.requests[before:] if r.method == "PUT" and r.status == 200}
    assert not written & set(kept)
    assert rows_at(server, "outage").equals(read_rows(local / "table"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secret": "wrong"}, "s3://images/new: access denied (The request signature we calculated does not match"),
        ({"bucket": "nowhere"}, "s3://nowhere/new: there is no bucket nowhere. Correct its name, or create it."),
        ({"keys": "read only"}, "s3://images/new/table.json: access denied (Access Denied.). Check its permissions or keys."),
        ({"input": "s3://nowhere/x/*.tar"}, "s3://nowhere/x: there is no bucket nowhere. Correct its name, or create it."),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_what_a_store_refuses_is_said_at_once(
    tmp_path: Path, server: S3Server, local: Path, capfd: pytest.CaptureFixture[str], change: dict[str, str], message: str
) -> None:
    options = server.read_only_options() if "keys" in change else server.options()
    options |= {"secret": change["secret"]} if "secret" in change else {}
    job = remote_job(local, tmp_path, options, "new", table=f"s3://{change.get('bucket', 'images')}/new")
    if "input" in change:
        job = remote_job(local, tmp_path, options, "new", input=change["input"])
    started = time.monotonic()
    assert run_command(["run", str(job)]) == 2
    said = capfd.readouterr()
    assert time.monotonic() - started < 30  # a stall takes 60
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}")
    assert not Store("s3://images/new", server.options()).list_files()


def test_a_cut_or_stalled_read_is_tried_again(server: S3Server, proxy: Proxy) -> None:
    data = os.urandom(40_000_000)  # three requests' worth
    store = store_at(server, proxy, "reads")
    store.replace("large", data)
    hits = iter(["cut", "stall", "error", "reset"])
    proxy.faults = Faults(only=lambda request: request.method == "GET", stall_s=30)
    proxy.faults.draw = lambda request: next(hits, "") if request.method == "GET" else ""  # type: ignore[method-assign]
    started = time.monotonic()
    with store.open("large") as file:
        assert file.read(10) == data[:10]
        file.seek(17_000_000)
        assert file.read() == data[17_000_000:]
    assert time.monotonic() - started < 30  # a stall takes 60
    assert store.read("large") == data
    assert [request.fault for request in proxy.requests if request.fault] == ["cut", "stall", "error", "reset"]


def test_a_write_that_the_store_never_lets_begin_is_tried_again(server: S3Server, proxy: Proxy) -> None:
    """botocore asks before it sends a body, and nothing but us limits how long it waits for the answer."""
    store = store_at(server, proxy, "writes")
    hits = iter(["stall", "stall"])
    proxy.faults = Faults(only=lambda request: request.method == "PUT", stall_s=60)
    proxy.faults.draw = lambda request: next(hits, "") if request.method == "PUT" else ""  # type: ignore[method-assign]
    started = time.monotonic()
    store.replace("one", b"1")
    assert store.create("two", b"2")
    assert time.monotonic() - started < 30  # a stall takes 60
    assert [store.read("one"), store.read("two")] == [b"1", b"2"]
    assert [request.fault for request in proxy.requests if request.method == "PUT"] == ["stall", "stall", "", ""]


def test_all_bytes_of_a_read_are_of_the_object_as_it_was_opened(server: S3Server, proxy: Proxy) -> None:
    store = store_at(server, proxy, "changes")
    store.replace("large", os.urandom(20_000_000))
    with store.open("large") as file:
        file.read(10)
        store.replace("large", os.urandom(20_000_000))
        file.seek(18_000_000)
        with pytest.raises(StorageError, match="no longer exists"):
            file.read()


def test_patience_ends_and_what_never_passes_has_none(server: S3Server, proxy: Proxy) -> None:
    store = store_at(server, proxy, "patience", retry_s=3)
    assert store.read("x") is None  # connecting takes seconds by itself, which count
    proxy.requests.clear()
    proxy.faults = Faults(error=1.0)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"s3://images/patience/x: no usable answer in \d s and \d tries; last error: "):
        store.read("x")
    assert 3 <= time.monotonic() - started < 60  # of 120 without `retry_s`
    assert len(proxy.requests) >= 2
    proxy.faults = Faults()
    denied = Store("s3://images/patience", server.read_only_options(proxy.endpoint) | {"retry_s": 60})
    proxy.requests.clear()
    with pytest.raises(StorageError, match="access denied"):
        denied.create("x", b"1")
    assert [(request.method, request.status) for request in proxy.requests] == [("PUT", 403)]


def test_what_cannot_be_removed_is_said(server: S3Server) -> None:
    """s3fs would say nothing; one that is gone already is no error."""
    store = Store("s3://images/removed", server.options())
    names = [f"{number:04d}" for number in range(1200)]
    for name in names[::100]:
        store.create(name, b"1")
    with pytest.raises(StorageError, match="access denied"):
        Store(store.uri, server.read_only_options()).delete(names)
    assert len(store.list_files()) == 12
    store.delete(names)
    assert store.list_files() == []


def test_a_commit_whose_answer_is_lost_is_still_ours(server: S3Server, proxy: Proxy) -> None:
    store = claim(store_at(server, proxy, "lost"))
    proxy.requests.clear()
    counts = {"shards": 0, "samples": 0, "vectors": 0, "rejects": 0}
    pins = {"precision": "float32", "vector_type": "float32", "carry": []}
    about: dict[str, Any] = {
        "format": 1,
        "files": (),
        "rejects": (),
        "counts": counts,
        "gates": {},
        "pins": pins,
        "lineage": {},
    }
    ours = Manifest(version=1, space_id="0" * 12, dimension=1, created="now", **about)
    proxy.faults = Faults(lost_answer=1.0, only=lambda request: request.is_conditional)
    proxy.answered = lambda request: setattr(proxy, "faults", Faults()) if request.is_conditional else None
    assert commit_version(store, ours)
    assert [(r.status, r.fault) for r in proxy.requests if r.is_conditional] == [(0, "lost_answer"), (412, "")]
    other = Manifest(version=1, space_id="0" * 12, dimension=1, created="later", **about)
    assert not commit_version(store, other)
    assert read_manifest(store) == ours


def test_a_store_that_ignores_conditional_put_is_found_out(tmp_path: Path) -> None:
    with s3_server(tmp_path, anonymous=True) as server, Proxy(server.endpoint, Faults(strip=("if-none-match",))) as proxy:
        server.make_bucket("images")
        good = Store("s3://images/good", server.options()).claim("table.json", b"{}")
        assert good.exclusive
        plain = Store("s3://images/plain", server.options(proxy.endpoint))
        assert plain.create("a", b"1")
        assert plain.create("a", b"2"), "the proxy did not strip the condition"
        found = plain.claim("table.json", b"{}")
        assert not found.exclusive
        assert [found.create("b", b"1"), found.create("b", b"2")] == [True, False]
        assert found.read("b") == b"1"


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_an_input_that_does_not_answer_is_given_up_early(
    tmp_path: Path, server: S3Server, proxy: Proxy, local: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The table is within reach: it is the shards that cannot be read, one after the other."""
    proxy.faults = Faults(error=1.0, only=lambda request: request.path.endswith(".tar"))
    unreadable = server.options(proxy.endpoint) | HASTY | {"retry_s": 1}
    job = remote_job(local, tmp_path, server.options(), "unreadable", input_storage_options=unreadable)
    assert run_command(["run", str(job)]) == 1
    said = capfd.readouterr().err
    assert "8 of 20 shards are not complete, so nothing was published" in said
    assert "no usable answer in" in said
    proxy.faults = Faults()
    assert run_command(["run", str(job)]) == 0
    assert rows_at(server, "unreadable").equals(read_rows(local / "table"))
