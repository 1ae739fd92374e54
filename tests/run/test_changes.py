"""What fails or changes under a run in its first seconds: files that are replaced, disks and stores that fill up."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import ray.data

from faults import EXPIRED, STORE_FULL
from jobs import run_here, tiny_recipe, write_job, write_tars
from lora_embed.chain import pipeline, ray_private
from lora_embed.cli.main import run_command
from lora_embed.config.models import load_recipe
from lora_embed.errors import ChangedMeanwhile, IncompleteRun, StorageError, WorkersLost
from lora_embed.model.build import build_encoder
from lora_embed.model.ingredients import gather
from lora_embed.store.fetch import cache_root, fetch_directory
from lora_embed.store.store import Store
from models import save_adapter, save_base
from s3 import Faults, Proxy, Request, S3Server
from scene import SmallDisk


@pytest.mark.parametrize("changed", ["base", "ten"])
def test_files_that_change_after_they_were_hashed_make_no_encoder(tmp_path: Path, changed: str) -> None:
    """Else the recipe's name would stand for another content, for good."""
    ingredients = gather(load_recipe(tiny_recipe(tmp_path)))
    other = save_base(tmp_path / "other", "vit", seed=9)
    if changed == "ten":
        other = save_adapter(tmp_path / "another", other, 10, seed=9)
    shutil.copytree(other, tmp_path / changed, dirs_exist_ok=True)
    with pytest.raises(ChangedMeanwhile, match=f"{tmp_path}/{changed}: changed while the encoder was built"):
        build_encoder(ingredients, tmp_path / "encoder", lambda message: None)
    assert not (tmp_path / "encoder").exists()
    assert not list(tmp_path.glob(".encoder-*"))


def test_a_remote_directory_that_changes_while_it_is_copied_is_not_kept(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second file is replaced, by one of the same size, when the first has been read."""
    monkeypatch.setenv("LORA_EMBED_CACHE", str(tmp_path / "cache"))
    past = Store("s3://images/changing", server.options())
    for name in ("a.json", "b.json"):
        past.replace(name, b"old")

    def change(request: Request) -> None:
        if request.method == "GET" and request.path.endswith("a.json"):
            past.replace("b.json", b"new")

    with Proxy(server.endpoint) as proxy:
        proxy.answered = change
        with pytest.raises(ChangedMeanwhile, match="s3://images/changing: changed while it was copied"):
            fetch_directory("s3://images/changing", None, ("*.json",), server.options(proxy.endpoint))
        assert [path.suffix for path in (cache_root() / "fetched").iterdir()] == [".lock"]
        proxy.answered = None
        folder = fetch_directory("s3://images/changing", None, ("*.json",), server.options(proxy.endpoint))
    assert [(folder / name).read_bytes() for name in ("a.json", "b.json")] == [b"old", b"new"]


@pytest.mark.slow
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "out").mkdir()
    disk = SmallDisk(tmp_path / "out", "1m")
    disk.fill()
    code = "import sys; from lora_embed.cli.main import main; main()"
    command = [*disk.through, sys.executable, "-c", code, "build", str(recipe), "--out", str(tmp_path / "out/encoder")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    disk.close()
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False), ended.stderr
    assert "error: " in ended.stderr
    assert "No space left on device" in ended.stderr


def test_a_node_without_memory_is_named() -> None:
    said = "Task was killed due to the node running low on memory.\nMemory on the node was 0.9 …\nRefer to the documentation."
    with pytest.raises(WorkersLost, match=r"gave up the run: a node ran low on memory"), pipeline._package_errors():
        raise ray.exceptions.OutOfMemoryError(said)


@pytest.mark.usefixtures("cluster")
def test_a_run_that_nobody_works_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when all nodes are lost and none comes: Ray's limit is half an hour."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    rows = ray.data.range(1).map(lambda row: time.sleep(8) or row)
    with (
        pytest.raises(IncompleteRun, match=r"no worker has finished a chunk for too long") as raised,
        pipeline._package_errors(),
    ):
        list(rows.iter_rows())
    assert not isinstance(raised.value, WorkersLost)


@pytest.mark.parametrize("what", STORE_FULL)
def test_a_full_store_is_named_at_once(server: S3Server, what: str) -> None:
    with Proxy(server.endpoint, Faults(error=1.0, answer=STORE_FULL[what])) as proxy:
        store = Store("s3://images/full", server.options(proxy.endpoint) | {"retry_s": 30})
        started = time.monotonic()
        with pytest.raises(
            StorageError, match=r"(minimum free drive threshold|uota).*\. Free space in that store, or have its quota"
        ):
            store.create("a", b"1")
        assert time.monotonic() - started < 20  # of 30


def test_keys_that_expire_while_the_encoder_is_stored_are_no_mistake_of_the_job(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Something was written by then, so it is exit code 1: the same command goes on."""
    run_here(monkeypatch)
    source = write_tars(tmp_path / "shards", shards=1, images=3)
    with Proxy(server.endpoint) as proxy:
        options = server.options(proxy.endpoint)
        job = write_job(tmp_path, tiny_recipe(tmp_path), source, table="s3://images/expiring", table_storage_options=options)

        def expire(request: Request) -> None:
            if request.method == "PUT" and request.path.endswith("/config.json"):
                proxy.faults = Faults(error=1.0, answer=EXPIRED["session ended"])

        proxy.answered = expire
        assert run_command(["run", str(job)]) == 1
        said = capfd.readouterr().err
        assert "access denied (The provided token has expired.)" in said
        assert "Run the same command again to continue" in said
        proxy.answered, proxy.faults = None, Faults()
        assert run_command(["run", str(job), "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["counts"]["vectors"] == 3


def test_what_ray_says_of_a_failed_task_is_a_line_without_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    trace = "Task A failed, and is tried again. Error: Traceback (most recent call last):\n\n  File x\n\nValueError: no\n\n"
    ray_private._log({"lines": [trace, "A worker died."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert caplog.messages == ["Ray: Task A failed, and is tried again. ValueError: no", "Ray: A worker died."]
