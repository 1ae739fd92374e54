"""The chain on a Ray cluster. Besides the entry points, the only user of ray."""

import contextlib
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from lora_embed import errors
from lora_embed.config import Resources
from lora_embed.decode import decode_items
from lora_embed.embed import Device, EmbedImages, EmbedShards, inspect_device
from lora_embed.errors import IncompleteRun, LoraEmbedError, ResourcesError
from lora_embed.model.encoder import Description
from lora_embed.schema import ChunkStats, Layout, WorkItem, encoder_path
from lora_embed.storage import Store
from lora_embed.write import WriteParts

MAX_BLOCKS = 2000
MAX_RETRIES = 3  # of a task whose process died; Ray Data's default is for ever
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the chain lies on the cluster: Ray's arguments for its three stages, and for a task on an actor's device."""

    decode: dict[str, Any] | None  # None: the embedding actors decode and write
    embed: dict[str, Any]
    write: dict[str, Any]
    device: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all chunks of a run share."""

    input_options: dict[str, Any]
    store: Store
    encoder: Description
    layout: Layout


def embed_items(items: list[WorkItem], job: Job, topology: Topology) -> Iterator[ChunkStats]:
    """The chain: work items → decoded chunks → vectors → committed parts; yields what became of each chunk.

    One row is one chunk and goes alone (`batch_size=1`), so that chunks stay whole and inside one shard.
    Raises EncoderError when an actor does not reproduce the golden vectors, IncompleteRun when Ray gives up.
    """
    encoder_uri = f"{job.store.uri}/{encoder_path(job.encoder.space_id)}"
    decoding = (job.layout, job.encoder.preprocessing, job.input_options)
    embedding = (encoder_uri, job.store.options, job.layout)
    writing = (job.store, job.encoder.space_id, job.layout)

    rows: Any = ray.data.from_items([{"item": item} for item in items], override_num_blocks=min(len(items), MAX_BLOCKS))
    if topology.decode is None:
        whole = (embedding, job.input_options, writing)
        rows = rows.map_batches(EmbedShards, batch_size=1, fn_constructor_args=whole, **topology.embed)
    else:
        rows = rows.map_batches(decode_items, batch_size=1, fn_args=decoding, **topology.decode)
        rows = rows.map_batches(EmbedImages, batch_size=1, fn_constructor_args=embedding, **topology.embed)
        rows = rows.map_batches(WriteParts, batch_size=1, fn_constructor_args=writing, **topology.write)

    with _own_errors():
        for row in rows.iter_rows():
            yield ChunkStats.from_json(row["stats"])


