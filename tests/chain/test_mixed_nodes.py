"""Two nodes, one of which has another Pillow: the run stops, and nothing that the other made is ever published."""

import io
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from heads import RAY, end, free_ports, wait_until
from jobs import kill_all, read_rows, start_job, tiny_recipe, vectors_by_id, write_job
from lora_embed import open_table
from old_pillow import install, path_with
from samples import encoded, noise, tar_of

SHARDS, IMAGES, LIMIT_S = 6, 4, 400.0


def start_node(log: Path, *flags: str, path: str) -> "subprocess.Popen[bytes]":
    """`ray start --block` of one CPU with that PYTHONPATH, which its workers get too."""
    command = [*RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=1", *flags]
    with log.open("wb") as file:
        variables = os.environ | {"PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def tall(number: int) -> bytes:
    """An image that Pillow 12 and 13 resize in another order."""
    return encoded(noise(40, 200, number))


@pytest.mark.long
def test_a_node_with_another_pillow_stops_the_run_and_nothing_of_it_is_published(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(SHARDS):
        members = [(f"{number:03d}.png", tall(number)) for number in range(shard * IMAGES, (shard + 1) * IMAGES)]
        (tmp_path / "shards" / f"{shard}.tar").write_bytes(tar_of(members))
    options = {"chunk_size": 2, "resources": {}, "shared_filesystem": True}
    job = write_job(tmp_path, tiny_recipe(tmp_path), tmp_path / "shards", **options)
    port, client = free_ports(2)
    address, usual = f"127.0.0.1:{port}", path_with()
    own = ("--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client}")
    head = start_node(tmp_path / "head", *own, "--include-dashboard=false", f"--temp-dir=/tmp/ray-{port}", path=usual)
    nodes = [head]
    variables = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": usual}
    try:
        wait_until(lambda: "runtime started" in (tmp_path / "head").read_text(), head, tmp_path / "head")
        other = path_with(install("pillow", "12.1.0"))
        nodes.append(start_node(tmp_path / "node", f"--address={address}", "--node-ip-address=127.0.0.1", path=other))
        wait_until(lambda: "runtime started" in (tmp_path / "node").read_text(), nodes[1], tmp_path / "node")

        code, said = finish(start_job(job, tmp_path / "log", **variables), tmp_path / "log")
        assert code == 2, said
        assert "pixels: on " in said, said
        assert "resize tall" in said
        assert "The encoder was built with Pillow 13.0.0" in said
        assert "here are Pillow 12.1.0" in said
        assert not (tmp_path / "table" / "versions").exists()

        end(nodes.pop())
        code, said = finish(start_job(job, tmp_path / "again", **variables), tmp_path / "again")
        assert code == 0, said
    finally:
        for node in reversed(nodes):
            end(node)
    encoder = open_table(str(tmp_path / "table")).encoder()
    images = [Image.open(io.BytesIO(tall(number))) for number in range(SHARDS * IMAGES)]
    expected = {f"{n // IMAGES}.tar/{n:03d}": encoder.embed([image])[0].tobytes() for n, image in enumerate(images)}
    assert vectors_by_id(read_rows(tmp_path / "table")) == expected


def finish(process: "subprocess.Popen[bytes]", log: Path) -> tuple[int, str]:
    try:
        code = process.wait(LIMIT_S)
    finally:
        if process.poll() is None:
            kill_all(process)
    return code, log.read_text()
