"""Planted secrets, looked for in all that runs write and print: none may be there, whether a run succeeds or fails."""

import base64
import contextlib
import ipaddress
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import ROOT, tiny_recipe, write_job, write_tars
from lora_embed.cli.main import run_command
from lora_embed.store.store import Store
from s3 import OWNER, READER, Faults, Proxy, S3Server

KEY, SECRET = OWNER
PLANTED = {
    "key": KEY,
    "secret": SECRET,
    "reader's secret": READER[1],
    "wrong secret": "wJalrXUtnFEMIPLANTEDWRONG",
    "session token": "FwoGZXIvYXdzPLANTEDTOKEN",
    "token of the hub": "hf_PLANTEDabcdefghijklmnop",
    "password": "hunter2PLANTED",
    "signature": "8f1dPLANTEDsignature",
}


def spellings(secret: str) -> set[bytes]:
    """As it is, and as it may be written down: in a URL, or in base64, less the ends that what stands beside it decides."""
    padded = (secret.encode(), b"_" + secret.encode(), b"__" + secret.encode())
    return {secret.encode(), quote(secret, safe="").encode(), *(base64.b64encode(one)[4:-4] for one in padded)}


@dataclass
class Search:
    """What was looked through, and where a secret was found."""

    files: int = 0
    bytes: int = 0
    found: list[str] = field(default_factory=list)

    def look(self, where: str, data: bytes) -> None:
        self.files += 1
        self.bytes += len(data)
        for what, secret in PLANTED.items():
            self.found += [f"{what} in {where}: …{_around(data, one)}…" for one in spellings(secret) if one in data]

    def look_at_table(self, store: Store) -> None:
        """Each object as it is, and what its Parquet files hold unpacked."""
        for entry in store.list_files():
            self.look(f"{store.uri}/{entry.path}", store.read(entry.path) or b"")
            if entry.path.endswith(".parquet"):
                with store.open(entry.path) as file:
                    parquet = pq.ParquetFile(file)
                    self.look(f"{entry.path}, unpacked", repr((parquet.metadata.metadata, parquet.read().to_pylist())).encode())


def _around(data: bytes, part: bytes) -> str:
    place = data.index(part)
    return repr(data[max(0, place - 80) : place + 120])


@pytest.fixture
def search() -> Iterator[Search]:
    search = Search()
    yield search
    print(f"\n{search.files} files and outputs with {search.bytes:,} bytes for {len(PLANTED)} secrets")


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's sessions; its sockets bear no long path."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Path:
    """A recipe, and six shards on the server."""
    folder = tmp_path_factory.mktemp("local")
    source = write_tars(folder / "shards", shards=6, images=6)
    tiny_recipe(folder)
    Store("s3://images", server.options()).filesystem.put(str(source), "images/shards", recursive=True)
    return folder


@dataclass(frozen=True)
class Done:
    """A process that has ended: what it printed, what Ray wrote meanwhile, and at which addresses they listened."""

    code: int
    out: bytes
    err: bytes
    logs: dict[Path, bytes]
    listened: set[tuple[str, str]]  # process, address


def read_below(folder: Path) -> dict[Path, bytes]:
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone by now, or a socket
            if path.is_file() and not path.is_symlink():
                found[path] = path.read_bytes()
    return found


def listening(pid: int) -> set[tuple[str, str]]:
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in process.net_connections(kind="inet"):
                    if one.status == psutil.CONN_LISTEN:
                        found.add((process.name(), one.laddr.ip))
    return found


def run(job: Path, ray_folder: Path, *arguments: str, **environment: str) -> Done:
    """`jobs/embed.py` in a process of its own, with a home, a cache and Ray's folder of its own."""
    home = job.parent / "home"
    home.mkdir(exist_ok=True)
    own = {
        "HOME": str(home),
        "LORA_EMBED_CACHE": str(home / "cache"),
        "RAY_TMPDIR": str(ray_folder),
        "HF_HOME": str(home / "hf"),
    }
    variables = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | own
    variables |= {"HF_TOKEN": PLANTED["token of the hub"]} | environment
    command = [sys.executable, str(ROOT / "jobs" / "embed.py"), "--config", str(job), "--json", *arguments]
    logs: dict[Path, bytes] = {}
    listened: set[tuple[str, str]] = set()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(command, env=variables, stdout=out, stderr=err) as process:
            while process.poll() is None:
                logs |= read_below(ray_folder)  # as it goes: a run that succeeds removes them
                listened |= listening(process.pid)
                time.sleep(0.2)
        logs |= read_below(ray_folder)
        out.seek(0), err.seek(0)
        return Done(process.returncode, out.read(), err.read(), logs, listened)


