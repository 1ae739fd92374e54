"""The Ray cluster: join or start one, wait for its resources, and decide how the chain is laid out on it."""

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
from ray.util.metrics import Counter, Gauge

from lora_embed.chain import ray_private
from lora_embed.config.models import Resources
from lora_embed.errors import IncompleteRun, LibraryMismatch, ResourcesError
from lora_embed.monitor.ending import at_end
from lora_embed.monitor.progress import say
from lora_embed.monitor.stages import Workers
from lora_embed.text import number_of

MAX_RETRIES = 3  # of a task whose process died; Ray Data by default retries without end
METRICS_PORT = "LORA_EMBED_METRICS_PORT"  # environment variable: the metrics port of a cluster that is started here
# How long to wait for a node by default: for an optional GPU, for a required resource, for a node that is being started.
ASKING_S, JOINING_S, SCALING_S = 20.0, 60.0, 1800.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the chain is laid out: Ray's arguments for its three stages, and for a task that runs on an actor's device."""

    decode: dict[str, Any] | None  # None: the embedding actors decode and write
    embed: dict[str, Any]
    write: dict[str, Any]
    device: dict[str, Any]
    workers: Workers

    @property
    def kind(self) -> str:
        """The device that actors compute on, as torch names it. It is passed on, since Ray shows GPUs to all processes."""
        return "cuda" if self.device.get("num_gpus") else "cpu"


def connect(num_cpus: int | None = None, num_gpus: int | None = None) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that ends with this process.

    The numbers are the resources of a cluster that is started here, by default those of the machine. Nodes of a joined
    cluster need only the dependencies: this package is copied to them.
    Raises ResourcesError for a cluster that cannot be joined, IncompleteRun for one that cannot be started.
    """
    at_end(leave)
    if ray.is_initialized():
        return
    address = _address()
    starts_here = address == "local"
    _check_reachable(address)
    declared: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    quietly: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if starts_here:
            ray_private.start_here(metrics_port=_metrics_port(), **declared, **quietly)
        else:
            package = {"py_modules": [str(Path(__file__).parents[1])]}
            ray_private.join(address, runtime_env=package, **declared, **quietly)
    except LibraryMismatch:
        raise
    except Exception as error:  # Ray raises plain Exception if its processes do not start
        if starts_here:
            raise IncompleteRun(
                f"Ray could not be started on this machine: {_line(error)}. Nothing was embedded yet. Free memory, disk or "
                "CPU here, and run the same command again. Ray's logs are in the newest folder ray-… of /tmp or RAY_TMPDIR."
            ) from None
        if not isinstance(error, ConnectionError | RuntimeError | ValueError | ray.exceptions.AuthenticationError):
            raise
        text = _line(error)
        reason = re.sub(r"{.*}", "…", text)  # Ray may print two environments that do not match, with their secrets
        raise ResourcesError(
            f"the Ray cluster at {address} cannot be joined: {reason}. Correct RAY_ADDRESS, give the cluster's token "
            "(RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to run on this machine alone."
        ) from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # else it prints tracebacks of errors that are raised anyway
    warnings.filterwarnings("ignore", r"The (minimum|maximum) number of concurrent")  # of Ray Data, where shards are few
    ray_private.log_messages()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", error)).split()).rstrip(".")


def leave(failed: bool) -> None:
    """Leave the cluster. If Ray was started here and the run succeeded, its folder of logs is removed.

    Ray itself never removes the folder, so nightly runs would fill the disk of temporary files.
    """
    ray.shutdown()
    if not failed:
        ray_private.remove_folders()


def _metrics_port() -> int | None:
    """The metrics port that the environment names; None for any free port, also if the named port is in use."""
    port = os.environ.get(METRICS_PORT, "")
    if not port:
        return None
    try:
        if not re.fullmatch("[0-9]{1,5}", port):
            raise OSError("not a port number")
        socket.create_server(("127.0.0.1", int(port))).close()
    except (OSError, OverflowError) as error:  # beyond 65535
        say(f"{METRICS_PORT} is {port}, which cannot be used ({error}); using another port for metrics", level="warning")
        return None
    return int(port)


