"""A job on a real S3 server, killed at moments that its own requests tell, and started again: nothing lost, nothing twice.

`make test-long` kills 25 times, each time on a table of its own, and three times on one table; `make test-slow` kills once.
"""

import contextlib
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from faults import PHASES, TARGETS
from jobs import kill_all, start_job, tiny_recipe, write_job, write_tars
from lora_embed import open_table
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store
from lora_embed.table import versions
from s3 import Proxy, Request, S3Server, s3_server

SHARDS, IMAGES, CHUNK = 20, 12, 5
LIMIT_S = 150.0  # of one run

MOST = {"listing": 5, "decode": 20, "commit": 50, "publish": 4}  # of such requests in a run, or a safe bound below it


@dataclass(frozen=True)
class Kill:
    """Who dies at the how manieth request of a phase: before the server sees it, or done but not yet acknowledged."""

    target: str
    phase: str
    number: int
    is_done: bool
    gpus: int  # declared: decoding, embedding and writing in processes of their own

    def __str__(self) -> str:
        return f"{self.target}-{self.phase}-{self.number}{'-done' if self.is_done else ''}{'-gpu' * self.gpus}"


def draw_kills(seed: int, count: int) -> list[Kill]:
    """All targets and phases in turn, the rest by chance."""
    rng = random.Random(seed)
    pairs = [  # decoding is over before the first commit: none dies in that
        ("driver", "listing"), ("driver", "commit"), ("all", "publish"), ("actor", "commit"), ("decoder", "decode"),
        ("writer", "commit"), ("all", "decode"), ("driver", "publish"), ("actor", "decode"), ("all", "listing"),
        ("all", "commit"), ("decoder", "decode"),
    ]  # fmt: skip
    kills = []
    for turn in range(count):
        target, phase = pairs[turn % len(pairs)]
        gpus = 1 if target in ("decoder", "writer") else rng.randint(0, 1)
        kills.append(Kill(target, phase, rng.randint(1, MOST[phase]), rng.random() < 0.5, gpus))
    return kills


