"""All of Ray that is used and is not public, or that Ray may change without notice; checked when this is imported.

Each part has a public way to be replaced by as soon as Ray has one. `tests/model/test_private.py` takes each away, and shows on
a running Ray that it does what it is used for.
"""

import inspect
import ipaddress
import logging
import os
import secrets
import shutil
import tempfile
from typing import Any

import ray
import ray.data

from lora_embed.libraries import check, mismatch, part

_LOOPBACK = "keep a Ray that is started on this machine from listening to other machines"
_MESSAGES = "keep Ray's messages off stdout, where results go"
_ATTEMPTS = "tell whether a process died over a task, so that the task is then tried in a child process"
_SCALING = "tell whether the cluster's autoscaler is adding nodes"
_RETRIES = "limit how often a task is tried again after its process died"
_METRICS = "serve metrics at the port that LORA_EMBED_METRICS_PORT names"

_constants: Any = part("ray", "ray._private.ray_constants", _LOOPBACK)
_is_reachable = bool(part("ray", "ray._private.ray_constants:ENABLE_RAY_CLUSTER", _LOOPBACK))  # unless told otherwise
_worker: Any = part("ray", "ray._private.worker", _MESSAGES)
part("ray", "ray._private.worker:print_to_stdstream", _MESSAGES, takes=("data", "ignore_prefix"))
part("ray", "ray._private.worker:global_worker", _ATTEMPTS)
part("ray", "ray._raylet:CoreWorker.get_current_task_attempt_number", _ATTEMPTS)
_get_cluster_status = part("ray", "ray.autoscaler.v2.sdk:get_cluster_status", _SCALING, takes=("gcs_address",))
part("ray", "ray.autoscaler.v2.schema:ClusterStatus", _SCALING, takes=("pending_launches", "pending_nodes"))
_ARGUMENTS = ("fn", "batch_size", "compute", "fn_args", "fn_constructor_args", "num_cpus", "num_gpus", "ray_remote_args")
part("ray", "ray.data:Dataset.map_batches_internal", _RETRIES, takes=_ARGUMENTS)
check(  # `init` takes all arguments and refuses by name those that it does not know
    "ray",
    "_metrics_export_port" in inspect.unwrap(ray.init).__code__.co_consts,
    "ray.init does not take _metrics_export_port",
    _METRICS,
)
check(
    "ray",
    "_temp_dir" in inspect.unwrap(ray.init).__code__.co_consts,
    "ray.init does not take _temp_dir",
    "keep what Ray writes from other users of this machine",
)

LONGEST_ROOT = 25  # characters: a socket's path has at most 107, and Ray's names below take most of them
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_folders: list[str] = []  # of the Rays that were started here
OOM_RETRIES = 5  # of a task whose process Ray's memory monitor ended, 1 to 16 s apart; Ray's default is for ever
# Words of the environment. Ray does not complain of one that it no longer knows: tests see that they have their effect.
_SETTINGS = {"RAY_task_oom_retries": str(OOM_RETRIES), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def start_here(*, metrics_port: int | None, **arguments: Any) -> None:
    """`ray.init` of a Ray of this process's own, which listens on the loopback address alone.

    Ray does so by itself on macOS and Windows, and has no public way to be told: else everybody who reaches this machine
    could run code in it. Raises LibraryMismatch, with that Ray ended, should it listen elsewhere all the same.
    """
    _set_environment()
    _constants.ENABLE_RAY_CLUSTER = False
    _folders.append(_new_folder())
    _set_token(_folders[-1])
    below = os.path.join(_folders[-1], "r")  # not that one itself: Ray lets everybody write to what it is given
    ray.init(address="local", include_dashboard=False, _metrics_export_port=metrics_port, _temp_dir=below, **arguments)
    address = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    listens = {address, *(node["NodeManagerAddress"] for node in ray.nodes())}
    if beyond := sorted(ip for ip in listens if not ipaddress.ip_address(ip).is_loopback):
        ray.shutdown()
        raise mismatch("ray", f"it listens at {', '.join(beyond)} whatever ENABLE_RAY_CLUSTER says", _LOOPBACK)


def _new_folder() -> str:
    """For sockets, logs and spilled objects, of this user alone: Ray makes its own so that everybody may write there."""
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(root) > LONGEST_ROOT and "RAY_TMPDIR" not in os.environ:
        root = "/tmp"
    os.makedirs(root, exist_ok=True)
    return tempfile.mkdtemp(prefix="ray-", dir=root)


def _set_token(folder: str) -> None:
    """Other users of this machine reach the loopback address, too; Ray asks for a token, which this user alone may read.

    Ray itself would write one that everybody may read. One that the environment names stays.
    """
    if not {"RAY_AUTH_TOKEN", _TOKEN_PATH} & os.environ.keys():
        path = os.path.join(folder, "token")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ[_TOKEN_PATH] = path


def _forget_token() -> None:
    """No other Ray has the token of one that was started here."""
    if os.path.dirname(os.environ.get(_TOKEN_PATH, "")) in _folders:
        del os.environ[_TOKEN_PATH]


def remove_folders() -> None:
    """What a Ray that was started here wrote, once it has ended."""
    _forget_token()
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def join(address: str, **arguments: Any) -> None:
    """`ray.init` of a cluster that runs already; whoever started it has the say where it listens."""
    _set_environment()
    _forget_token()
    _constants.ENABLE_RAY_CLUSTER = _is_reachable
    ray.init(address=address, **arguments)


def _set_environment() -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def log_messages() -> None:
    """Log what Ray prints of tasks and workers that failed, a line each; Ray itself would print it to stdout."""
    _worker.print_to_stdstream = _log


def _log(data: dict[str, Any], ignore_prefix: Any = None, *_: Any, **__: Any) -> None:
    """Without the traceback: the run goes on, or says why it cannot."""
    for message in data["lines"]:
        said, _, trace = message.partition("Error: Traceback")
        cause = [line.strip() for line in trace.splitlines() if line.strip()][-1:]
        logging.getLogger(__name__).warning("%s", " ".join(["Ray:", *said.split(), *cause])[:1000])


def was_tried_before() -> bool:
    """Inside a task: did a process die that had it before?

    In an actor, for the body of a generator alone: Ray Data calls what is no generator in another thread, where Ray knows
    of no task and answers that this is the first attempt.
    """
    return bool(_worker.global_worker.core_worker.get_current_task_attempt_number() > 0)


def is_adding_nodes() -> bool:
    """Is the autoscaler of the cluster starting nodes?"""
    status = _get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_launches or status.pending_nodes)


def map_rows(rows: Any, function: Any, **arguments: Any) -> Any:
    """`Dataset.map_batches` of one row at a time, with limits to how often Ray tries again.

    Ray deprecates arguments for `ray.remote` (`max_retries`, `max_restarts`, `max_task_retries`) in `map_batches` and offers
    nothing in their place; what `map_batches` itself calls, and Ray's own batch processors too, takes them as before.
    """
    return rows.map_batches_internal(function, batch_size=1, **arguments)
