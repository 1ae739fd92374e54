"""A job of the fault campaign under way: what it runs on, and how each kind of fault strikes at it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import unquote

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from faults import MONITOR, Fault
from jobs import kill_all, start_job, tiny_recipe, write_job, write_recipe, write_tars
from lora_embed import open_table
from lora_embed.config.models import load_recipe
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
from lora_embed.run.journal import software
from lora_embed.store.store import Store
from models import save_adapter, save_base
from s3 import Faults, Proxy, Request, S3Server, s3_server

SHARDS, IMAGES, CHUNK = 6, 6, 3
LIMIT_S = 600.0  # of one process
OWNED = "LORA_EMBED_CAMPAIGN"  # in the environment of all that a run starts: its name, or of all on the shared cluster
SHARED = f"shared {os.getpid()}"
FAIR = {"RAY_worker_niceness": "0"}  # Ray's 15 would let other work on the machine starve workers
IS_WORK = re.compile(r"ray::(MapWorker|MapBatches|do$|inspect_device)")
# These take Ray down with them or need one of their own; the others join a cluster that goes on.
ALONE = {
    "all processes killed",
    "scratch disk full",
    "cache disk full",
    "Ray's disk full",
    "table's disk full",
    "out of memory",
}
DISKS = {"cache disk full": ("cache", "8m"), "scratch disk full": ("tmp", "8m"), "Ray's disk full": ("ray", "48m"),
         "table's disk full": ("table", "8m")}  # fmt: skip

Watcher = Callable[[Request], None]


@dataclass(frozen=True)
class World:
    """What all runs share: a server, a cluster with a proxy for its workers, and what an undisturbed run makes of two inputs.

    In its folder: a recipe and its encoder, another base and adapter, and two sets of shards of the same names.
    """

    server: S3Server
    folder: Path
    expected: tuple[pa.Table, pa.Table]
    proxy: Proxy
    cluster: Cluster


@contextmanager
def world_at(folder: Path) -> Iterator[World]:
    """The world in a folder, whose files are made if they are not there, or were made by other libraries."""
    made = folder / "made.json"
    if not made.is_file() or json.loads(made.read_text()) != software():
        shutil.rmtree(folder, ignore_errors=True)
        _make(folder)
        made.write_text(json.dumps(software()))
    expected = (pq.read_table(folder / "a.parquet"), pq.read_table(folder / "b.parquet"))
    with tempfile.TemporaryDirectory() as place, s3_server(Path(place)) as server, Proxy(server.endpoint) as proxy:
        server.make_bucket("images")
        variables = server.environment(proxy.endpoint) | {"LORA_EMBED_CACHE": f"{place}/cache", OWNED: SHARED}
        with cluster_of(variables, num_cpus=2, num_gpus=1) as cluster:
            yield World(server, folder, expected, proxy, cluster)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True)
    recipe = tiny_recipe(folder)
    build_encoder(gather(load_recipe(recipe)), folder / "encoder", print)
    other = folder / "other"
    save_adapter(other / "ten", save_base(other / "base", "vit", seed=9), 10, seed=9)
    for number, name in enumerate("ab"):
        source = write_tars(folder / name, shards=SHARDS, images=IMAGES, seed=1000 * number)
        _undisturbed(folder, source, folder / f"{name}.parquet")


@contextmanager
def cluster_of(variables: dict[str, str], **head: int) -> Iterator[Cluster]:
    """A cluster on this machine whose nodes, and so the workers, have these variables."""
    before = dict(os.environ)
    os.environ.update(variables | FAIR)
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head | {"include_dashboard": False})
        try:
            yield cluster
        finally:
            cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _undisturbed(folder: Path, source: Path, out: Path) -> None:
    """The rows of a run that nothing befalls."""
    with tempfile.TemporaryDirectory() as place:
        job = write_job(Path(place), folder / "encoder", source, chunk_size=CHUNK)
        log = Path(place) / "log"
        assert start_job(job, log, **FAIR).wait(LIMIT_S) == 0, log.read_text()
        pq.write_table(rows_of(str(Path(place) / "table"), {}), out)


def rows_of(table: str, options: dict[str, object]) -> pa.Table:
    return open_table(table, storage_options=options).to_dataset().to_table().sort_by("id")


class SmallDisk:
    """A file system of few megabytes over a folder, seen by those alone who enter its namespace; no rights are needed.

    It is gone when the process that holds it ends.
    """

    def __init__(self, folder: Path, size: str) -> None:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        command += [f"mount -t tmpfs -o size={size} tmpfs {folder} && echo ready && exec cat"]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # ends with this process
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", "no small disk: user namespaces are not allowed here"
        self.folder = Path(f"/proc/{self._holder.pid}/root{folder}")  # the same from outside

    @property
    def through(self) -> tuple[str, ...]:
        """The command that enters."""
        return ("nsenter", f"--target={self._holder.pid}", "--user", "--mount", "--preserve-credentials", "--wdns=/")

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@dataclass
class Scene:
    """A job, the proxies between it and its store, and the fault that awaits it."""

    world: World
    name: str
    fault: Fault
    folder: Path  # short, for Ray's sockets
    proxies: tuple[Proxy, ...]  # the driver's, and the workers' where they are on a cluster
    disk: SmallDisk | None = None
    cluster: Cluster | None = None
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    timers: list[threading.Timer] = field(default_factory=list)
    errands: "SimpleQueue[Callable[[], object]]" = field(default_factory=SimpleQueue)  # for the thread that waits for the run

    @property
    def table(self) -> str:
        return str(self.folder / "table") if self.fault.kind.name == "table's disk full" else f"s3://images/{self.name}"

    @property
    def store(self) -> Store:
        """The table past all faults."""
        if self.disk is not None and not self.table.startswith("s3:"):
            return Store(str(self.disk.folder), {})
        return Store(self.table, self.world.server.options())

    @property
    def input(self) -> Store:
        return Store(f"s3://images/{self.name}-input", self.world.server.options())

    @property
    def replaced(self) -> str:
        """The shard that a run finds replaced."""
        return f"{self.fault.seed % SHARDS:04d}.tar"

    def start(self, *, disturbed: bool) -> "subprocess.Popen[bytes]":
        """A run of the job."""
        log = self.folder / f"{len(self.processes)}.log"
        variables = self.world.server.environment(self.proxies[0].endpoint) | places(self.folder, self.name) | FAIR
        if disturbed and self.fault.form == MONITOR:
            variables |= {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
            variables |= {"RAY_task_oom_retries": "1"}  # five of them take ten minutes
        if self.cluster is not None:
            variables["RAY_ADDRESS"] = self.cluster.address
        through = self.disk.through if self.disk is not None else ()
        gpus = self.fault.gpus if self.cluster is None else 0
        process = start_job(self.folder / "job.yaml", log, gpus=gpus, through=through, **variables)
        self.processes.append(process)
        return process

    def wait(self, process: "subprocess.Popen[bytes]") -> int | None:
        """Its exit code, or None if it does not end in time and is killed; runs errands meanwhile."""
        end = time.monotonic() + LIMIT_S
        while process.poll() is None:
            with contextlib.suppress(Empty):
                self.errands.get(timeout=0.2)()
            if time.monotonic() > end:
                kill_all(process)
                return None
        return process.returncode

    def said(self, number: int) -> str:
        return (self.folder / f"{number}.log").read_text(errors="replace")

    def break_network(self, faults: Faults) -> None:
        for proxy in self.proxies:
            proxy.faults = faults

    def watch(self, before: Watcher | None = None, after: Watcher | None = None) -> None:
        """Have these called before a request of this run reaches the store, or when the store has done it."""
        for proxy in self.proxies:
            proxy.watch, proxy.answered = self._mine(before), self._mine(after)

    def _mine(self, watcher: Watcher | None) -> Watcher | None:
        def watch(request: Request) -> None:
            if watcher is not None and self.name in f"{request.path}?{unquote(request.query)}":
                watcher(request)

        return watch if watcher is not None else None

    @property
    def requests(self) -> list[Request]:
        """Those of this run, whose end is decided."""
        every = [request for proxy in self.proxies for request in proxy.requests]
        return [request for request in every if self.name in f"{request.path}?{unquote(request.query)}"]

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self.timers.append(threading.Timer(seconds, action))
        self.timers[-1].start()

    def heal(self) -> None:
        """End what goes on; what was lost stays lost."""
        for timer in self.timers:
            timer.cancel()
        self.watch()
        self.break_network(Faults())
        if self.disk is not None:
            self.disk.free()
        if self.fault.kind.name == "recipe changed":
            copy_recipe(self.world.folder, self.folder)


def places(folder: Path, name: str) -> dict[str, str]:
    """Variables that put what a run leaves on this machine below a folder."""
    variables = {"LORA_EMBED_CACHE": "cache", "TMPDIR": "tmp", "RAY_TMPDIR": "ray"}
    return {variable: str(folder / place) for variable, place in variables.items()} | {OWNED: name}


def copy_recipe(source: Path, to: Path) -> None:
    """Put each file of a base and adapters in place of another, as a careful copy does."""
    for file in [path for name in ("base", "ten", "more") for path in (source / name).rglob("*") if path.is_file()]:
        target = to / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target.with_name("incoming"))
        target.with_name("incoming").rename(target)


@contextmanager
def scene(world: World, name: str, fault: Fault) -> Iterator[Scene]:
    """All that a run needs, gone in the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="f-", dir="/tmp", ignore_cleanup_errors=True)))
        for place in ("cache", "tmp", "ray", "table"):
            (folder / place).mkdir()
        proxies = [stack.enter_context(Proxy(world.server.endpoint))]
        cluster = None
        if fault.kind.name == "node lost":
            proxies.append(stack.enter_context(Proxy(world.server.endpoint)))
            variables = world.server.environment(proxies[1].endpoint) | places(folder, name)
            cluster = stack.enter_context(cluster_of(variables, num_cpus=0))
            for _ in range(2):
                cluster.add_node(num_cpus=1)
        elif fault.kind.name not in ALONE:
            proxies.append(world.proxy)
            cluster = world.cluster
        here = Scene(world, name, fault, folder, tuple(proxies), cluster=cluster)
        stack.callback(_clear, here)
        for tar in sorted((world.folder / "a").iterdir()):
            here.input.replace(tar.name, tar.read_bytes())
        if fault.kind.name in DISKS:
            place, size = DISKS[fault.kind.name]
            here.disk = SmallDisk(folder / place, size)
            stack.callback(here.disk.close)
        _write_job(here)
        yield here


