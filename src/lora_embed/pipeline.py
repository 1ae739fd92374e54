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
import ray.data.exceptions
import ray.exceptions
from ray.autoscaler.sdk import request_resources
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from lora_embed import errors
from lora_embed.config import Resources
from lora_embed.decode import Decode, decode_image, decode_items
from lora_embed.embed import Device, EmbedImages, EmbedShards, inspect_device
from lora_embed.errors import IncompleteRun, LoraEmbedError, ResourcesError, WorkersLost
from lora_embed.isolate import IsolatedDecoder
from lora_embed.model.encoder import Description
from lora_embed.progress import say
from lora_embed.schema import Block, ChunkStats, Layout, WorkItem, encoder_path
from lora_embed.storage import Store
from lora_embed.write import WriteParts

MAX_BLOCKS = 2000  # of one Dataset, a wave
BLOCK_BYTES, BLOCK_ITEMS = 32 * 2**20, 64  # what small shards are put together to
BLOCKS_PER_ACTOR = 8  # at least, where there are shards enough, so that none waits long for the last
MAX_RETRIES = 3  # of a task whose process died; Ray Data's default is for ever
JOINING_S, SCALING_S = 60.0, 1800.0  # how long a GPU is waited for, by default, where nodes join and where they are added
MANY_NODES = 1_000_000  # an autoscaler without a limit
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the chain lies on the cluster: Ray's arguments for its three stages, and for a task on an actor's device."""

    decode: dict[str, Any] | None  # None: the embedding actors decode and write
    embed: dict[str, Any]
    write: dict[str, Any]
    device: dict[str, Any]
    actors: int  # that embed


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all chunks of a run share."""

    input_options: dict[str, Any]
    store: Store
    encoder: Description
    layout: Layout


def embed_items(items: list[WorkItem], job: Job, topology: Topology) -> Iterator[ChunkStats]:
    """Embed work items in waves; yields what became of each chunk. Raises as `embed_blocks` does."""
    blocks = plan_blocks(items, topology.actors)
    for start in range(0, len(blocks), MAX_BLOCKS):
        yield from embed_blocks(blocks[start : start + MAX_BLOCKS], job, topology)


