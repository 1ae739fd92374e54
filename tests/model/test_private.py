"""What is private of libraries: taken away or changed, one message says so; as it is, it does what it is used for."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from fsspec.asyn import AsyncFileSystem

from jobs import ROOT, tiny_recipe, write_job, write_tars
from lora_embed.chain.cluster import MAX_RETRIES
from lora_embed.errors import LibraryMismatch
from lora_embed.libraries import part
from lora_embed.model import transformers_private
from lora_embed.model.base_config import read_model_config
from lora_embed.model.torch_private import is_out_of_memory
from lora_embed.store import remote
from lora_embed.store.retry import is_refused_create
from lora_embed.store.store import Store
from models import save_base
from s3 import Faults, Proxy, Refusal, S3Server

PACKAGE = ROOT / "src" / "lora_embed"
GONE = object()
RAY = ("ray", "chain/ray_private.py")
FSSPEC = ("fsspec", "store/remote.py")
CHANGED = {  # what a newer version may do → package, module that notices, what becomes what, and what the message says
    "the constant goes": (*RAY, "ray._private.ray_constants", "ENABLE_RAY_CLUSTER", GONE, "is not there"),
    "printing goes": (*RAY, "ray._private.worker", "print_to_stdstream", GONE, "is not there"),
    "printing takes another": (
        *RAY, "ray._private.worker", "print_to_stdstream", lambda data: None, "does not take ignore_prefix",
    ),
    "the worker goes": (*RAY, "ray._private.worker", "global_worker", GONE, "is not there"),
    "attempts go": (*RAY, "ray._raylet", "CoreWorker", object, "task_attempt_number is not there"),
    "the autoscaler's status goes": (*RAY, "ray.autoscaler.v2.sdk", "get_cluster_status", GONE, "is not there"),
    "it tells less": (
        *RAY, "ray.autoscaler.v2.schema", "ClusterStatus", lambda pending_nodes: None,
        "does not take pending_launches",
    ),
    "limits to retries go": (
        *RAY, "ray.data", "Dataset.map_batches_internal",
        lambda fn, batch_size, compute, fn_args, fn_constructor_args, num_cpus, num_gpus: None, "does not take ray_remote_args",
    ),
    "the metrics port goes": (*RAY, "ray", "init", lambda **kwargs: None, "does not take _metrics_export_port"),
    "the folder goes": (
        *RAY, "ray", "init", lambda **kwargs: kwargs.pop("_metrics_export_port"), "does not take _temp_dir",
    ),
    "listing goes": (*FSSPEC, "fsspec.asyn", "AsyncFileSystem._find", GONE, "is not there"),
    "uploads have no limit": (*FSSPEC, "fsspec.asyn", "sync", lambda loop, func: None, "does not take timeout"),
    "targets match otherwise": (
        "peft", "model/peft_private.py", "peft.tuners.tuners_utils", "check_target_module_exists", lambda config, key: True,
        "its rules find other modules",
    ),
    "ranks match otherwise": (
        "peft", "model/peft_private.py", "peft.utils.other", "get_pattern_key", lambda pattern_keys, key_to_match: "",
        "its rules find other modules",
    ),
    "PEFT's rules go": (
        "peft", "model/peft_private.py", "peft.tuners.tuners_utils", "check_target_module_exists", GONE, "is not there",
    ),
    "families have other names": (
        "transformers", "model/transformers_private.py", "transformers.models.auto.configuration_auto",
        "model_type_to_module_name", lambda key: key, "model_type_to_module_name of clip_vision_model is not clip",
    ),
}  # fmt: skip


def change(monkeypatch: pytest.MonkeyPatch, module: str, name: str, becomes: Any) -> None:
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    monkeypatch.delattr(owner, last) if becomes is GONE else monkeypatch.setattr(owner, last, becomes)


@pytest.mark.parametrize("case", CHANGED)
def test_what_has_changed_is_one_message(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, noticed_by, module, name, becomes, finding = CHANGED[case]
    change(monkeypatch, module, name, becomes)
    said = (
        rf"^{package} {re.escape(version(package))} does not fit this version of lora-embed: .*{re.escape(finding)}.*, and it "
        rf"is needed to .*\. Known to work: {package}.*>=.*\. Install that, or a newer lora-embed\.$"
    )
    with pytest.raises(LibraryMismatch, match=said):
        runpy.run_path(str(PACKAGE / noticed_by))


@pytest.mark.parametrize("noticed_by", sorted({case[1] for case in CHANGED.values()}))
def test_what_is_installed_fits(noticed_by: str) -> None:
    runpy.run_path(str(PACKAGE / noticed_by))


def test_a_package_without_its_requirements_names_the_file_of_exact_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster's nodes, which have the source alone."""
    monkeypatch.setattr("lora_embed.libraries.requires", lambda package: None)
    said = r"Known to work: the version of ray in constraints.txt of lora-embed\. Install that, or a newer lora-embed\.$"
    with pytest.raises(LibraryMismatch, match=said):
        part("ray", "ray:no_such_thing", "show this")