def say_where_metrics_are() -> None:
    """Log the URL of the metrics endpoint of this process's node."""
    own_node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    for node in ray.nodes() if own_node is not None else ():
        if node["NodeID"] == own_node and node.get("MetricsExportPort", 0) > 0:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            say(f"metrics: {url}", event="metrics", url=url)


def counter(name: str, help_: str, tags: tuple[str, ...]) -> Any:
    """A counter on the metrics endpoint of this process's node."""
    return Counter(name, description=help_, tag_keys=tags)


def gauge(name: str, help_: str, tags: tuple[str, ...]) -> Any:
    """A gauge on the same endpoint; Ray drops it some seconds after this process ends."""
    return Gauge(name, description=help_, tag_keys=tags)


def _check_reachable(address: str) -> None:
    """Raises ResourcesError at once if nothing listens at the address; Ray itself would retry for minutes."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise ResourcesError(
            f"RAY_ADDRESS is {address}, but no cluster answers there ({error}). Start the cluster, correct RAY_ADDRESS, or "
            "unset it to run on this machine alone."
        ) from None


def choose_topology(resources: Resources) -> Topology:
    """Lay out the chain by the resources that the cluster has or its autoscaler adds, not by the driver's own devices.

    With GPUs: one actor on each, decode tasks on the CPUs, and writers that hold no CPU, so that writing never has to wait
    for a CPU that a decode task holds. Without GPUs: one actor per CPU does everything, so that pixels are never sent and
    every core is busy. A cluster may grow to `actors.max`. Raises ResourcesError for resources that the cluster can never
    provide, or not within `wait_s`.
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
            f"resources.actors needs at least {number_of(least or 1, 'actor')}, but the cluster has room for {room} "
            f"({number_of(has.get('GPU', 0), 'GPU')}, {number_of(has.get('CPU', 0), 'CPU')}). Set resources.actors.min lower, "
            "or start a larger "
            "cluster."
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
    """Number of live nodes."""
    return len(_nodes())


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _is_joined() -> bool:
    return _address() != "local"


def _address() -> str:
    """The address of the cluster to join, or "local". An empty RAY_ADDRESS counts as not set."""
    return os.environ.get("RAY_ADDRESS") or "local"


def _wait_for(resource: str, amount: float, resources: Resources) -> bool:
    """Wait until a node has this much of a resource; a joined cluster is asked to add a node.

    Ray does not say which nodes its autoscaler could add, so the only sign is whether it starts one after the request.
    False if there is no GPU and none is required. Raises ResourcesError when the time is up.
    """
    started, has_requested, grows = time.monotonic(), False, False
    is_optional = resource == "GPU" and resources.device == "auto"
    try:
        while (largest := max((node.get(resource, 0.0) for node in _nodes()), default=0.0)) < amount:
            waited = time.monotonic() - started
            grows = grows or (has_requested and ray_private.is_adding_nodes())
            limit_s = SCALING_S if grows else ASKING_S if is_optional else JOINING_S
            if resources.wait_s is not None and (grows or not is_optional):
                limit_s = resources.wait_s
            if waited >= limit_s or not _is_joined():
                if is_optional and not grows:
                    return False
                raise ResourcesError(_lacking(resource, amount, largest, waited, resources.device))
            if not has_requested:
                say(f"asking the cluster for a node with {amount:g} {resource}")
                request_resources(bundles=[{resource: amount}])
                has_requested = True
            time.sleep(1.0)
    finally:
        if has_requested:
            request_resources(bundles=[])  # from now on, the actors' own requests count
    return True


def _lacking(resource: str, amount: float, largest: float, waited: float, device: str) -> str:
    after = f" after {waited:.0f} s" if waited >= 1 else ""
    cpus = sum(node.get("CPU", 0.0) for node in _nodes())
    if resource == "GPU":
        return (
            f"resources.device is {device}, but the cluster has no GPU{after}; it has {number_of(cpus, 'CPU')}. Start GPU "
            "workers, or "
            "set resources.device to cpu."
        )
    return (
        f"resources.cpus_per_decode is {amount:g}, but the largest node of the cluster has "
        f"{number_of(largest, 'CPU')}{after}. Set it "
        "lower, or start the cluster with larger nodes."
    )