def _write_job(here: Scene) -> None:
    fault = here.fault
    # An outage for good need not be waited for; all others are to be outlived.
    options = {"retry_s": 4.0 if fault.kind.name == "store gone for good" else 90.0}
    options["config_kwargs"] = {"read_timeout": 3.0, "connect_timeout": 3.0}
    recipe = here.world.folder / "encoder"
    if fault.kind.name in ("recipe changed", "scratch disk full"):
        copy_recipe(here.world.folder, here.folder)
        recipe = write_recipe(here.folder, here.folder / "base", {here.folder / "ten": 0.5, here.folder / "more": 0.5})
    settings = {"input": here.input.uri, "table": here.table, "chunk_size": CHUNK}
    settings |= {"input_storage_options": options, "table_storage_options": options if here.table.startswith("s3:") else {}}
    if here.cluster is here.world.cluster:
        settings["resources"] = {"device": "gpu" if fault.gpus else "cpu", "actors": {"max": 1}}
    elif here.cluster is not None:
        settings["resources"] = {}
    write_job(here.folder, recipe, here.folder, **settings)


def _clear(here: Scene) -> None:
    """End every process that is left, and remove what lies on the server."""
    here.heal()
    for process in left_over(here):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    here.world.proxy.requests.clear()
    for store in (here.input, *([here.store] if here.table.startswith("s3:") else [])):
        store.delete([entry.path for entry in store.list_files()])


def left_over(here: Scene) -> list[psutil.Process]:
    """Living processes that a run started, or that those started; on the shared cluster, workers that still do its work."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            of = process.environ().get(OWNED)
            works = here.cluster is here.world.cluster and of == SHARED and IS_WORK.search(" ".join(process.cmdline()))
            if process.status() != psutil.STATUS_ZOMBIE and (of == here.name or works):
                found.append(process)
    return found
