"""A real Ray head with token authentication, whose Python has the dependencies alone, as on a cluster's nodes."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs import ROOT

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Head:
    """A running Ray head with a dashboard that asks for a token; its Python does not see this package."""

    dashboard: str
    address: str
    folder: Path
    environment: dict[str, str]

    @property
    def ray(self) -> list[str]:
        """The command `ray` by the cluster's own Python."""
        return [str(self.folder / "env" / "bin" / "python"), *RAY[1:]]

    def start(self, command: list[str], log: Path, *, cwd: Path = ROOT, **changes: str) -> subprocess.Popen[bytes]:
        environment = self.environment | changes
        with log.open("wb") as file:
            return subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def start_node(self, parameters: dict[str, str], log: Path, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
        """`ray start` with these parameters, which runs until it is ended."""
        flags = [f"--{name}={value}" if value else f"--{name}" for name, value in parameters.items()]
        path = f"{self.folder}/env/bin{os.pathsep}{self.environment['PATH']}"
        return self.start([*self.ray, "start", "--block", "--disable-usage-stats", *flags], log, cwd=cwd, PATH=path)

    def submit(self, log: Path, *arguments: str, **changes: str) -> subprocess.Popen[bytes]:
        command = [*RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", *arguments]
        return self.start(command, log, **changes)

    def ask(self, method: str, path: str) -> int:
        """A request to the dashboard with the token; returns its status."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.dashboard + path, method=method, headers={"Authorization": f"Bearer {token}"})
        return int(urllib.request.urlopen(request, timeout=10).status)

    def is_up(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return self.ask("GET", "/api/version") == 200
        return False


@contextlib.contextmanager
def ray_head(parameters: dict[str, str], cwd: Path = ROOT, **variables: str) -> Iterator[Head]:
    """A head on ports of its own, started with these parameters of `ray start` and these variables."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # Ray's sockets lie in it, and their paths must be short
    venv.create(folder / "env", symlinks=True)
    [site] = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # not followed by the .pth files therein
    token = folder / "token"
    token.write_text(os.urandom(32).hex())
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "PYTHONPATH"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | variables

    port, dashboard, agent, client = free_ports(4)
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder, environment)
    probe = [head.ray[0], "-c", "import lora_embed"]
    imported = subprocess.run(probe, env=environment, cwd=folder, capture_output=True, check=False)
    assert b"No module named 'lora_embed'" in imported.stderr
    own = {"temp-dir": f"{folder}/t", "port": str(port), "dashboard-port": str(dashboard)}
    own |= {"dashboard-agent-listen-port": str(agent), "ray-client-server-port": str(client)}
    process = head.start_node({"head": ""} | parameters | own, folder / "log", cwd)
    try:
        wait_until(head.is_up, process, folder / "log")
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, limit_s: float = 240) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, at which Ray ends what it started, then SIGKILL to what is left: after jobs it may wait for half a minute."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.kill()
    for one in psutil.wait_procs(started, timeout=1)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
