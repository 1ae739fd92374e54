"""What a CUDA machine gives, part by part, and how much of it a whole run reaches: one command, a table and JSON.

    python benchmarks/gpu.py [--encoder vit-s | vit-b | tiny | DIRECTORY] [--images N] [--out result.json]

`--device cpu` runs the same code on the CPU with a declared GPU, at tiny sizes, to test this file: no line of it is then a
figure of a GPU, and each says so. Times of device work are taken with CUDA events, others by the clock around a
synchronised device; each is the median of several calls after some that warm up, with (max - min) / median as its spread.
The photos, and the weights of vit-s, are the demo's: without network, bring its cache along ($LORA_EMBED_CACHE).
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from lora_embed.chain.device import inspect_device
from lora_embed.chain.items import Block, WorkItem
from lora_embed.errors import EncoderError
from lora_embed.images.preprocess import Preprocessing
from lora_embed.model import golden
from lora_embed.model.description import read_description
from lora_embed.model.encoder import Encoder, golden_pixels, load_encoder
from lora_embed.schema import Layout
from lora_embed.shards.listing import list_shards
from workloads import Workload, build_model, write_shards

GUIDE = Path(__file__).resolve().parent / "peers" / "guide.py"
PRECISIONS = ("float32", "bfloat16", "float16")
PARTS = ("forward", "copy", "decode", "guide", "job")
NOT_A_GPU = "  [not measured on a GPU]"
NO_GAIN = 1.02  # a batch size that is not faster than the best by this is none; two of them end the ramp
WARM_UP = 3  # calls
UTILISATION = ["nvidia-smi", "--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
ON_A_CORE = """
import pickle, sys, time
from lora_embed.chain.chunks import decode_items
blocks, layout, preprocessing = pickle.load(sys.stdin.buffer)
list(decode_items(blocks, layout, preprocessing, {}))
print("ready", flush=True)
sys.stdin.buffer.read(1)
began = time.perf_counter()
list(decode_items(blocks, layout, preprocessing, {}))
print(time.perf_counter() - began, flush=True)
"""
Figures = dict[str, Any]
cuda: Any = torch.cuda  # partly untyped


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; in images but for the repeats."""

    ramp: tuple[int, ...]  # batch sizes
    repeats: int
    chunk_size: int  # and a shard's size
    chunks_per_core: int  # of the job
    distinct_shards: int
    guide_images: int