COMMAND = """
import sys
import ray._private.ray_constants as constants
del constants.ENABLE_RAY_CLUSTER
from lora_embed.cli.main import main
sys.argv = ["lora-embed", *sys.argv[1:]]
main()
"""


def test_a_command_says_it_before_anything_is_written(tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_recipe(tmp_path), write_tars(tmp_path / "shards", shards=1, images=2))
    command = [sys.executable, "-c", COMMAND, "run", str(job)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert ended.stderr.startswith(f"error: ray {version('ray')} does not fit this version of lora-embed: ")
    assert not (tmp_path / "table").exists()


# A Ray of its own with a GPU that is declared, so that decoding, embedding and writing are each a stage of their own.
RETRIES = """
import json, os, signal, sys, warnings
from pathlib import Path
import ray, ray.data
from ray.util.annotations import RayDeprecationWarning
warnings.simplefilter("error", RayDeprecationWarning)
from lora_embed.chain import cluster
from lora_embed.chain import ray_private
from lora_embed.config.models import Resources
from lora_embed.chain.pipeline import _package_errors
from lora_embed.errors import WorkersLost

folder = Path(sys.argv[1])

def die(batch, stage):
    with (folder / stage).open("a") as file:
        file.write(f"{ray_private.was_tried_before():d}")
    os.kill(os.getpid(), signal.SIGKILL)

class Die:
    def __init__(self, stage):
        self.stage = stage

    def __call__(self, batch):  # a generator, as those of actors that decode are
        die(batch, self.stage)
        yield batch

cluster.connect(num_cpus=2, num_gpus=1)
here = ray.get_runtime_context()
found = {"session": (Path(here.get_temp_dir()) / here.get_session_name() / "logs").is_dir()}
found["grows"] = ray_private.is_adding_nodes()
topology = cluster.choose_topology(Resources())
rows = lambda: ray.data.from_items([{"row": 1}], override_num_blocks=1)
stages = {
    "decode": lambda: ray_private.map_rows(rows(), die, fn_args=("decode",), **topology.decode),
    "embed": lambda: ray_private.map_rows(rows(), Die, fn_constructor_args=("embed",), **topology.embed),
    "write": lambda: ray_private.map_rows(rows(), Die, fn_constructor_args=("write",), **topology.write),
}
for stage, mapped in stages.items():
    try:
        with _package_errors():
            list(mapped().iter_rows())
    except WorkersLost as error:
        found[stage] = (folder / stage).read_text()
print(json.dumps(found))
cluster.leave(failed=False)
"""


def child(code: str, *arguments: str, limit_s: float = 400, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *arguments]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True, env=variables, cwd=ROOT)


@pytest.mark.long
def test_ray_tries_again_as_often_as_it_is_told_and_tells_that_it_does(tmp_path: Path) -> None:
    """Of a task or an actor's call whose process dies; and nothing of it goes to stdout, or is deprecated."""
    ended = child(RETRIES, str(tmp_path))
    tries = "0" + "1" * MAX_RETRIES
    assert json.loads(ended.stdout) == {"session": True, "grows": False, "decode": tries, "embed": tries, "write": tries}
    assert "Ray: Task " in ended.stderr
    assert "Traceback" not in ended.stderr


OUT_OF_MEMORY = """
import json, sys, time
from pathlib import Path
import ray
from lora_embed.chain import cluster
from lora_embed.errors import WorkersLost
from lora_embed.chain.pipeline import _package_errors

folder = Path(sys.argv[1])

def wait(name):
    with (folder / name).open("a") as file:
        file.write("x")
    time.sleep(600)

class Wait:
    def call(self, name):
        wait(name)

cluster.connect(num_cpus=1)
task = ray.remote(wait).options(max_retries=cluster.MAX_RETRIES)
actor = ray.remote(Wait).options(max_restarts=1, max_task_retries=1).remote()
found = {}
for name, begin in {"task": task.remote, "actor": actor.call.remote}.items():
    try:
        with _package_errors():
            ray.get(begin(name))
    except WorkersLost as error:
        found[name] = [(folder / name).read_text() if (folder / name).exists() else "", str(error)]
print(json.dumps(found))
"""


