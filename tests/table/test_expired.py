"""A permission that expires empties no table: the night stops and says where, and the version before stays.

Keys that are no longer accepted are the better case. The worse one is a listing that is no error and holds nothing, or a
few of the shards, as another account's bucket of that name gives it.
"""

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from jobs import job_of, run_here, tiny_recipe, write_job, write_tars
from lora_embed import open_table
from lora_embed.chain import cluster
from lora_embed.cli.main import nightly_job
from lora_embed.config.models import load_recipe
from lora_embed.entries import Entry
from lora_embed.errors import StorageError
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
from lora_embed.run.job import run_job
from lora_embed.shards import image_groups
from lora_embed.store.store import Store
from lora_embed.table.verify import verify_table
from s3 import READER, RIGHTS, Proxy, Request, S3Server, s3_server
from samples import png

SHARDS, IMAGES = 20, 3
WRITER = ("writekey", "writesecret1")  # the job reads its input as READER
ALL = RIGHTS | {WRITER: ["Read", "List", "Write"]}
GREEDY = {"versions": 2, "grace_days": 0}  # a version that is published by mistake removes what it replaces

Grant = Callable[..., None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[S3Server]:
    with s3_server(place) as server:
        server.make_bucket("images")
        Store("s3://images/probe", server.options()).create("probe", b"1")
        set_rights(server, place, ALL)
        yield server


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Another account's server, with a bucket of the same name."""
    with s3_server(tmp_path_factory.mktemp("another")) as another:
        another.make_bucket("images")
        yield another


@pytest.fixture
def grant(server: S3Server, place: Path) -> Iterator[Grant]:
    """Changes what keys may do while the server runs; in the end they may do all again."""
    yield lambda keys, *actions: set_rights(server, place, ALL | {keys: list(actions)})
    set_rights(server, place, ALL)


def set_rights(server: S3Server, place: Path, rights: dict[tuple[str, str], list[str]]) -> None:
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for (key, secret), actions in rights.items()
    ]
    (place / "identities.json").write_text(json.dumps({"identities": identities}))
    os.kill(server.pid, signal.SIGHUP)
    end = time.monotonic() + 10
    while any(may_read(server, keys) != ("Read" in rights[keys]) for keys in (READER, WRITER)):
        assert time.monotonic() < end, "the server has not heard of it"
        time.sleep(0.02)


def may_read(server: S3Server, keys: tuple[str, str]) -> bool:
    try:
        return Store("s3://images/probe", server.options(keys=keys)).read("probe") is not None
    except StorageError:
        return False


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    """Between the job and its input."""
    with Proxy(server.endpoint) as proxy:
        yield proxy


def lead(proxy: Proxy, server: S3Server) -> None:
    proxy._upstream = urlsplit(server.endpoint)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders of a tiny model, and tars."""
    folder = tmp_path_factory.mktemp("local")
    recipe = load_recipe(tiny_recipe(folder))
    build_encoder(gather(recipe), folder / "encoder", lambda message: None)
    other = recipe.model_copy(update={"adapters": recipe.adapters[:1]})
    build_encoder(gather(other), folder / "other", lambda message: None)
    write_tars(folder / "shards", shards=SHARDS + 5, images=IMAGES)
    return folder


@contextmanager
def there(another: S3Server, local: Path, numbers: range) -> Iterator[None]:
    """These shards lie in the other account's bucket."""
    put(another, local, "shards", numbers)
    yield
    store = Store("s3://images/shards", another.options())
    store.delete([entry.path for entry in store.list_files()])


def put(server: S3Server, local: Path, name: str, numbers: range) -> None:
    store = Store(f"s3://images/{name}", server.options())
    for number in numbers:
        store.create(f"{number:04d}.tar", (local / f"shards/{number:04d}.tar").read_bytes())


