"""The Ray cluster: joining one, what it has or may come to have, and how the chain lies on it."""

import logging
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.autoscaler.sdk import request_resources
from ray.data import ActorPoolStrategy
from ray.util.metrics import Counter, Gauge

from lora_embed.chain import ray_private
from lora_embed.config.models import Resources
from lora_embed.errors import IncompleteRun, LibraryMismatch, ResourcesError
from lora_embed.monitor.ending import at_end
from lora_embed.monitor.progress import say
from lora_embed.monitor.stages import Workers

MAX_RETRIES = 3  # of a task whose process died; Ray Data's default is for ever
METRICS_PORT = "LORA_EMBED_METRICS_PORT"  # the environment's word for the port of a cluster that is started here
# How long a node is waited for, by default: for a GPU that may be there, for what must be there, for one that is started.
ASKING_S, JOINING_S, SCALING_S = 20.0, 60.0, 1800.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the chain lies on the cluster: Ray's arguments for its three stages, and for a task on an actor's device."""

    decode: dict[str, Any] | None  # None: the embedding actors decode and write
    embed: dict[str, Any]
    write: dict[str, Any]
    device: dict[str, Any]
    workers: Workers

    @property
    def kind(self) -> str:
        """The device that actors compute on, as torch names it. Ray does not hide GPUs from those that hold none."""
        return "cuda" if self.device.get("num_gpus") else "cpu"


def connect(num_cpus: int | None = None, num_gpus: int | None = None) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that ends with this process.

    The numbers are what a cluster started here declares, by default what the machine has. A joined cluster's nodes need
    the dependencies alone: this package goes to them as it is here.
    Raises ResourcesError for a cluster that cannot be joined or started.
    """
    if ray.is_initialized():
        return
    at_end(leave)
    address = _address()
    is_own = address == "local"
    _check_reachable(address)
    declared: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    quietly: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if is_own:
            ray_private.start_here(metrics_port=_metrics_port(), **declared, **quietly)
        else:
            package = {"py_modules": [str(Path(__file__).parents[1])]}
            ray_private.join(address, runtime_env=package, **declared, **quietly)
    except LibraryMismatch:
        raise
    except Exception as error:  # Ray raises no other when its processes do not come up
        if is_own:
            raise IncompleteRun(
                f"Ray could not be started on this machine: {_line(error)}. Nothing was embedded yet: free memory, disk or "
                "CPU here, and run the same command again. Its own words are in the newest ray-… in /tmp or RAY_TMPDIR."
            ) from None
        if not isinstance(error, ConnectionError | RuntimeError | ValueError | ray.exceptions.AuthenticationError):
            raise
        text = _line(error)
        reason = re.sub(r"{.*}", "…", text)  # environments that do not fit together, secrets and all
        raise ResourcesError(
            f"the Ray cluster at {address} cannot be joined: {reason}. Correct RAY_ADDRESS, give the cluster's token "
            "(RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to run on this machine alone."
        ) from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it prints the tracebacks of what is raised anyway
    ray_private.log_messages()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", error)).split()).rstrip(".")


def leave(failed: bool) -> None:
    """End what this process has of Ray. A Ray that was started here leaves its folder of logs only where the run failed.

    Ray itself never removes it: a night each would fill the disk of temporary files.
    """
    ray.shutdown()
    if not failed:
        ray_private.remove_folders()


def _metrics_port() -> int | None:
    """Where Prometheus looks, by the environment; None for any port, also where that one is taken."""
    port = os.environ.get(METRICS_PORT, "")
    if not port:
        return None
    try:
        if not re.fullmatch("[0-9]{1,5}", port):
            raise OSError("it is no port")
        socket.create_server(("127.0.0.1", int(port))).close()
    except (OSError, OverflowError) as error:  # beyond 65535
        say(f"{METRICS_PORT} is {port}, which cannot be had ({error}): this run's metrics are at another port", level="warning")
        return None
    return int(port)


def say_where_metrics_are() -> None:
    """The metrics endpoint of this process's node."""
    here = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    for node in ray.nodes() if here is not None else ():
        if node["NodeID"] == here and node.get("MetricsExportPort", 0) > 0:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            say(f"metrics: {url}", event="metrics", url=url)


def counter(name: str, help_: str, tags: tuple[str, ...]) -> Any:
    """A counter on the metrics endpoint of this process's node."""
    return Counter(name, description=help_, tag_keys=tags)


