"""The parts of Ray that are used but not public, or that Ray may change without notice; checked at import.

Each is to be replaced as soon as Ray has a public way. `tests/model/test_private.py` removes each part in turn, and checks
on a running Ray that it still has its effect.
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
_is_reachable = bool(part("ray", "ray._private.ray_constants:ENABLE_RAY_CLUSTER", _LOOPBACK))  # Ray's own default
_worker: Any = part("ray", "ray._private.worker", _MESSAGES)
part("ray", "ray._private.worker:print_to_stdstream", _MESSAGES, takes=("data", "ignore_prefix"))
part("ray", "ray._private.worker:global_worker", _ATTEMPTS)
part("ray", "ray._raylet:CoreWorker.get_current_task_attempt_number", _ATTEMPTS)
_get_cluster_status = part("ray", "ray.autoscaler.v2.sdk:get_cluster_status", _SCALING, takes=("gcs_address",))
part("ray", "ray.autoscaler.v2.schema:ClusterStatus", _SCALING, takes=("pending_launches", "pending_nodes"))
_ARGUMENTS = ("fn", "batch_size", "compute", "fn_args", "fn_constructor_args", "num_cpus", "num_gpus", "ray_remote_args")
part("ray", "ray.data:Dataset.map_batches_internal", _RETRIES, takes=_ARGUMENTS)
check(  # `init` takes any keyword and compares it with the names it knows, so look for the name in its code
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

LONGEST_ROOT = 25  # characters: a socket's path has at most 107, and Ray's names below the root take most of them
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_folders: list[str] = []  # folders of the Rays that were started here
OOM_RETRIES = 5  # of a task whose process Ray's memory monitor ended, 1 to 16 s apart; Ray by default retries without end
# Environment variables. Ray ignores those that it does not know, so tests check that they still have their effect.
_SETTINGS = {"RAY_task_oom_retries": str(OOM_RETRIES), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def start_here(*, metrics_port: int | None, **arguments: Any) -> None:
    """Start a Ray for this process that listens on the loopback address alone.

    Otherwise, everybody who can reach this machine could run code on it. Ray does so by itself on macOS and Windows, but
    has no public setting for it. If Ray listens elsewhere all the same, it is ended and LibraryMismatch is raised.
    """
    _set_environment()
    _constants.ENABLE_RAY_CLUSTER = False
    _folders.append(_new_folder())
    _set_token(_folders[-1])
    below = os.path.join(_folders[-1], "r")  # a folder below, because Ray lets everybody write to the folder it is given
    ray.init(address="local", include_dashboard=False, _metrics_export_port=metrics_port, _temp_dir=below, **arguments)
    address = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    listens = {address, *(node["NodeManagerAddress"] for node in ray.nodes())}
    if beyond := sorted(ip for ip in listens if not ipaddress.ip_address(ip).is_loopback):
        ray.shutdown()
        raise mismatch("ray", f"it listens at {', '.join(beyond)} although ENABLE_RAY_CLUSTER is false", _LOOPBACK)


def _new_folder() -> str:
    """Make a folder for sockets, logs and spilled objects that only this user can enter; Ray's own would be open to all."""
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(root) > LONGEST_ROOT and "RAY_TMPDIR" not in os.environ:
        root = "/tmp"
    os.makedirs(root, exist_ok=True)
    return tempfile.mkdtemp(prefix="ray-", dir=root)


def _set_token(folder: str) -> None:
    """Make Ray require a token that only this user can read, since other users of the machine reach the loopback address.

    Ray itself would write a token that everybody can read. A token that the environment names is kept.
    """
    if not {"RAY_AUTH_TOKEN", _TOKEN_PATH} & os.environ.keys():
        path = os.path.join(folder, "token")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ[_TOKEN_PATH] = path


def _forget_token() -> None:
    """Unset the token of a Ray that was started here: other Rays do not have it."""
    if os.path.dirname(os.environ.get(_TOKEN_PATH, "")) in _folders:
        del os.environ[_TOKEN_PATH]


def remove_folders() -> None:
    """Remove what Rays that were started here wrote, once they have ended."""
    _forget_token()
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def join(address: str, **arguments: Any) -> None:
    """Join a running cluster; where it listens was decided by whoever started it."""
    _set_environment()
    _forget_token()
    _constants.ENABLE_RAY_CLUSTER = _is_reachable
    ray.init(address=address, **arguments)


def _set_environment() -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def log_messages() -> None:
    """Log Ray's messages about failed tasks and workers, one line each; Ray itself would print them to stdout."""
    _worker.print_to_stdstream = _log


def _log(data: dict[str, Any], ignore_prefix: Any = None, *_: Any, **__: Any) -> None:
    """Log a message without its traceback: the run continues, or ends with an error of its own."""
    for message in data["lines"]:
        headline, _, trace = message.partition("Error: Traceback")
        cause = [line.strip() for line in trace.splitlines() if line.strip()][-1:]
        logging.getLogger(__name__).warning("%s", " ".join(["Ray:", *headline.split(), *cause])[:1000])


def was_tried_before() -> bool:
    """Inside a task: did a process die in an earlier attempt at this task?

    In an actor it works only inside a generator: Ray Data calls other functions in another thread, where Ray does not know
    the task and says that this is the first attempt.
    """
    return bool(_worker.global_worker.core_worker.get_current_task_attempt_number() > 0)


def is_adding_nodes() -> bool:
    """Is the cluster's autoscaler starting nodes?"""
    status = _get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_launches or status.pending_nodes)


def map_rows(rows: Any, function: Any, **arguments: Any) -> Any:
    """`Dataset.map_batches`, one row at a time, with limits to how often Ray retries a task.

    In `map_batches`, Ray deprecates arguments for `ray.remote` (`max_retries`, `max_restarts`, `max_task_retries`) and
    offers no replacement. The function that `map_batches` and Ray's own batch processors call still accepts them.
    """
    return rows.map_batches_internal(function, batch_size=1, **arguments)