def write(folder: Path, local: Path, server: S3Server, proxy: Proxy, encoder: str = "encoder", **changes: Any) -> Path:
    """A job file; the proxy is before the input, or before the table if one of `changes` says so."""
    places = {"input": "s3://images/shards", "table": "s3://images/table"}
    options = {
        "input_storage_options": server.read_only_options(proxy.endpoint),
        "table_storage_options": server.options(keys=WRITER),
        "retain": GREEDY,
    }
    return write_job(folder, local / encoder, local, chunk_size=2, **(places | options | changes))


def night(job: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was said on stderr, and the result."""
    capfd.readouterr()
    code = nightly_job(["--config", str(job), "--json"])
    output, errors = capfd.readouterr()
    return code, errors, json.loads(output.splitlines()[-1]) if output else {}


def objects(server: S3Server, table: str) -> set[Entry]:
    """But for what runs tell of themselves."""
    found = Store(f"s3://images/{table}", server.options()).list_files()
    return {entry for entry in found if not entry.path.startswith("runs/")}


def version(server: S3Server, table: str, images: int) -> int:
    """The current version's number, once all of it has been read again."""
    opened = open_table(f"s3://images/{table}", storage_options=server.options())
    verify_table(opened)
    assert opened.count == images
    return opened.version


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, server: S3Server, local: Path) -> set[Entry]:
    """What lies below `table`, version 1 of all shards, which no test changes."""
    put(server, local, "shards", range(SHARDS))
    with pytest.MonkeyPatch.context() as patch, Proxy(server.endpoint) as proxy:
        run_here(patch)
        job = write(tmp_path_factory.mktemp("published"), local, server, proxy)
        assert nightly_job(["--config", str(job)]) == 0
    assert version(server, "table", SHARDS * IMAGES) == 1
    return objects(server, "table")


SOURCE = "s3://images/shards"


@pytest.mark.parametrize(
    ("listing", "keys", "says"), [(1, WRITER, "s3://images/table"), (3, READER, SOURCE), (4, READER, f"{SOURCE}/*.tar")]
)
def test_keys_that_are_no_longer_accepted_end_the_night_before_it_begins(
    tmp_path: Path,
    server: S3Server,
    proxy: Proxy,
    local: Path,
    grant: Grant,
    published: set[Entry],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    listing: int,
    keys: tuple[str, str],
    says: str,
) -> None:
    """They expire just before the table is found to be there, or the input, or before the input is listed."""
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("a cluster was started"))
    through = server.options(proxy.endpoint, WRITER)
    job = write(tmp_path, local, server, proxy, input=f"{SOURCE}/*.tar", table_storage_options=through)
    requests = itertools.count(1)
    proxy.watch = lambda request: grant(keys) if "list-type" in request.query and next(requests) == listing else None
    code, said, _ = night(job, capfd)
    assert code == 2
    assert said.startswith(f"error: {says}: access denied (Access Denied.). Check its permissions or keys.")
    assert next(requests) == listing + 1
    assert objects(server, "table") == published

    proxy.watch = None
    grant(keys, *ALL[keys])
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["published"]) == (0, 1, False)
    assert objects(server, "table") == published


@pytest.mark.parametrize(
    ("source", "listed", "code", "says"),
    [
        (SOURCE, 0, 2, f"error: input {SOURCE}: no such file or directory"),
        (f"{SOURCE}/*.tar", 0, 2, f"matches no tar, Parquet or image file among 0 files below {SOURCE}."),
        ([f"{SOURCE}/000*.tar", f"{SOURCE}/001*.tar"], 10, 2, f"error: input {SOURCE}/001*.tar: matches no tar"),
        (
            f"{SOURCE}/{{0000..0019}}.tar",
            2,
            2,
            f"18 of the 20 files that it names do not exist; the first is {SOURCE}/0002.tar",
        ),
        (SOURCE, 2, 1, "(0.9, at most 0.05)"),
        (f"{SOURCE}/*.tar", 18, 1, "(0.1, at most 0.05)"),
    ],
)
def test_a_listing_that_is_empty_or_short_ends_the_night(
    tmp_path: Path,
    server: S3Server,
    another: S3Server,
    proxy: Proxy,
    local: Path,
    published: set[Entry],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str | list[str],
    listed: int,
    code: int,
    says: str,
) -> None:
    run_here(monkeypatch)
    job = write(tmp_path, local, server, proxy, input=source)
    with there(another, local, range(listed)):
        lead(proxy, another)
        for _ in range(2):  # the next night too
            found, said, _ = night(job, capfd)
            assert (found, says in said, bool(re.search(r"\n +removed: ", said))) == (code, True, code == 1), said
            assert objects(server, "table") == published
    lead(proxy, server)
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["published"]) == (0, 1, False)
    assert objects(server, "table") == published