def job_on(server: S3Server, local: Path, folder: Path, table: dict[str, Any], **changes: Any) -> Path:
    places = {"input": "s3://images/shards", "table": f"s3://images/{folder.name}", "table_storage_options": table}
    return write_job(folder, local / "recipe.yaml", local, **{"chunk_size": 4} | places | changes)


def look_everywhere(search: Search, done: Done, folder: Path) -> None:
    search.look("stdout", done.out)
    search.look("stderr", done.err)
    for place in (read_below(folder / "home"), done.logs):
        for path, data in place.items():
            search.look(str(path), data)


@pytest.fixture(scope="module")
def success(local: Path, server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A job, and a run of it: the table's keys stand in the job file, the input's in the environment."""
    folder = tmp_path_factory.mktemp("success")
    job = job_on(server, local, folder, server.options())
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        done = run(job, Path(ray_folder), **server.environment())
    assert done.code == 0, done.err.decode()
    return job, done


def is_loopback(ip: str) -> bool:
    """Also where an IPv4 address is written as one of IPv6."""
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.slow
def test_a_run_listens_at_the_loopback_address_alone(success: tuple[Path, Done]) -> None:
    """Whoever reaches a port of Ray can run code."""
    _, done = success
    processes = {name for name, _ in done.listened}
    assert {"gcs_server", "raylet"} <= processes
    assert {one for one in done.listened if not is_loopback(one[1])} == set()


@pytest.mark.slow
def test_a_run_leaves_no_secret(success: tuple[Path, Done], server: S3Server, search: Search) -> None:
    job, done = success
    assert any("worker" in path.name for path in done.logs)
    look_everywhere(search, done, job.parent)
    before = search.files
    search.look_at_table(Store(f"s3://images/{job.parent.name}", server.options()))
    assert search.files > before + 10
    assert search.found == []
    search.look("the job file", job.read_bytes())  # the search finds what is there
    assert len(search.found) == 2


@pytest.mark.long
@pytest.mark.parametrize("arguments", [(), ("--log-format", "json")])
def test_a_run_whose_store_fails_for_good_leaves_no_secret(
    tmp_path: Path, ray_folder: Path, server: S3Server, local: Path, search: Search, arguments: tuple[str, ...]
) -> None:
    """In the workers, to the end of all patience: their errors go through Ray's logs."""
    faults = Faults(error=1.0, only=lambda request: request.method == "PUT" and request.path.endswith(".parquet"))
    with Proxy(server.endpoint, faults) as proxy:
        options = server.options(proxy.endpoint) | {"retry_s": 1}
        done = run(job_on(server, local, tmp_path, options), ray_folder, *arguments, **server.environment())
    assert done.code == 1
    assert b"no usable answer in" in done.err
    assert any("worker" in path.name for path in done.logs)
    look_everywhere(search, done, tmp_path)
    search.look_at_table(Store(f"s3://images/{tmp_path.name}", server.options()))
    assert search.found == []


WRONG = {"key": KEY, "secret": PLANTED["wrong secret"], "token": PLANTED["session token"]}


@pytest.mark.long
@pytest.mark.parametrize("what", ["wrong keys", "read only", "nowhere", "unknown option", "input denied in the workers"])
def test_a_run_that_is_refused_leaves_no_secret(
    tmp_path: Path, ray_folder: Path, server: S3Server, local: Path, search: Search, what: str
) -> None:
    options, changes, code = server.options(), {}, 2
    if what == "wrong keys":
        options |= WRONG
    elif what == "read only":
        options |= server.read_only_options()
    elif what == "nowhere":
        options |= {"client_kwargs": {"endpoint_url": f"http://me:{PLANTED['password']}@127.0.0.1:9"}, "retry_s": 1}
        code = 1  # a store that does not answer may do so tomorrow
    elif what == "unknown option":
        options |= {"passwort": PLANTED["password"], "config_kwargs": {"nonsense": PLANTED["signature"]}}
    with Proxy(server.endpoint) as proxy:
        if what == "input denied in the workers":
            code = 1
            # Whoever watches resets each connection that would read a shard: the last patience of a worker ends.
            proxy.watch = lambda request: not (request.method == "GET" and request.path.endswith(".tar"))
            changes = {"input_storage_options": server.options(proxy.endpoint) | {"retry_s": 1}}
        done = run(job_on(server, local, tmp_path, options, **changes), ray_folder, **server.environment())
    assert done.code == code, done.err.decode()
    assert b"error: " in done.err
    look_everywhere(search, done, tmp_path)
    assert search.found == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", f"table_storage_options=[{PLANTED['secret']}"),
        ("--set", f"table_storage_options={PLANTED['secret']}"),
        ("--set", f"table_storage_options.secret.more={PLANTED['secret']}", "--set", "chunk_size=none"),
        ("--set", f"table_storage_options.secret={PLANTED['secret']}", "--set", "table_storage_options.secret.more=1"),
        ("--set", f"input_storage_options.secret={PLANTED['secret']}", "--set", "chunk_size=none"),
        ("--set", f"table=ftp://me:{PLANTED['password']}@127.0.0.1/table"),
        ("--set", f"table=https://127.0.0.1/table?X-Amz-Signature={PLANTED['signature']}"),
        ("--set", f"input=[shards, 'sftp://me:{PLANTED['password']}@127.0.0.1/shards']"),
        ("--set", f"input=https://127.0.0.1/a.tar?X-Amz-Credential=me&X-Amz-Signature={PLANTED['signature']}"),
    ],
)
def test_what_is_wrong_with_a_job_is_said_without_its_secrets(
    tmp_path: Path, local: Path, capfd: pytest.CaptureFixture[str], search: Search, arguments: tuple[str, ...]
) -> None:
    job = write_job(tmp_path, local / "recipe.yaml", local / "shards", table_storage_options={"secret": SECRET})
    assert run_command(["run", str(job), *arguments]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: ")
    search.look("what is said", (said.out + said.err).encode())
    assert search.found == []


@pytest.mark.parametrize("place", ["base_model", "adapters"])
def test_a_recipe_may_not_hold_a_password(
    tmp_path: Path, local: Path, capfd: pytest.CaptureFixture[str], search: Search, place: str
) -> None:
    """It would be written to the encoder, its merge report and the table."""
    uri = f"https://me:{PLANTED['password']}@127.0.0.1/model"
    recipe = yaml.safe_load((local / "recipe.yaml").read_text())
    recipe[place] = uri if place == "base_model" else [{"path": uri}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_command(["build", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert "holds a password" in said
    search.look("what is said", said.encode())
    assert search.found == []


@pytest.mark.parametrize("command", [["status"], ["verify"], ["search"], ["explain"]])
def test_a_table_named_with_a_password_is_said_without_it(
    capfd: pytest.CaptureFixture[str], search: Search, command: list[str]
) -> None:
    arguments = [f"memory://me:{PLANTED['password']}@there/table"] + (["x"] if command[0] in ("search", "explain") else [])
    assert run_command([*command, *arguments]) == 2
    said = capfd.readouterr().err
    assert "there/table" in said
    search.look("what is said", said.encode())
    assert search.found == []


def test_nothing_shows_storage_options_by_accident(local: Path, tmp_path: Path) -> None:
    """What Python, pydantic and Ray print of an object is its `repr`."""
    from lora_embed.config.models import load_job

    options = {"key": KEY, "secret": SECRET}
    store = Store("s3://images/table", options)
    job = load_job(
        write_job(tmp_path, local / "recipe.yaml", local, table_storage_options=options, input_storage_options=options)
    )
    for shown in (repr(store), str(store), repr(job), str(job)):
        assert SECRET not in shown
        assert KEY not in shown
    assert job.table_storage_options == options
