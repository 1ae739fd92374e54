"""Jobs on a cluster that has the dependencies alone: what goes there with a job, and `ray job submit` on a real Ray head."""

import io
import json
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _zip_files
from ray.autoscaler._private.util import prepare_config, validate_config

from heads import Head, ray_head, wait_until
from jobs import ROOT, read_rows, tiny_recipe, write_job, write_tars
from lora_embed import open_table
from lora_embed.model.golden import relative_difference
from samples import png

CLUSTER_FILE = ROOT / "cluster.yaml"
SENT = {".py", ".html", ".css"}  # kinds of files of the package that a cluster needs
PROBE = """
import json, os, sys
sys.path.insert(0, "src")  # as jobs/embed.py does
import ray
from lora_embed.chain import cluster
from lora_embed.errors import ResourcesError

@ray.remote
def look():
    import lora_embed
    return {"file": lora_embed.__file__, "key": os.environ.get("AWS_ACCESS_KEY_ID")}

for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    try:
        cluster.connect()
    except ResourcesError as error:
        print("refused:", error)
cluster.connect()
print(json.dumps(ray.get(look.remote())))
"""


def test_the_cluster_file_is_valid_and_its_node_types_can_all_be_reached() -> None:
    cluster = prepare_config(yaml.safe_load(CLUSTER_FILE.read_text()))
    validate_config(cluster)
    head, types = cluster["head_node_type"], cluster["available_node_types"]
    assert cluster["provider"]["region"]
    assert types[head]["resources"] == {"CPU": 0}
    for name, node in types.items():
        assert set(node["resources"]) <= {"CPU", "GPU", "memory"}, name
        if name != head:
            assert 0 == node["min_workers"] < node["max_workers"] <= cluster["max_workers"], name
    assert any(node["resources"].get("GPU") for node in types.values())


def test_the_cluster_file_installs_the_packages_dependencies() -> None:
    raw = yaml.safe_load(CLUSTER_FILE.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", dependency)[0] for dependency in project["dependencies"]}
    [command] = raw["setup_commands"]
    assert command.startswith("pip install -c ~/constraints.txt ")
    assert set(command.replace('"', "").split()[4:]) == needed
    assert raw["file_mounts"]["~/constraints.txt"] == "./constraints.txt"
    assert f"rayproject/ray:{dict(pinned())['ray']}-" in raw["docker"]["image"]


def pinned() -> Iterator[tuple[str, str]]:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            yield name, version


@pytest.mark.parametrize(("folder", "prefix"), [("", "src/"), ("src/lora_embed", "")])
def test_what_goes_to_a_cluster_is_small_and_complete(tmp_path: Path, folder: str, prefix: str) -> None:
    """The working directory of `ray job submit`, and the package alone, as Ray packs them."""
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes() if not folder else []
    _zip_files(str(ROOT / folder), excludes, str(package), include_gitignore=True, include_parent_dir=bool(folder))
    names = set(zipfile.ZipFile(package).namelist())
    sources = (ROOT / "src" / "lora_embed").rglob("*.*")
    modules = {path.relative_to(ROOT / "src").as_posix() for path in sources if path.suffix in SENT}
    assert package.stat().st_size < 1.7e6
    assert {name for name in names if Path(name).suffix in SENT and name.startswith(f"{prefix}lora_embed/")} == {
        f"{prefix}{module}" for module in modules
    }
    assert folder or "jobs/embed.py" in names
    assert not [name for name in names if name.startswith((".", "tests/", "docs/")) and not name.endswith("ignore")]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head({"num-cpus": "2"}) as started:
        yield started


@pytest.fixture(scope="module")
def ended(head: Head, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of four commands, run at once because each is mostly imports."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "probe.py").write_text(PROBE)
    (folder / "job.yaml").write_text("recipe: recipe.yaml\ninput: shards\ntabel: table\n")
    key = {"env_vars": {"AWS_ACCESS_KEY_ID": "key-of-the-job"}}
    probe, broken = ["python", f"{folder}/probe.py"], ["python", "jobs/embed.py", "--config", f"{folder}/job.yaml"]
    shell = {"RAY_ADDRESS": head.address, "AWS_ACCESS_KEY_ID": "key-of-the-shell"}
    started = {
        "broken": head.submit(folder / "broken", "--", *broken),
        "no token": head.submit(folder / "no token", "--", *broken, RAY_AUTH_MODE="disabled"),
        "job": head.submit(folder / "job", "--runtime-env-json", json.dumps(key), "--", *probe),
        "shell": head.start([sys.executable, *probe[1:], head.dashboard, head.address], folder / "shell", **shell),
    }
    return {name: (process.wait(timeout=300), (folder / name).read_text()) for name, process in started.items()}


def test_a_job_with_a_broken_configuration_fails_and_its_log_says_why(ended: dict[str, tuple[int, str]]) -> None:
    code, output = ended["broken"]
    assert code == 1
    assert re.search(r"Job 'raysubmit_\w+' failed", output)
    assert "job.yaml: unknown key 'tabel'. Did you mean 'table'?" in output
    assert "failed with exit code 2" in output
    assert "Traceback" not in output


def test_without_the_token_nothing_is_submitted(ended: dict[str, tuple[int, str]]) -> None:
    code, output = ended["no token"]
    assert code == 1
    assert "Unauthorized: Missing authentication token" in output
    assert "submitted successfully" not in output


def test_tasks_of_a_job_have_the_package_and_the_jobs_environment(head: Head, ended: dict[str, tuple[int, str]]) -> None:
    code, output = ended["job"]
    assert code == 0, output
    seen = json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1])
    assert seen["key"] == "key-of-the-job"
    assert seen["file"].startswith(f"{head.folder}/t/")