def choose_topology(resources: Resources) -> Topology:
    """Lay the chain out by the cluster's resources, never the driver's own devices.

    With GPUs: an actor on each, decoding on the CPUs, and writers that hold no CPU, so that a decode task which waits
    for room downstream never waits for itself. Without: one actor per CPU does it all: no transfer, every core busy.
    Raises ResourcesError for what this cluster can never schedule.
    """
    cluster = _wait_for_gpu(resources.wait_s) if resources.device == "gpu" else ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if largest < resources.cpus_per_decode:
        raise ResourcesError(
            f"resources.cpus_per_decode is {resources.cpus_per_decode:g}, but the largest node of the cluster has "
            f"{largest:g} CPUs; set it lower, or start the cluster with larger nodes"
        )
    on_gpu = resources.device == "gpu" or (resources.device == "auto" and gpus >= 1)
    room = int(gpus) if on_gpu else int(cpus / resources.cpus_per_decode)
    least, most = resources.actors.min or 1, resources.actors.max or room
    if least > room or least > most:
        raise ResourcesError(
            f"resources.actors asks for at least {least} and at most {most} actors, but the cluster has room for {room} "
            f"({gpus:g} GPUs, {cpus:g} CPUs); lower the minimum, or start a larger cluster"
        )
    pool = ActorPoolStrategy(min_size=least if resources.actors.min else min(most, room), max_size=min(most, room))
    restarts = {"max_restarts": MAX_RETRIES, "max_task_retries": MAX_RETRIES}
    device = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": resources.cpus_per_decode}
    return Topology(
        decode={"num_cpus": resources.cpus_per_decode, "max_retries": MAX_RETRIES} if on_gpu else None,
        embed=device | restarts | {"compute": pool},
        write={"num_cpus": 0, "compute": ActorPoolStrategy(size=max(1, room // 2))} | restarts,
        device=device,
    )


def _wait_for_gpu(limit_s: float) -> dict[str, float]:
    deadline = time.monotonic() + limit_s
    while True:
        resources: dict[str, float] = ray.cluster_resources()
        if resources.get("GPU", 0) >= 1:
            return resources
        if time.monotonic() >= deadline:
            raise ResourcesError(
                f"resources.device is gpu, but the cluster still has none after {limit_s:g} s (it has "
                f"{resources.get('CPU', 0):g} CPUs); start GPU workers, or set device to cpu"
            )
        time.sleep(1.0)


def ask_device(topology: Topology) -> Device:
    """The kind of device that actors will get, asked of one."""
    device: Device = ray.get(ray.remote(inspect_device).options(**topology.device).remote())
    return device


def connect(num_cpus: int | None = None, num_gpus: int | None = None) -> None:
    """Join the cluster that this job was submitted to, or start one on this machine that ends with this process.

    The numbers are what a cluster started here declares, by default what the machine has.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    dashboard = False if address == "local" else None
    _check_reachable(address)
    try:
        ray.init(
            address=address,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=dashboard,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise ResourcesError(f"no Ray cluster can be joined at {address}: {error}. Start one, or unset RAY_ADDRESS.") from None
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)  # of arguments that the pinned Ray still takes
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints the tracebacks of what is raised anyway
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _check_reachable(address: str) -> None:
    """Ray itself tries an address that nobody listens at for minutes."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise ResourcesError(
            f"RAY_ADDRESS is {address}, but nobody answers there ({error}). Start the cluster, correct the address, or "
            "unset it to run on this machine alone."
        ) from None


def map_tasks(task: Callable[..., R], shared: tuple[Any, ...], arguments: list[Any]) -> list[R]:
    """`task(*shared, argument)` for each argument as Ray tasks, a bounded number at a time; results in order."""
    remote = ray.remote(task).options(num_cpus=1, max_retries=MAX_RETRIES)
    most = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    results: dict[int, R] = {}
    pending: dict[Any, int] = {}
    queue = iter(enumerate(arguments))
    with _own_errors():
        while len(results) < len(arguments):
            while len(pending) < most and (following := next(queue, None)) is not None:
                pending[remote.remote(*shared, following[1])] = following[0]
            ready, _ = ray.wait(list(pending))
            for reference in ready:
                results[pending.pop(reference)] = ray.get(reference)
    return [results[number] for number in range(len(arguments))]


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Bring an error of this package back out of Ray's wrappers; anything else of Ray's ends the run with its cause."""
    try:
        yield
    except ray.exceptions.RayError as error:
        own = _find_own(error)
        if own is not None:
            raise own from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise IncompleteRun(
            f"Ray gave the run up: {lines[-1][:300]}. What was embedded is kept, and the same command goes on."
        ) from error


def _find_own(error: BaseException | None) -> LoraEmbedError | None:
    """The error as it was raised in a task, or as the text in which Ray hands on what an actor's constructor raised."""
    if error is None or isinstance(error, LoraEmbedError):
        return error
    cause = getattr(error, "cause", None)
    if isinstance(cause, LoraEmbedError):
        return cause
    if named := _OWN_ERROR.search(str(error)):
        kind = getattr(errors, named[1], IncompleteRun)
        return cast(LoraEmbedError, kind(named[2]))
    return _find_own(error.__cause__)


_OWN_ERROR = re.compile(r"^lora_embed\.errors\.(\w+): (.+)$", re.MULTILINE)
