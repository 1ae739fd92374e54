"""Another user of the machine, beside a Ray that a run has started: nothing to list, read, rename or join."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs import ROOT

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user")
START = """
import sys, ray
from lora_embed.chain import cluster
cluster.connect(num_cpus=1)
here = ray.get_runtime_context()
print(here.get_temp_dir(), here.get_session_name(), here.gcs_address, flush=True)
sys.stdin.readline()
cluster.leave(failed=False)
"""
JOIN = """
import os, sys
from ray._raylet import GcsClient
if len(sys.argv) > 2:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": sys.argv[2]}
print("joined", GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 10))
"""


@dataclass(frozen=True)
class Session:
    """A Ray that runs, and the process that started it."""

    folder: Path
    name: str
    address: str
    process: "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"TMPDIR": "/tmp"}
    command = [sys.executable, "-c", START]
    with subprocess.Popen(
        command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        folder, name, address = process.stdout.readline().split()
        yield Session(Path(folder).parent, f"r/{name}", address, process)
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert not Path(folder).parent.exists()  # a run that ends well leaves nothing


def as_nobody(*command: str) -> "subprocess.CompletedProcess[str]":
    variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run([*NOBODY, *command], capture_output=True, text=True, timeout=120, check=False, env=variables, cwd="/")


@pytest.mark.parametrize(
    "command",
    [
        "ls {folder}",
        "ls {folder}/{name}/logs",
        "find {folder} -mindepth 1",
        "cat {folder}/{name}/logs/gcs_server.out",
        "mv {folder}/{name}/logs {folder}/{name}/away",
        "mv {folder} {folder}-away",
        "touch {folder}/planted",
        "ln -s /etc {folder}/{name}/planted",
        "rm -rf {folder}/{name}/sockets",
        "stat {folder}/{name}/sockets/plasma_store",
    ],
)
def test_nobody_gets_at_nothing_of_a_running_session(session: Session, command: str) -> None:
    ended = as_nobody(*command.format(folder=session.folder, name=session.name).split())
    assert ended.returncode != 0, ended.stdout
    assert "ermission denied" in ended.stderr or "not permitted" in ended.stderr
    assert ended.stdout.strip() in ("", str(session.folder))
    assert (session.folder / session.name / "logs").is_dir()


def test_the_folder_and_the_token_are_their_users_alone(session: Session) -> None:
    state = session.folder.lstat()
    assert stat.S_ISDIR(state.st_mode)
    assert (stat.S_IMODE(state.st_mode), state.st_uid) == (0o700, os.geteuid())
    token = session.folder / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert as_nobody("cat", str(token)).returncode != 0


def test_the_longest_socket_has_room(session: Session) -> None:
    sockets = [str(path) for path in session.folder.rglob("*") if path.is_socket()]
    assert sockets
    assert max(map(len, sockets)) < 100


@pytest.mark.parametrize("token", [[], ["0" * 64]])
def test_nobody_joins_without_the_token(session: Session, token: list[str]) -> None:
    """The loopback address is everybody's; a Ray without a token runs whatever it is sent, as its own user."""
    command = ["timeout", "5", sys.executable, "-c", JOIN, session.address, *token]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={"HOME": "/nonexistent"})
    assert "joined" not in ended.stdout
    assert "InvalidAuthToken" in ended.stderr, ended.stderr[-2000:]
