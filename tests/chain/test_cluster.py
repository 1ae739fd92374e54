"""Clusters of several nodes: one lost and one added under a run, nodes that an autoscaler starts, paths not all see."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

from jobs import kill_all, start_job, tiny_recipe, vectors_by_id, write_job, write_tars
from lora_embed import open_table
from lora_embed.chain import cluster
from lora_embed.errors import IncompleteRun
from lora_embed.model.encoder import load_encoder
from lora_embed.store.store import Store
from s3 import Proxy, Request, S3Server, free_ports
from samples import png

LIMIT_S = 180.0
SHARDS, IMAGES = 30, 20
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
NODES = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
V2 = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server's, set for the nodes that a test starts: workers take their node's environment."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server.environment()


def finish(process: "subprocess.Popen[bytes]", log: Path) -> tuple[int, str]:
    try:
        code = process.wait(LIMIT_S)
    finally:
        kill_all(process) if process.poll() is None else None
    return code, log.read_text()


@pytest.mark.long
def test_a_node_lost_and_one_added_leave_the_same_table(
    tmp_path: Path, server: S3Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tars(tmp_path / "shards", shards=SHARDS, images=IMAGES)
    Store("s3://images", server.options()).filesystem.put(str(source), "images/shards", recursive=True)
    recipe = tiny_recipe(tmp_path)
    job = write_job(tmp_path, recipe, source, input="s3://images/shards", chunk_size=5, resources={})
    with Proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
        parts: list[str] = []
        in_the_middle = threading.Event()

        def count(request: Request) -> None:
            if request.method == "PUT" and "/staging/" in request.path:
                parts.append(request.path)
                time.sleep(0.1)  # so that there is a middle
                if len(parts) >= 20:
                    in_the_middle.set()

        proxy.watch = count
        try:
            local = ["--set", f"table={tmp_path / 'table'}"]
            refused = start_job(job, tmp_path / "refused", *local, RAY_ADDRESS=cluster.address)
            code, said = finish(refused, tmp_path / "refused")
            assert (code, "is a local path, but this cluster has 3 nodes" in said) == (2, True), said
            assert not (tmp_path / "table").exists()

            remote = ["--set", "table=s3://images/table"]
            variables = server.environment(proxy.endpoint)
            process = start_job(job, tmp_path / "log", *remote, RAY_ADDRESS=cluster.address, **variables)
            assert in_the_middle.wait(LIMIT_S), (tmp_path / "log").read_text()
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(num_cpus=1)
            code, said = finish(process, tmp_path / "log")
        finally:
            cluster.shutdown()
    assert code == 0, said
    assert len(parts) > SHARDS * IMAGES // 5, "no chunk was tried again: the node was lost too late"
    opened = open_table("s3://images/table", storage_options=server.options())
    assert opened.manifest.counts == {"shards": 30, "samples": 600, "vectors": 600, "rejects": 0}
    encoder = opened.encoder()
    expected = {
        f"{n // IMAGES:04d}.tar/{n:06d}": encoder.embed([Image.open(io.BytesIO(png(n)))])[0].tobytes()
        for n in range(SHARDS * IMAGES)
    }
    assert vectors_by_id(opened.to_dataset().to_table()) == expected


@contextmanager
def autoscaled_head(folder: Path, node_types: dict[str, dict[str, int]]) -> Iterator[str]:
    """A head without CPUs and Ray's own autoscaler, which starts nodes of these types on this machine; its address."""
    types = {
        name: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 1}
        for name, resources in node_types.items()
    }
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    port = free_ports(1)[0]
    at = {"gcs_address": f"{ray.util.get_node_ip_address()}:{port}"}
    config = {
        "cluster_name": "scaled",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "provider": {"type": "external", "module": NODES, "launch_multiple": True, "head_node_id": HEAD_ID} | at,
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }
    commands = ("setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config |= {f"{name}_commands": [] for name in commands}
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    command += ["--include-dashboard=false", f"--autoscaling-config={folder / 'autoscaling.yaml'}"]
    variables = os.environ | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"} | V2
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        kill_all(head)
        head.wait()


@pytest.mark.long
def test_a_cluster_scaled_to_zero_is_asked_for_what_the_job_needs(
    tmp_path: Path, server: S3Server, environment: dict[str, str]
) -> None:
    """`device: auto` on a cluster that shows no GPU and no CPU, whose autoscaler may add a node with both."""
    source = write_tars(tmp_path / "shards", shards=3, images=8)
    Store("s3://images", server.options()).filesystem.put(str(source), "images/few", recursive=True)
    recipe = tiny_recipe(tmp_path)
    options = {"table": "s3://images/scaled", "chunk_size": 5, "resources": {}}
    job = write_job(tmp_path, recipe, source, input="s3://images/few", **options)
    with autoscaled_head(tmp_path, {"gpu": {"CPU": 2, "GPU": 1}}) as address:
        process = start_job(job, tmp_path / "log", RAY_ADDRESS=address, **environment)
        code, said = finish(process, tmp_path / "log")
    assert code == 0, said
    assert "asking the cluster for a node with 1 GPU" in said
    result = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert result["counts"]["vectors"] == 24
    assert load_encoder("s3://images/scaled/encoders/" + result["space_id"]).space_id == result["space_id"]


def test_a_ray_that_does_not_start_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**arguments: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does, after half a minute

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.shutdown()
    with pytest.raises(IncompleteRun, match=r"^Ray could not be started on this machine: The current node timed out during st"):
        cluster.connect()