def test_a_shell_joins_with_its_package_and_keeps_its_keys(head: Head, ended: dict[str, tuple[int, str]]) -> None:
    code, output = ended["shell"]
    assert code == 0, output
    seen = json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1])
    assert seen["key"] is None
    assert seen["file"].startswith(f"{head.folder}/t/")
    [refused] = re.findall(r"^refused: (.+)$", output, re.MULTILINE)
    assert refused.startswith(f"the Ray cluster at {head.dashboard} cannot be joined: Invalid Ray address")


@pytest.mark.long
def test_a_stopped_job_goes_on_with_the_same_submit(head: Head, tmp_path: Path) -> None:
    source = write_tars(tmp_path / "shards", shards=4, images=100)
    job = write_job(tmp_path, tiny_recipe(tmp_path), source, chunk_size=4)
    entrypoint = [
        "--",
        "python",
        "jobs/embed.py",
        "--config",
        str(job),
        "--json",
        "--set",
        "resources={device: cpu, actors: {max: 1}}",
    ]
    staging = tmp_path / "table" / "staging"

    submitted = head.submit(tmp_path / "first", "--submission-id", "first", *entrypoint)
    wait_until(lambda: len(list(staging.rglob("*.parquet"))) >= 3, submitted, tmp_path / "first")
    assert head.ask("POST", "/api/jobs/first/stop") == 200  # what `ray job stop` does, without seconds of imports
    assert submitted.wait(timeout=60) == 0
    output = (tmp_path / "first").read_text()
    assert "stopped by a signal. What is committed stays. Run the same command again to continue." in output
    assert "Job 'first' was stopped" in output
    assert not (tmp_path / "table" / "versions").exists()
    kept = len(list(staging.rglob("*.parquet")))
    assert 3 <= kept < 100

    submitted = head.submit(tmp_path / "second", *entrypoint)
    assert submitted.wait(timeout=180) == 0, (tmp_path / "second").read_text()
    output = (tmp_path / "second").read_text()
    assert re.search(r"Job 'raysubmit_\w+' succeeded", output)
    result = json.loads(re.findall(r"^\{.*\}$", output, re.MULTILINE)[-1])
    assert (result["embedded"], result["published"]) == (400 - 4 * kept, True)
    rows = read_rows(tmp_path / "table")
    assert rows.column("id").to_pylist() == [f"{number // 100:04d}.tar/{number:06d}" for number in range(400)]
    images = [Image.open(io.BytesIO(png(number))) for number in range(400)]
    expected = open_table(str(tmp_path / "table")).encoder().embed(images)
    assert relative_difference(np.array(rows.column("embedding").to_pylist(), np.float32), expected) < 1e-5
