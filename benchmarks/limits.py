"""What the machine allows: decoding and the model alone on each core, storage, and the start of an empty Ray job.

The limit of cores that both decode and embed is 1 / (1/decode + 1/forward) on each, with decode and forward measured
alone, one single-threaded process per core at the same time.
"""

import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_embed.images.decode import decode_image
from lora_embed.images.isolate import keep_freed_memory
from lora_embed.model.encoder import load_encoder
from lora_embed.store import local

BATCH_SIZE = 16
LIMIT_S = 600.0
EMPTY_JOB = """
import time; began = time.time()
import ray, ray.data
imported = time.time()
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
joined = time.time()
class Pass:
    def __call__(self, batch): return batch
ray.data.DataContext.get_current().enable_progress_bars = False
ray.data.range(1).map_batches(Pass, compute=ray.data.ActorPoolStrategy(size=1)).take(1)
answered = time.time()
ray.shutdown()
print(imported - began, joined - imported, answered - joined, time.time() - answered)
"""
IMPORTS = "import torch, transformers; transformers.AutoModel, transformers.ViTModel"


@dataclass(frozen=True, kw_only=True)
class CoreLimits:
    """Images/s of all cores together."""

    decode: float
    forward: float
    both: float  # each core does one after the other


@contextmanager
def core_limits(encoder: Path, shards: Path, images: int, cores: int) -> Iterator[Callable[[], CoreLimits]]:
    """A function that measures decoding (as lora-embed decodes) and the model alone, on `images` for each core.

    The processes are started once and sleep in between.
    """
    context = multiprocessing.get_context("spawn")
    barrier, asked, answers = context.Barrier(cores), context.Queue(), context.Queue()
    arguments = (str(encoder), str(shards), images, barrier, asked, answers)
    processes = [context.Process(target=_measure_core, args=arguments) for _ in range(cores)]
    for process in processes:
        process.start()

    def measure() -> CoreLimits:
        for _ in processes:
            asked.put(True)
        measured = [answers.get(timeout=LIMIT_S) for _ in processes]
        return CoreLimits(
            decode=sum(decode for decode, _ in measured),
            forward=sum(forward for _, forward in measured),
            both=sum(1 / (1 / decode + 1 / forward) for decode, forward in measured),
        )

    try:
        yield measure
    finally:
        for _ in processes:
            asked.put(False)
        for process in processes:
            process.join()


def _measure_core(encoder_uri: str, shard_folder: str, images: int, barrier: Any, asked: Any, answers: Any) -> None:
    """(decode, forward) images/s in one process beside its siblings, batch by batch in turn, whenever it is asked."""
    keep_freed_memory()  # as lora-embed's actors do
    torch.set_num_threads(1)
    encoder = load_encoder(encoder_uri)
    prepare = encoder.description.preprocessing
    jpegs = _read_jpegs(shard_folder, images)
    jpegs = (jpegs * (images // len(jpegs) + 1))[: max(1, images // BATCH_SIZE) * BATCH_SIZE]
    pixels = np.empty((BATCH_SIZE, *prepare.size, 3), np.uint8)
    encoder.embed_pixels(pixels)
    while asked.get():
        seconds = {"decode": 0.0, "forward": 0.0}
        barrier.wait(LIMIT_S)  # so that each process takes one request
        for start in range(0, len(jpegs), BATCH_SIZE):
            began = time.perf_counter()
            for row, data in enumerate(jpegs[start : start + BATCH_SIZE]):
                pixels[row] = decode_image(data, prepare).pixels
            decoded = time.perf_counter()
            encoder.embed_pixels(pixels)
            seconds["decode"] += decoded - began
            seconds["forward"] += time.perf_counter() - decoded
        answers.put((len(jpegs) / seconds["decode"], len(jpegs) / seconds["forward"]))


def _read_jpegs(folder: str, most: int) -> list[bytes]:
    """The first images of a folder's tars, no more than needed."""
    read: list[bytes] = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None, member.name
                read.append(data.read())
                if len(read) == most:
                    return read
    return read


def measure_storage(files: list[Path], folder: Path, megabytes: int) -> dict[str, float]:
    """Local disk: MB/s read (the files, dropped from the page cache where the kernel lets go), MB/s written, commits/s.

    A commit is what lora-embed does for a part: write aside, fsync, link, fsync of the folder.
    """
    size = sum(file.stat().st_size for file in files)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read_s = _seconds(lambda: [file.read_bytes() for file in files])
    block = os.urandom(2**20)
    write_s = _seconds(lambda: _write(folder / "written", block, megabytes))
    commit_s = _seconds(lambda: [local.create(folder, folder / f"part-{number}", block[:16384]) for number in range(50)])
    return {
        "read_mb_per_s": size / 1e6 / read_s,
        "write_mb_per_s": megabytes * 2**20 / 1e6 / write_s,
        "commits_per_s": 50 / commit_s,
    }


def measure_store(filesystem: Any, files: list[str], folder: str, megabytes: int) -> dict[str, float]:
    """The same of an S3 store through s3fs; a commit is a PUT of 16 KiB."""
    size = sum(filesystem.size(file) for file in files)
    read_s = _seconds(lambda: [filesystem.cat_file(file) for file in files])
    block = os.urandom(2**20)
    write_s = _seconds(lambda: [filesystem.pipe_file(f"{folder}/{number}", block * 8) for number in range(megabytes // 8)])
    commit_s = _seconds(lambda: [filesystem.pipe_file(f"{folder}/{number}", block[:16384]) for number in range(50)])
    return {
        "read_mb_per_s": size / 1e6 / read_s,
        "write_mb_per_s": megabytes // 8 * 8 * 2**20 / 1e6 / write_s,
        "commits_per_s": 50 / commit_s,
    }


def _write(path: Path, block: bytes, megabytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def measure_start(environment: dict[str, str]) -> dict[str, float]:
    """Seconds of an empty Ray job (one row through one actor), by phase, and of importing torch and transformers."""
    began = time.perf_counter()
    done = _python(EMPTY_JOB, environment)
    whole = time.perf_counter() - began
    phases = [float(seconds) for seconds in done.stdout.splitlines()[-1].split()]
    return {
        "empty_ray_job_s": whole,
        **dict(zip(("import_ray_s", "init_s", "first_row_s", "shutdown_s"), phases, strict=True)),
        "import_torch_transformers_s": _seconds(lambda: _python(IMPORTS, environment)),
    }


def _python(code: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S, env=environment)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