def test_what_was_embedded_of_a_short_listing_is_not_embedded_again(
    tmp_path: Path,
    server: S3Server,
    another: S3Server,
    proxy: Proxy,
    local: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three old shards and a new one are listed, under the table's encoder and under another; then all are, and the new one."""
    run_here(monkeypatch)
    places: dict[str, Any] = {"input": "s3://images/short", "table": "s3://images/short-table"}
    places["retain"] = {"versions": 2, "grace_days": 1}  # without, what one encoder has staged goes with the other's night
    job = write(tmp_path, local, server, proxy, **places)
    put(server, local, "short", range(10))
    assert night(job, capfd)[0] == 0
    before = objects(server, "short-table")

    put(another, local, "short", range(7, 11))
    lead(proxy, another)
    for encoder in ("encoder", "other"):
        write(tmp_path, local, server, proxy, encoder, **places)
        code, said, _ = night(job, capfd)
        assert (code, bool(re.search(r"\n +removed: ", said))) == (1, True), said
        added = {entry.path.split("/")[0] for entry in objects(server, "short-table") - before}
        assert before <= objects(server, "short-table")
        assert added <= {"staging", "encoders", "recipes"}
        assert version(server, "short-table", 10 * IMAGES) == 1

    lead(proxy, server)
    put(server, local, "short", range(10, 11))
    write(tmp_path, local, server, proxy, **places)
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["embedded"]) == (0, 2, 0)
    assert version(server, "short-table", 11 * IMAGES) == 2