def plan_blocks(items: list[WorkItem], actors: int) -> list[Block]:
    """One large item to a block, or several small ones in their order, but blocks enough for all actors."""
    most = max(1, min(BLOCK_ITEMS, len(items) // (actors * BLOCKS_PER_ACTOR)))
    blocks: list[list[WorkItem]] = []
    size = 0
    for item in items:
        if not blocks or len(blocks[-1]) >= most or size + item.shard.size > BLOCK_BYTES:
            blocks.append([])
            size = 0
        blocks[-1].append(item)
        size += item.shard.size
    return [Block(items=tuple(block)) for block in blocks]


def embed_blocks(blocks: list[Block], job: Job, topology: Topology) -> Iterator[ChunkStats]:
    """The chain: blocks of work items → decoded chunks → vectors → committed parts.

    One row is one chunk and goes alone (`batch_size=1`), so that chunks stay whole and inside one shard.
    Raises EncoderError when an actor does not reproduce the golden vectors, WorkersLost when Ray gives up.
    """
    encoder_uri = f"{job.store.uri}/{encoder_path(job.encoder.space_id)}"
    decoding = (job.layout, job.encoder.preprocessing, job.input_options)
    embedding = (encoder_uri, job.store.options, job.layout)
    writing = (job.store, job.encoder.space_id, job.layout)

    rows: Any = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=len(blocks))
    if topology.decode is None:
        whole = (embedding, job.input_options, writing, choose_decoder)
        rows = rows.map_batches(EmbedShards, batch_size=1, fn_constructor_args=whole, **topology.embed)
    else:
        rows = rows.map_batches(_decode, batch_size=1, fn_args=decoding, **topology.decode)
        rows = rows.map_batches(EmbedImages, batch_size=1, fn_constructor_args=embedding, **topology.embed)
        rows = rows.map_batches(WriteParts, batch_size=1, fn_constructor_args=writing, **topology.write)

    with _own_errors():
        for row in rows.iter_rows():
            yield ChunkStats.from_json(row["stats"])


def _decode(batch: dict[str, Any], *decoding: Any) -> Iterator[dict[str, Any]]:
    with choose_decoder() as decode:
        yield from decode_items(batch, *decoding, decode=decode)


@contextlib.contextmanager
def choose_decoder() -> Iterator[Decode]:
    """How images are decoded in this task: a task whose process died before decodes in a child process.

    If an image killed it, that image is the child's end and no longer the worker's.
    """
    worker: Any = ray._private.worker.global_worker  # Ray has no public way to ask for the attempt
    if worker.core_worker.get_current_task_attempt_number() == 0:
        yield decode_image
        return
    with IsolatedDecoder() as decode:
        yield decode


def choose_topology(resources: Resources) -> Topology:
    """Lay the chain out by what the cluster has or its autoscaler may add, never by the driver's own devices.

    With GPUs: an actor on each, decoding on the CPUs, and writers that hold no CPU, so that a decode task which waits
    for room downstream never waits for itself. Without: one actor per CPU does it all: no transfer, every core busy.
    Raises ResourcesError for what this cluster can never schedule, or has not got within `wait_s`.
    """
    on_gpu = resources.device == "gpu" or (resources.device == "auto" and cluster_capacity().gpus >= 1)
    device = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": resources.cpus_per_decode}
    if on_gpu:
        _wait_for("GPU", 1.0, resources)
    _wait_for("CPU", resources.cpus_per_decode, resources)
    could = cluster_capacity()
    room = int(could.gpus) if on_gpu else int(could.cpus / resources.cpus_per_decode)
    least, most = resources.actors.min or 1, resources.actors.max or room
    if least > room or least > most:
        raise ResourcesError(
            f"resources.actors asks for at least {least} and at most {most} actors, but the cluster has room for {room} "
            f"({could.gpus:g} GPUs, {could.cpus:g} CPUs); lower the minimum, or start a larger cluster"
        )
    actors = min(most, room)
    starts_full = resources.actors.min is None and not could.grows
    pool = ActorPoolStrategy(min_size=actors if starts_full else least, max_size=actors)
    restarts = {"max_restarts": MAX_RETRIES, "max_task_retries": MAX_RETRIES}
    return Topology(
        decode={"num_cpus": resources.cpus_per_decode, "max_retries": MAX_RETRIES} if on_gpu else None,
        embed=device | restarts | {"compute": pool},
        write={"num_cpus": 0, "compute": ActorPoolStrategy(size=max(1, actors // 2))} | restarts,
        device=device,
        actors=actors,
    )


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a cluster has, or by its autoscaler may come to have."""

    nodes: int
    cpus: float
    gpus: float
    grows: bool


def cluster_capacity() -> Capacity:
    """Asked of the cluster, its autoscaler's node types included."""
    alive, groups = _alive_nodes(), _node_groups()
    return Capacity(
        nodes=max(len(alive), sum(most for most, _ in groups)),
        cpus=max(_sum(alive, "CPU"), sum(most * node.get("CPU", 0.0) for most, node in groups)),
        gpus=max(_sum(alive, "GPU"), sum(most * node.get("GPU", 0.0) for most, node in groups)),
        grows=bool(groups),
    )


def _alive_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _node_groups() -> list[tuple[int, dict[str, float]]]:
    """The autoscaler's node types: how many there may be, and what one has; none where there is no autoscaler."""
    config = ray._private.state.state.get_cluster_config()  # as Ray's own libraries ask; there is no public way
    groups = config.node_group_configs if config is not None else []
    return [(MANY_NODES if g.max_count < 0 else g.max_count, dict(g.resources)) for g in groups if g.max_count]


def _sum(nodes: list[dict[str, float]], resource: str) -> float:
    return sum(node.get(resource, 0.0) for node in nodes)


def _wait_for(resource: str, amount: float, resources: Resources) -> None:
    """Wait until a node has this much, which the autoscaler is asked for if it can add such a node.

    Raises ResourcesError when it is not there in time: at once where no node can come.
    """
    started = time.monotonic()
    could_come = any(node.get(resource, 0.0) >= amount for _, node in _node_groups())
    default_s = SCALING_S if could_come else JOINING_S if resource == "GPU" and "RAY_ADDRESS" in os.environ else 0.0
    limit_s = default_s if resources.wait_s is None else resources.wait_s
    asked = False
    while (largest := max((node.get(resource, 0.0) for node in _alive_nodes()), default=0.0)) < amount:
        waited = time.monotonic() - started
        if waited >= limit_s:
            raise ResourcesError(_lacking(resource, amount, largest, waited))
        if could_come and not asked:
            say(f"waiting for a node with {amount:g} {resource}, up to {limit_s:g} s")
            request_resources(bundles=[{resource: amount}])
            asked = True
        time.sleep(1.0)
    if asked:
        request_resources(bundles=[])  # from now on the actors themselves hold it


def _lacking(resource: str, amount: float, largest: float, waited: float) -> str:
    after = f" after {waited:.0f} s" if waited >= 1 else ""
    if resource == "GPU":
        return (
            f"resources.device is gpu, but the cluster has none{after} (it has {_sum(_alive_nodes(), 'CPU'):g} CPUs); start "
            "GPU workers, or set device to cpu"
        )
    return (
        f"resources.cpus_per_decode is {amount:g}, but the largest node of the cluster has {largest:g} CPUs{after}; set it "
        "lower, or start the cluster with larger nodes"
    )


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
    slots = max(1, int(cluster_capacity().cpus))
    size = max(1, min(BLOCK_ITEMS, len(arguments) // (slots * BLOCKS_PER_ACTOR)))
    groups = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    remote: Any = ray.remote(_each).options(num_cpus=1, max_retries=MAX_RETRIES)
    results: dict[int, list[R]] = {}
    pending: dict[Any, int] = {}
    queue = iter(enumerate(groups))
    with _own_errors():
        while len(results) < len(groups):
            while len(pending) < 2 * slots and (following := next(queue, None)) is not None:
                pending[remote.remote(task, shared, following[1])] = following[0]
            ready, _ = ray.wait(list(pending))
            for reference in ready:
                results[pending.pop(reference)] = ray.get(reference)
    return [result for number in range(len(groups)) for result in results[number]]


def _each(task: Callable[..., R], shared: tuple[Any, ...], group: list[Any]) -> list[R]:
    return [task(*shared, argument) for argument in group]


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Bring an error of this package back out of Ray's wrappers; anything else of Ray's ends the run with its cause."""
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        own = _find_own(error)
        if own is not None:
            raise own from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise WorkersLost(
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
