"""The Ray cluster: joining one, what it has or may come to have, and how the chain lies on it."""

import logging
import os
import re
import socket
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.autoscaler.sdk import request_resources
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from lora_embed.config import Resources
from lora_embed.errors import ResourcesError
from lora_embed.progress import say

MAX_RETRIES = 3  # of a task whose process died; Ray Data's default is for ever
JOINING_S, SCALING_S = 60.0, 1800.0  # how long a GPU is waited for, by default, where nodes join and where they are added
MANY_NODES = 1_000_000  # an autoscaler without a limit


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the chain lies on the cluster: Ray's arguments for its three stages, and for a task on an actor's device."""

    decode: dict[str, Any] | None  # None: the embedding actors decode and write
    embed: dict[str, Any]
    write: dict[str, Any]
    device: dict[str, Any]
    actors: int  # that embed


def connect(num_cpus: int | None = None, num_gpus: int | None = None) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that ends with this process.

    The numbers are what a cluster started here declares, by default what the machine has. A joined cluster's nodes need
    the dependencies alone: this package goes to them as it is here.
    Raises ResourcesError for a cluster that cannot be joined.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    is_own = address == "local"
    _check_reachable(address)
    try:
        ray.init(
            address=address,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False if is_own else None,
            runtime_env=None if is_own else {"py_modules": [str(Path(__file__).parent)]},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        if is_own:
            raise
        text = " ".join(str(getattr(error, "message", error)).split()).rstrip(".")
        reason = re.sub(r"{.*}", "…", text)  # environments that do not fit together, secrets and all
        raise ResourcesError(
            f"the Ray cluster at {address} cannot be joined: {reason}. Correct RAY_ADDRESS, give the cluster's token "
            "(RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to run on this machine alone."
        ) from None
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


def was_tried_before() -> bool:
    """Inside a task: did a process die that had it before?"""
    worker: Any = ray._private.worker.global_worker  # Ray has no public way to ask for the attempt
    return bool(worker.core_worker.get_current_task_attempt_number() > 0)