def test_a_night_whose_input_may_no_longer_be_read_goes_on_when_it_may(
    tmp_path: Path,
    server: S3Server,
    proxy: Proxy,
    local: Path,
    grant: Grant,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It expires while the third of five new shards is read; listings are still answered."""
    run_here(monkeypatch)
    job = write(tmp_path, local, server, proxy, input="s3://images/cut", table="s3://images/cut-table")
    put(server, local, "cut", range(10))
    assert night(job, capfd)[0] == 0
    before = objects(server, "cut-table")

    put(server, local, "cut", range(10, 15))
    proxy.watch = lambda request: grant(READER, "List") if is_read(request, "/0012.tar") else None
    code, said, _ = night(job, capfd)
    assert (code, "3 of 5 shards are not complete, so nothing was published" in said) == (1, True), said
    for number in (12, 13, 14):
        assert f"s3://images/cut/{number:04d}.tar: access denied" in said
    assert before <= objects(server, "cut-table")
    assert version(server, "cut-table", 10 * IMAGES) == 1

    proxy.watch = None
    grant(READER, *ALL[READER])
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["embedded"]) == (0, 2, 3 * IMAGES)
    assert version(server, "cut-table", 15 * IMAGES) == 2


def is_read(request: Request, ending: str) -> bool:
    return request.method == "GET" and request.path.endswith(ending)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["staging", "data", "versions"])
def test_a_night_whose_table_may_no_longer_be_written_goes_on_when_it_may(
    tmp_path: Path,
    server: S3Server,
    proxy: Proxy,
    local: Path,
    grant: Grant,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
) -> None:
    """It expires at the first write to that folder: while the night embeds, while it publishes, or just at the commit."""
    run_here(monkeypatch)
    places = {"input": f"s3://images/{folder}", "table": f"s3://images/{folder}-table"}
    through = server.options(proxy.endpoint, WRITER)
    job = write(tmp_path, local, server, proxy, table_storage_options=through, **places)
    put(server, local, folder, range(10))
    assert night(job, capfd)[0] == 0
    before = objects(server, f"{folder}-table")

    put(server, local, folder, range(10, 12))
    proxy.watch = lambda request: grant(WRITER, "List") if is_write(request, f"-table/{folder}/") else None
    code, said, _ = night(job, capfd)
    assert code == 1, said
    assert re.search(
        f"s3://images/{folder}-table/{folder}/\\S+: access denied .*Run the same command again to continue", said, re.DOTALL
    )
    assert before <= objects(server, f"{folder}-table")
    assert version(server, f"{folder}-table", 10 * IMAGES) == 1

    proxy.watch = None
    grant(WRITER, *ALL[WRITER])
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["embedded"]) == (0, 2, 2 * IMAGES if folder == "staging" else 0)
    assert version(server, f"{folder}-table", 12 * IMAGES) == 2


def is_write(request: Request, place: str) -> bool:
    return request.method == "PUT" and place in request.path


def test_a_night_that_may_no_longer_list_what_is_staged_has_begun(
    tmp_path: Path,
    server: S3Server,
    proxy: Proxy,
    local: Path,
    grant: Grant,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The encoder is there by then: that is exit code 1, and the same command goes on."""
    run_here(monkeypatch)
    through = server.options(proxy.endpoint, WRITER)
    job = write(
        tmp_path,
        local,
        server,
        proxy,
        input="s3://images/begun",
        table="s3://images/begun-table",
        table_storage_options=through,
    )
    put(server, local, "begun", range(2))
    proxy.watch = lambda request: grant(WRITER, "Read", "Write") if lists(request, "begun-table/staging") else None
    code, said, _ = night(job, capfd)
    assert code == 1, said
    assert re.search(
        "s3://images/begun-table/staging/\\S+: access denied .*Run the same command again to continue", said, re.DOTALL
    )

    proxy.watch = None
    grant(WRITER, *ALL[WRITER])
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["embedded"]) == (0, 1, 2 * IMAGES)


def lists(request: Request, prefix: str) -> bool:
    return request.method == "GET" and "list-type" in request.query and prefix in unquote(request.query)


def test_a_short_listing_of_loose_images_ends_the_night(
    tmp_path: Path,
    server: S3Server,
    another: S3Server,
    proxy: Proxy,
    local: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are one shard, which is there as before by its name."""
    run_here(monkeypatch)
    places = {"input": "s3://images/loose", "table": "s3://images/loose-table"}
    job = write(tmp_path, local, server, proxy, **places)
    for place, count in ((server, 30), (another, 3)):
        store = Store(places["input"], place.options())
        for number in range(count):
            store.create(f"{number:04d}.png", png(number))
    assert night(job, capfd)[0] == 0
    before = objects(server, "loose-table")

    lead(proxy, another)
    code, said, _ = night(job, capfd)
    assert (code, bool(re.search(r"\n +removed: ", said))) == (1, True), said
    assert before <= objects(server, "loose-table")
    assert version(server, "loose-table", 30) == 1
    lead(proxy, server)
    code, _, result = night(job, capfd)
    assert (code, result["version"], result["published"]) == (0, 1, False)


def test_a_folder_that_outgrows_its_groups_has_lost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group of loose images is divided in two, under other names."""
    run_here(monkeypatch)
    monkeypatch.setattr(image_groups, "IMAGES_PER_GROUP", 4)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
    job = job_of(tmp_path, tiny_recipe(tmp_path), folder)
    assert run_job(job).version == 1
    for version, images in ((2, range(4, 8)), (3, range(8, 9))):
        for number in images:
            (folder / f"{number}.png").write_bytes(png(number))
        assert run_job(job).version == version
        names = {shard.name for shard in open_table(job.table).manifest.shards.values()}
        assert names == ({"./#0000of0001"} if version == 2 else {"./#0000of0002", "./#0001of0002"})
        assert open_table(job.table).count == images.stop