ON_GPU = Sizes(
    ramp=(32, 64, 128, 256, 512, 1024), repeats=20, chunk_size=512, chunks_per_core=12, distinct_shards=3, guide_images=2048
)
ON_CPU = Sizes(ramp=(1, 2, 4), repeats=3, chunk_size=8, chunks_per_core=2, distinct_shards=2, guide_images=48)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 where there is no CUDA and the CPU was not asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--encoder", default="vit-s", help="vit-s (the demo's weights), vit-b or tiny (random ones), or a directory"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--images", type=int, help="of the job; by default a dozen chunks for each core")
    parser.add_argument("--batch-size", type=int, help="of the job; by default what `auto` takes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not cuda.is_available():
        print("torch finds no CUDA device here, so nothing was measured; --device cpu tries this script out.", file=sys.stderr)
        return 2
    if given.device == "cpu":
        torch.set_num_threads(1)  # as an actor does
    result: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(given, Path(folder)):
            result |= found
            given.out.write_text(json.dumps(result, indent=1) + "\n")  # what is measured stays if a later part fails
    print("\n".join(describe(result)))
    return 0


def measure(given: argparse.Namespace, folder: Path) -> Iterator[Figures]:
    """Yield the figures of each part that was asked for."""
    sizes = ON_GPU if given.device == "cuda" else ON_CPU
    encoder = Path(given.encoder) if Path(given.encoder).is_dir() else build_model(given.encoder, folder)
    device = inspect_device(given.device)
    batch_size = given.batch_size or device.batch_size
    yield {"about": about(given.device, encoder, given.encoder)}
    if "forward" in given.only:
        yield {"forward": {name: measure_precision(encoder, given.device, name, sizes) for name in PRECISIONS}}
    if "copy" in given.only:
        loaded = load_encoder(encoder, device=given.device, precision=device.precision, batch_size=batch_size, check=False)
        yield {"copy": measure_copies(loaded, sizes.repeats)}
        del loaded
    if given.device == "cuda":
        cuda.empty_cache()  # for the actors
    shards = write_photos(folder / "distinct", sizes) if {"decode", "guide", "job"} & set(given.only) else []
    if "decode" in given.only:
        yield {"decode": measure_decoding(shards, read_description(encoder).preprocessing, sizes.chunk_size)}
    if "guide" in given.only:
        source = link_shards(shards, folder / "guide", max(2, sizes.guide_images // sizes.chunk_size))
        yield {"guide": measure_guide(encoder, source, folder, batch_size)}
    if "job" in given.only:
        images = given.images or sizes.chunk_size * sizes.chunks_per_core * count_cores()
        source = link_shards(shards, folder / "shards", math.ceil(images / sizes.chunk_size))
        job = {"precision": device.precision, "batch_size": batch_size, "chunk_size": sizes.chunk_size}
        yield {"job": measure_job(encoder, source, folder / "table", job, is_declared=given.device == "cpu")}


def about(device: str, encoder: Path, name: str) -> Figures:
    """Device, driver and library versions: what the figures are of."""
    driver, memory = None, None
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if shutil.which(command[0]):
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        memory = cuda.get_device_properties(0).total_memory
    return {
        "measured_on_gpu": device == "cuda",
        "device": cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "device_memory_bytes": memory,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "cores": count_cores(),
        "encoder": name,
        "space_id": read_description(encoder).space_id,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def measure_precision(folder: Path, device: str, precision: str, sizes: Sizes) -> Figures:
    """Golden vectors, then images/s of the forward pass by batch size, pixels being on the device already.

    Beside them images/s from host to host, as an actor is given a chunk, at the best batch size.
    """
    encoder = load_encoder(folder, device=device, precision=precision, batch_size=sizes.ramp[0], check=False)
    found: Figures = {"golden": check_golden(encoder, folder)}
    found["ramp"] = climb(sizes.ramp, lambda batch_size: time_forward(encoder, batch_size, sizes.repeats))
    best = max(found["ramp"], key=lambda row: float(row["images_per_s"] or 0.0))
    encoder.batch_size = best["batch_size"]
    pixels = noise(encoder, max(sizes.chunk_size, 2 * encoder.batch_size))
    seconds = time_by_clock(lambda: encoder.embed_pixels(pixels), encoder.device, max(3, sizes.repeats // 4))
    found |= {"best_batch_size": best["batch_size"], "ceiling": best["images_per_s"]}
    return found | {"host_to_host": rate_of(len(pixels), seconds)}


def check_golden(encoder: Encoder, folder: Path) -> Figures:
    """The largest relative difference from the golden vectors, its bound, and what the encoder's own check says to it."""
    images, expected = golden.load(folder)
    vectors = encoder.embed_pixels(golden_pixels(images, encoder.description.preprocessing))
    try:
        encoder.check_golden(folder)
        error = None
    except EncoderError as refused:
        error = str(refused)
    difference = golden.relative_difference(vectors, expected)
    return {"difference": difference, "bound": golden.BOUNDS[encoder.precision], "error": error}


def climb(ramp: tuple[int, ...], measure_one: Callable[[int], Figures]) -> list[Figures]:
    """Measure batch sizes one after another until the memory ends or two in a row bring no gain."""
    rows: list[Figures] = []
    best, in_vain = 0.0, 0
    for batch_size in ramp:
        try:
            rows.append({"batch_size": batch_size} | measure_one(batch_size))
        except torch.OutOfMemoryError:
            rows.append({"batch_size": batch_size, "images_per_s": None, "spread": None})
            cuda.empty_cache()
            break
        in_vain = 0 if rows[-1]["images_per_s"] > NO_GAIN * best else in_vain + 1
        best = max(best, rows[-1]["images_per_s"])
        if in_vain == 2:
            break
    return rows


def time_forward(encoder: Encoder, batch_size: int, repeats: int) -> Figures:
    """Images/s of one batch size, from uint8 pixels on the device to float32 vectors there."""
    pixels = torch.from_numpy(noise(encoder, batch_size)).to(encoder.device)
    is_cuda = encoder.device.type == "cuda"
    if is_cuda:
        cuda.reset_peak_memory_stats()
    seconds = time_on_device(lambda: forward(encoder, pixels), encoder.device, repeats)
    peak = cuda.max_memory_allocated() if is_cuda else None
    return rate_of(batch_size, seconds) | {"peak_bytes": peak}


@torch.inference_mode()
def forward(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """The encoder's own pass over a batch that is on the device already."""
    return encoder._forward(pixels)


def measure_copies(encoder: Encoder, repeats: int) -> Figures:
    """Batches of uint8 pixels from host to device by three ways, and whether copying and computing go at once.

    Several batches in turn, so that none waits in a cache of the host. `staged` is what an actor can do: the batch, which
    Ray owns, is first copied into pinned memory by the host.
    """
    device, size = encoder.device, encoder.batch_size
    batches = [torch.from_numpy(noise(encoder, size, seed)) for seed in range(8)]
    pinned = [batch.pin_memory() if device.type == "cuda" else batch.clone() for batch in batches]
    turn = iter(range(10**9))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "pageable": lambda: batches[next(turn) % 8].to(device, copy=True),
        "pinned": lambda: pinned[next(turn) % 8].to(device, copy=True, non_blocking=True),
        "staged": lambda: pinned[0].copy_(batches[next(turn) % 8]).to(device, copy=True, non_blocking=True),
    }
    found: Figures = {"batch_size": size, "precision": encoder.precision, "ways": {}}
    for name, way in ways.items():
        rate = rate_of(size, time_by_clock(way, device, repeats))
        found["ways"][name] = rate | {"gb_per_s": rate["images_per_s"] / size * batches[0].nbytes / 1e9}
    resident = batches[0].to(device)
    computing = statistics.median(time_by_clock(lambda: forward(encoder, resident), device, repeats))
    copies = max(1, round(computing * found["ways"]["pinned"]["images_per_s"] / size))  # as long as one pass
    side = cuda.Stream() if device.type == "cuda" else None

    def copy() -> None:
        with cuda.stream(side):  # None: does nothing
            for number in range(copies):
                pinned[number % 8].to(device, copy=True, non_blocking=True)

    alone = [time_by_clock(work, device, repeats) for work in (copy, lambda: forward(encoder, resident))]

    def copy_and_compute() -> None:
        copy()
        forward(encoder, resident)

    both = time_by_clock(copy_and_compute, device, repeats)
    found["hidden"] = hidden_share(*(statistics.median(seconds) for seconds in (*alone, both)))
    return found


def hidden_share(one: float, other: float, both: float) -> float:
    """The share of the shorter of two times that is hidden behind the other when both go at once; below 0: they disturb."""
    return (one + other - both) / min(one, other)


def measure_decoding(shards: list[Path], preprocessing: Preprocessing, per_shard: int) -> Figures:
    """Images/s of a core when one process on each does all that a decode task does: read, hash, decode, resize.

    The processes import no torch, as Ray's decode tasks do not.
    """
    listed, layout = list_shards(tuple(map(str, shards)), {}), Layout(precision="float32", batch_size=1)
    command, pipe, cores = [sys.executable, "-c", ON_A_CORE], subprocess.PIPE, count_cores()
    processes: list[Any] = [subprocess.Popen(command, stdin=pipe, stdout=pipe) for _ in range(cores)]
    for number, process in enumerate(processes):
        block = Block(items=(WorkItem(shard=listed[number % len(listed)]),))
        pickle.dump(({"block": [block]}, layout, preprocessing), process.stdin)
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == b"ready\n", "a decode process ended early; its error is above"
    for process in processes:
        process.stdin.close()  # what they wait for
    seconds = [float(process.stdout.readline()) for process in processes]
    for process in processes:
        process.wait()
    return {"cores": cores, "per_core": rate_of(per_shard, seconds)}


def measure_guide(encoder: Path, source: Path, folder: Path, batch_size: int) -> Figures:
    """The plain loop of a guide, in float32, on the same images; the first batch is not counted."""
    (folder / "guide-table").mkdir()
    progress, shards = folder / "progress.txt", sorted(map(str, source.iterdir()))
    task = {"shards": shards, "model": str(encoder), "out": str(folder / "guide-table"), "progress": str(progress)}
    (folder / "task.json").write_text(
        json.dumps(task | {"batch_size": batch_size, "cores": count_cores(), "store": None})  # of `task.Task`
    )
    subprocess.run([sys.executable, str(GUIDE), str(folder / "task.json")], check=True)
    lines = [line.split() for line in progress.read_text().splitlines()]
    moments, images = [float(moment) for moment, _ in lines], [int(number) for _, number in lines]
    rate = sum(images[1:]) / (moments[-1] - moments[0])
    return {"images": sum(images), "batch_size": batch_size, "steady_images_per_s": rate}


def measure_job(encoder: Path, source: Path, folder: Path, settings: Figures, *, is_declared: bool) -> Figures:
    """A job up to its last committed part, decoding on the CPUs and an actor on each GPU."""
    import ray  # which a machine that measures other parts need not have

    from lora_embed.chain import cluster
    from lora_embed.config.models import JobConfig, Resources
    from lora_embed.run.job import run_job

    cluster.connect(*(2, 1) if is_declared else (None, None))
    resources = Resources(device="gpu")
    assert cluster.choose_topology(resources).decode is not None
    job = JobConfig(recipe=str(encoder), input=(str(source),), table=str(folder), resources=resources, **settings)
    has = ray.cluster_resources()
    began = time.time()
    with watched_utilisation(folder.parent / "utilisation.csv") as read_utilisation:
        result = run_job(job, publishes=False)
    whole_s = time.time() - began
    ray.shutdown()
    commits = sorted(part.stat().st_mtime for part in (folder / "staging").rglob("*.parquet"))
    rate, since = steady_rate(commits, job.chunk_size, workers=int(has["CPU"]))
    busy = [share for at, share in read_utilisation() if since <= at <= commits[-1]]
    return settings | {
        "images": result.embedded,
        "gpus": int(has["GPU"]),
        "cpus": int(has["CPU"]),
        "steady_images_per_s": rate,
        "whole_s": whole_s,
        "first_part_s": commits[0] - began,
        "gpu_busy": statistics.mean(busy) if busy else None,
        "stages_s": result.stages,
        "bound_by": result.bound,
    }


def steady_rate(commits: list[float], per_commit: int, workers: int) -> tuple[float, float]:
    """(images/s, its beginning) by the times of all commits, in order; the first wave of workers' is not counted.

    They all began when nothing was done, and end about the same time.
    """
    skipped = max(1, min(workers, len(commits) // 2))
    since = commits[skipped - 1]
    return (len(commits) - skipped) * per_commit / (commits[-1] - since), since


@contextlib.contextmanager
def watched_utilisation(log: Path) -> Iterator[Callable[[], list[tuple[float, float]]]]:
    """While open, nvidia-smi notes how busy each GPU is; (seconds since 1970, share) of all notes. None without nvidia-smi."""
    with log.open("wb") as file, contextlib.ExitStack() as stack:
        if shutil.which(UTILISATION[0]):
            process = stack.enter_context(subprocess.Popen(UTILISATION, stdout=file))
            stack.callback(process.terminate)
        yield lambda: [_utilisation(line) for line in log.read_text().splitlines() if line.count(",") == 1]


def _utilisation(line: str) -> tuple[float, float]:
    """Of a line such as `2026/11/25 01:00:32.779, 97`, in local time."""
    at, share = line.split(",")
    return datetime.strptime(at.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(share) / 100


def noise(encoder: Encoder, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random pixels (count, H, W, 3): zeros run faster than images."""
    return np.random.default_rng(seed).integers(0, 256, (count, *encoder.description.preprocessing.size, 3), dtype=np.uint8)


def time_on_device(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call on the device, calls following each other without a pause; by the clock where it is the CPU."""
    if device.type != "cuda":
        return time_by_clock(work, device, repeats)
    for _ in range(WARM_UP):
        work()
    marks = [cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]


def time_by_clock(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call, from an idle device to an idle device."""
    wait = cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(WARM_UP + repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def rate_of(images: int, seconds: list[float]) -> Figures:
    """The median rate of calls of so many images, and (max - min) / median of their times."""
    median = statistics.median(seconds)
    return {"images_per_s": images / median, "spread": (max(seconds) - min(seconds)) / median}


def write_photos(folder: Path, sizes: Sizes) -> list[Path]:
    """Tars of 500×375 JPEGs, one chunk each."""
    size = sizes.chunk_size
    return write_shards(
        Workload(name="gpu", about="", model="", shards=sizes.distinct_shards, per_shard=size, chunk_size=size), folder
    )


def link_shards(shards: list[Path], folder: Path, count: int) -> Path:
    """The same files under many names: an input of any size that is read from the page cache."""
    folder.mkdir()
    for number in range(count):
        os.link(shards[number % len(shards)], folder / f"{number:06d}.tar")
    return folder


def describe(result: Figures) -> list[str]:
    """For a person; what would be read as a figure of a GPU says so where it is none."""
    of, decode = result["about"], result.get("decode")
    note = "" if of["measured_on_gpu"] else NOT_A_GPU
    lines = [f"{of['device']}, {of['cores']} cores, driver {of['driver']}; torch {of['torch']}, CUDA {of['cuda']}{note}"]
    lines += [f"encoder {of['encoder']}, space {of['space_id']}; transformers {of['transformers']}; {of['date']}"]
    for precision, found in result.get("forward", {}).items():
        lines += ["", *(line + note for line in _describe_forward(precision, found))]
    if "copy" in result:
        lines += ["", *(line + note for line in _describe_copies(result["copy"]))]
    if decode is not None:
        lines += ["", f"decode                   {_shown(decode['per_core'])}, a core, {decode['cores']} at once"]
        for precision, found in result.get("forward", {}).items():
            cpus = found["ceiling"] / decode["per_core"]["images_per_s"]
            lines.append(f"{precision} needs {cpus:.1f} CPUs that decode for a GPU, and one that feeds it{note}")
    if "guide" in result:
        lines += ["", f"guide: {result['guide']['steady_images_per_s']:,.1f} images/s steady, float32, the plain loop{note}"]
    if "job" in result:
        lines += ["", *(line + note for line in _describe_job(result["job"], result.get("forward", {})))]
    if {"guide", "job"} <= set(result):
        times = result["job"]["steady_images_per_s"] / result["guide"]["steady_images_per_s"]
        lines += [f"job: {times:.1f} times the guide's images/s in steady state{note}"]
    return lines


def _shown(rate: Figures) -> str:
    if rate["images_per_s"] is None:
        return "out of memory"
    return f"{rate['images_per_s']:>12,.1f} images/s ±{rate['spread']:.0%}"


def _describe_forward(precision: str, found: Figures) -> list[str]:
    held = found["golden"]
    verdict = "holds" if held["error"] is None else "REFUSED"
    lines = [f"{precision}: golden vectors {held['difference']:.1e} off, {held['bound']:.0e} allowed: {verdict}"]
    lines += [f"{precision:<8} batch {row['batch_size']:>5}     {_shown(row)}" for row in found["ramp"]]
    share = found["host_to_host"]["images_per_s"] / found["ceiling"]
    return [*lines, f"{precision:<8} host to host    {_shown(found['host_to_host'])}, {share:.0%} of the best forward"]


def _describe_copies(found: Figures) -> list[str]:
    lines = [f"copy {name:<20}{_shown(way)}, {way['gb_per_s']:.2f} GB/s" for name, way in found["ways"].items()]
    of = f"{found['precision']}, batch {found['batch_size']}"
    return [*lines, f"copying beside computing ({of}): {found['hidden']:.0%} of the shorter hidden"]


def _describe_job(job: Figures, forward: Figures) -> list[str]:
    of = f"{job['precision']}, batch {job['batch_size']}, chunks of {job['chunk_size']}, GPUs {job['gpus']}, CPUs {job['cpus']}"
    rate, busy = job["steady_images_per_s"], job["gpu_busy"]
    lines = [
        f"job: {job['images']:,} images, {of}",
        f"job: {rate:,.1f} images/s steady, bound by {job['bound_by']} as the run itself says",
        f"job: {job['whole_s']:.1f} s in all, {job['images'] / job['whole_s']:,.1f} images/s; "
        f"the first part after {job['first_part_s']:.1f} s",
    ]
    if job["precision"] in forward:
        lines.append(f"job: {rate / job['gpus'] / forward[job['precision']]['ceiling']:.0%} of the best forward on each GPU")
    return [*lines, f"job: GPUs busy by nvidia-smi: {'nothing seen' if busy is None else f'{busy:.0%}'}"]


if __name__ == "__main__":
    sys.exit(main())