@pytest.mark.long
def test_ray_knows_the_limit_to_retries_for_want_of_memory(tmp_path: Path) -> None:
    """Its memory monitor ends every worker here; without the limit, which the environment sets, that went on for ever."""
    settings = {
        "RAY_task_oom_retries": "1",
        "RAY_memory_usage_threshold": "0.0001",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    ended = child(OUT_OF_MEMORY, str(tmp_path), **settings)
    found = json.loads(ended.stdout)
    assert set(found) == {"task", "actor"}
    assert len(found["task"][0]) <= 2
    for _, said in found.values():
        assert said.startswith("Ray gave up the run: a node ran low on memory, so Ray ended workers there")


LISTENING = """
import json, socket
import ray
from lora_embed.chain import cluster
from lora_embed.chain import ray_private
from lora_embed.errors import LibraryMismatch

class Constants:  # as of a Ray that no longer looks at the constant
    ENABLE_RAY_CLUSTER = True

ray_private._constants = Constants
try:
    cluster.connect(num_cpus=1)
except LibraryMismatch as error:
    print(json.dumps([str(error), ray.is_initialized()]))
else:
    print(json.dumps([ray.nodes()[0]["NodeManagerAddress"], True]))
"""


@pytest.mark.slow
def test_a_ray_that_listens_to_others_is_ended() -> None:
    """`test_secrets.py` lists the sockets of one that does not."""
    said, goes_on = json.loads(child(LISTENING).stdout)
    address = ray.util.get_node_ip_address() if not ray.is_initialized() else None
    if address is not None and address.startswith("127."):
        pytest.skip("this machine has no address but the loopback one")
    assert not goes_on, said
    assert re.search(r"it listens at [\d.]+ although ENABLE_RAY_CLUSTER is false, and it is needed to keep a Ray that is", said)


REFUSED = {
    "as AWS says it": Refusal(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
    "in other words": Refusal(412, "PreconditionFailed", "The object exists."),
    "by another code": Refusal(412, "ConditionNotMet", "No."),
    "by its status alone": Refusal(412, "", ""),
}


@pytest.mark.parametrize("refusal", REFUSED)
def test_a_refused_create_is_known_by_its_status_whatever_the_store_says(server: S3Server, refusal: str) -> None:
    with Proxy(server.endpoint, Faults(error=1.0, answer=REFUSED[refusal])) as proxy:
        store = Store("s3://images/refused", server.options(proxy.endpoint) | {"retry_s": 5})
        assert not store.create("a", b"1")
        assert [request.is_conditional for request in proxy.requests] == [True]


def test_s3fs_hands_on_the_status_of_what_a_real_server_refuses(server: S3Server) -> None:
    store = Store("s3://images/handed-on", server.options())
    path = store.full_path("a")
    remote.put(store.filesystem, path, b"1", 15.0, mode="create")
    with pytest.raises(OSError, match=r".") as caught:
        remote.put(store.filesystem, path, b"2", 15.0, mode="create")
    assert is_refused_create(caught.value)
    assert store.read("a") == b"1"
    with pytest.raises(FileNotFoundError) as absent:
        store.filesystem.cat_file(store.full_path("b"))
    assert not is_refused_create(absent.value)


@pytest.mark.parametrize(("name", "becomes"), [("_pipe_file", lambda self, path, value: None), ("retries", GONE)])
def test_an_s3fs_that_would_write_over_what_is_there_is_refused(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str, becomes: Any
) -> None:
    change(monkeypatch, "s3fs", f"S3FileSystem.{name}", becomes)
    monkeypatch.setattr(remote, "_connect_cached", remote._connect_anew)
    with pytest.raises(
        LibraryMismatch, match=rf"^s3fs .*: s3fs:S3FileSystem.{name} (does not take mode|is not there), and it is"
    ):
        Store("s3://images/refused", server.options()).create("a", b"1")


def test_file_systems_that_leave_out_folders_are_told_from_others() -> None:
    assert remote._find_of_fsspec is AsyncFileSystem._find


def test_a_cpu_without_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as lacking:
        torch.empty(2**50)
    with pytest.raises(RuntimeError) as other:
        torch.empty(2) @ torch.empty(3)
    assert [is_out_of_memory(caught.value) for caught in (lacking, other)] == [True, False]
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize(("family", "outer"), [("clip", "CLIPConfig"), ("siglip", "SiglipConfig"), ("vit", None)])
def test_the_dual_encoder_of_a_vision_part(tmp_path: Path, family: str, outer: str | None) -> None:
    found = transformers_private.dual_encoder_of(read_model_config(save_base(tmp_path / "base", family), "base"))
    assert (found.__name__ if found is not None else None) == outer