def gauge(name: str, help_: str, tags: tuple[str, ...]) -> Any:
    """A gauge there; Ray drops it some seconds after this process's end."""
    return Gauge(name, description=help_, tag_keys=tags)


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
    """Lay the chain out by what the cluster has or its autoscaler adds, never by the driver's own devices.

    With GPUs: an actor on each, decoding on the CPUs, and writers that hold no CPU, so that a decode task which waits
    for room downstream never waits for itself. Without: one actor per CPU does it all: no transfer, every core busy.
    A cluster may grow to `actors.max`. Raises ResourcesError for what it can never schedule, or not within `wait_s`.
    """
    on_gpu = resources.device != "cpu" and _wait_for("GPU", 1.0, resources)
    device = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": resources.cpus_per_decode}
    _wait_for("CPU", resources.cpus_per_decode, resources)
    has = ray.cluster_resources()
    room = int(has.get("GPU", 0)) if on_gpu else int(has.get("CPU", 0) / resources.cpus_per_decode)
    least, most = resources.actors.min, resources.actors.max or max(room, resources.actors.min or 1)
    may_grow = _is_joined() and resources.actors.max is not None
    if not may_grow and (least or 1) > room:
        raise ResourcesError(
            f"resources.actors asks for at least {least or 1} actors, but the cluster has room for {room} "
            f"({has.get('GPU', 0):g} GPUs, {has.get('CPU', 0):g} CPUs); lower the minimum, or start a larger cluster"
        )
    actors = most if may_grow else min(most, room)
    pool = ActorPoolStrategy(min_size=least or min(actors, room), max_size=actors)
    restarts = {"max_restarts": MAX_RETRIES, "max_task_retries": MAX_RETRIES}
    return Topology(
        decode={"num_cpus": resources.cpus_per_decode, "max_retries": MAX_RETRIES} if on_gpu else None,
        embed=device | restarts | {"compute": pool},
        write={"num_cpus": 0, "compute": ActorPoolStrategy(size=actors)} | restarts,
        device=device,
        workers=Workers(
            actors=actors,
            decoders=max(1, int(has.get("CPU", 0) / resources.cpus_per_decode)) if on_gpu else 0,
            cpus_per_decoder=resources.cpus_per_decode,
        ),
    )


def count_nodes() -> int:
    """Nodes that are there now."""
    return len(_nodes())


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _is_joined() -> bool:
    return _address() != "local"


def _address() -> str:
    """Of the cluster to join; an empty RAY_ADDRESS is none, as everywhere in an environment."""
    return os.environ.get("RAY_ADDRESS") or "local"


def _wait_for(resource: str, amount: float, resources: Resources) -> bool:
    """Wait until a node has this much of a resource; a cluster that was joined is asked to add one.

    Ray does not tell which nodes its autoscaler could add; whether it starts any when it is asked is all there is to
    see. False for a GPU that is not there and not demanded. Raises ResourcesError when the time is up.
    """
    started, asked, grows = time.monotonic(), False, False
    is_optional = resource == "GPU" and resources.device == "auto"
    try:
        while (largest := max((node.get(resource, 0.0) for node in _nodes()), default=0.0)) < amount:
            waited = time.monotonic() - started
            grows = grows or (asked and ray_private.is_adding_nodes())
            limit_s = SCALING_S if grows else ASKING_S if is_optional else JOINING_S
            if resources.wait_s is not None and (grows or not is_optional):
                limit_s = resources.wait_s
            if waited >= limit_s or not _is_joined():
                if is_optional and not grows:
                    return False
                raise ResourcesError(_lacking(resource, amount, largest, waited, resources.device))
            if not asked:
                say(f"asking the cluster for a node with {amount:g} {resource}")
                request_resources(bundles=[{resource: amount}])
                asked = True
            time.sleep(1.0)
    finally:
        if asked:
            request_resources(bundles=[])  # from now on the actors themselves hold it
    return True


def _lacking(resource: str, amount: float, largest: float, waited: float, device: str) -> str:
    after = f" after {waited:.0f} s" if waited >= 1 else ""
    cpus = sum(node.get("CPU", 0.0) for node in _nodes())
    if resource == "GPU":
        return (
            f"resources.device is {device}, but the cluster has none{after} (it has {cpus:g} "
            "CPUs); start GPU workers, or set device to cpu"
        )
    return (
        f"resources.cpus_per_decode is {amount:g}, but the largest node of the cluster has {largest:g} CPUs{after}; set it "
        "lower, or start the cluster with larger nodes"
    )