@dataclass
class Trap:
    """Kills when the moment has come."""

    kill: Kill
    driver: "subprocess.Popen[bytes] | None" = None
    seen: int = 0
    killed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request) -> None:
        if not PHASES[self.kill.phase](request):
            return
        with self.lock:
            self.seen += 1
            if self.seen >= self.kill.number and not self.killed:
                self._strike()

    def _strike(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert self.driver is not None
            if self.kill.target in ("driver", "all"):
                self.killed = [self.kill.target]
                kill_all(self.driver) if self.kill.target == "all" else self.driver.kill()
                return
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = " ".join(process.cmdline())
                    if TARGETS[self.kill.target] in title:
                        process.kill()
                        self.killed = [title]
                        return


@dataclass(frozen=True)
class Place:
    """A server with shards on it, and what an undisturbed run makes of them."""

    server: S3Server
    folder: Path
    expected: pa.Table

    def start(self, name: str, proxy: Proxy, gpus: int = 0) -> "subprocess.Popen[bytes]":
        environment = self.server.environment(proxy.endpoint)
        log = self.folder / f"{name}-{time.monotonic_ns()}.log"
        return start_job(self.folder / "job.yaml", log, "--set", f"table=s3://images/{name}", gpus=gpus, **environment)

    def store(self, name: str) -> Store:
        return Store(f"s3://images/{name}", self.server.options())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kills")
    with s3_server(folder / "server") as server:
        server.make_bucket("images")
        source = write_tars(folder / "shards", shards=SHARDS, images=IMAGES)
        Store("s3://images", server.options()).filesystem.put(str(source), "images/shards", recursive=True)
        recipe = tiny_recipe(folder)
        job = write_job(folder, recipe, source, input="s3://images/shards", chunk_size=CHUNK)
        process = start_job(job, folder / "undisturbed.log", "--set", "table=s3://images/undisturbed", **server.environment())
        assert process.wait(LIMIT_S) == 0, (folder / "undisturbed.log").read_text()
        yield Place(server, folder, rows_of(server, "undisturbed"))


def rows_of(server: S3Server, name: str) -> pa.Table:
    opened = open_table(f"s3://images/{name}", storage_options=server.options())
    return opened.to_dataset().to_table().sort_by("id")


def killed_run(place: Place, name: str, proxy: Proxy, kill: Kill) -> str:
    """One run with its kill; says what became of both."""
    trap = Trap(kill)
    proxy.watch, proxy.answered = (None, trap) if kill.is_done else (trap, None)
    process = place.start(name, proxy, kill.gpus)
    trap.driver = process
    code = process.wait(LIMIT_S)
    proxy.watch = proxy.answered = None
    return f"{kill}: killed {trap.killed}, exit code {code}"


def check_table(place: Place, name: str, proxy: Proxy) -> None:
    """Equal to an undisturbed one, every object committed once, and nothing there that the version does not refer to."""
    assert rows_of(place.server, name).equals(place.expected)
    store = place.store(name)
    manifest = versions.read_manifest(store)
    assert manifest is not None
    assert (manifest.version, versions.listed_versions(store)) == (1, [1])
    writes = [r for r in proxy.requests if r.method == "PUT" and r.status == 200 and f"/{name}/" in r.path]
    parts = {"data", "rejects", "CURRENT", "runs"}  # these may be written again: until a version refers to them, or at any time
    once = Counter(r.path for r in writes if r.path.split(f"/{name}/")[1].split("/")[0] not in parts)
    assert [path for path, times in once.items() if times > 1] == []
    published = next(n for n, r in enumerate(writes) if "/versions/" in r.path)
    assert [r.path for r in writes[published:] if "/data/" in r.path] == []
    referred = {entry.path for entry in (*manifest.files, *manifest.rejects)} | {"CURRENT", "table.json"}
    kept = (encoder_path(manifest.space_id), "recipes/", "versions/", "runs/")
    assert [e.path for e in store.list_files() if e.path not in referred and not e.path.startswith(kept)] == []


def etags(place: Place, name: str) -> dict[str, str]:
    return {entry.path: entry.etag for entry in place.store(name).list_files() if entry.path != "CURRENT"}


def resume(place: Place, name: str, proxy: Proxy) -> None:
    before = etags(place, name)
    process = place.start(name, proxy)
    assert process.wait(LIMIT_S) == 0, [log.read_text()[-3000:] for log in sorted(place.folder.glob(f"{name}-*.log"))[-1:]]
    after = etags(place, name)
    assert {path: etag for path, etag in before.items() if after.get(path, etag) != etag} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [Kill("all", "commit", 12, False, 0)],
        pytest.param(
            [Kill("driver", "commit", 9, True, 0), Kill("all", "commit", 12, False, 0), Kill("driver", "publish", 2, True, 0)],
            marks=pytest.mark.long,
        ),
    ],
    ids=["once", "thrice"],
)
def test_killed_again_and_again_the_same_command_ends_with_the_same_table(place: Place, kills: list[Kill]) -> None:
    name = f"again-{len(kills)}"
    with Proxy(place.server.endpoint) as proxy:
        for kill in kills:
            before = etags(place, name)
            print(killed_run(place, name, proxy, kill))
            assert before.items() <= etags(place, name).items() or kill.phase == "publish"
        resume(place, name, proxy)
        check_table(place, name, proxy)


@pytest.mark.long
@pytest.mark.parametrize("kill", draw_kills(seed=25, count=25), ids=str)
def test_a_kill_loses_and_doubles_nothing(place: Place, kill: Kill) -> None:
    name = f"after-{kill}"
    with Proxy(place.server.endpoint) as proxy:
        said = killed_run(place, name, proxy, kill)
        print(said)
        assert "killed []" not in said
        resume(place, name, proxy)
        check_table(place, name, proxy)


@pytest.mark.long  # test_publishers has the same race at the manifest alone
def test_two_runs_at_once_make_one_version(place: Place) -> None:
    with Proxy(place.server.endpoint) as proxy:
        runs = [place.start("twice", proxy), place.start("twice", proxy)]
        codes = [run.wait(2 * LIMIT_S) for run in runs]
        assert codes == [0, 0], [log.read_text()[-2000:] for log in place.folder.glob("twice-*.log")]
        assert rows_of(place.server, "twice").equals(place.expected)
        assert versions.listed_versions(place.store("twice")) == [1]
        assert not place.store("twice").list_files("staging")
