"""Steady rate of a run against what its cores allow, on the same images in the same go; prints JSON.

The limit of a core that both decodes and embeds is 1 / (1/decode + 1/forward), with decode and forward measured alone,
one process per core at the same time. Limits are measured before and after each run, and the mean is what counts, so
that a machine whose speed drifts does not decide the ratio. Steady rate: from the first committed part to the last.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from lora_embed import cluster, run
from lora_embed.config import load_job, load_recipe
from lora_embed.decode import decode_image
from lora_embed.demo import parts
from lora_embed.fetch import cache_root
from lora_embed.model.build import build_encoder, gather
from lora_embed.model.encoder import load_encoder
from lora_embed.plan import list_shards
from lora_embed.progress import say
from lora_embed.read import read_samples
from lora_embed.schema import Layout

CHUNK = 32
LAYOUT = Layout(precision="float32", batch_size=16)
Limits = dict[str, float]


def write_mosaics(folder: Path, count: int, per_shard: int) -> None:
    """JPEGs of 500×375, each a mosaic of real images, in tars: a photograph's size and detail."""
    sources = [Image.open(image.path).convert("RGB") for image in parts.fetch_images(cache_root(), say)[:960]]
    rng = np.random.default_rng(3)
    tars = []
    for start in range(0, count, per_shard):
        members = []
        for number in range(start, min(start + per_shard, count)):
            mosaic = Image.new("RGB", (512, 384))
            for tile, source in enumerate(rng.choice(len(sources), 48)):
                mosaic.paste(sources[source], (tile % 8 * 64, tile // 8 * 64))
            buffer = io.BytesIO()
            mosaic.crop((0, 0, 500, 375)).save(buffer, "JPEG", quality=90)
            members.append((f"{number:06d}.jpg", buffer.getvalue()))
        tars.append(members)
    folder.mkdir(parents=True)
    for number, members in enumerate(tars):
        _write_tar(folder / f"{number:05d}.tar", members)


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def save_tiny_model(folder: Path) -> Path:
    """A ViT so small that decoding is all: the feeding-bound case."""
    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, patch_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


def measure_core(encoder_uri: str, shard_folder: str, count: int, barrier: Any, answers: Any) -> None:
    """Images/s of decoding alone and of the model alone, chunk by chunk, in one process beside its siblings."""
    torch.set_num_threads(1)
    encoder = load_encoder(encoder_uri)
    prepare = encoder.description.preprocessing
    samples = list(read_samples(list_shards((shard_folder,), {})[0], LAYOUT, {}, lambda number: True))[:count]
    seconds = {"decode": 0.0, "forward": 0.0}
    pixels = np.empty((CHUNK, *prepare.size, 3), np.uint8)
    encoder.embed_pixels(pixels[:16])
    barrier.wait()
    for start in range(0, len(samples) - CHUNK + 1, CHUNK):
        began = time.perf_counter()
        for row, sample in enumerate(samples[start : start + CHUNK]):
            pixels[row] = decode_image(sample.data or b"", prepare).pixels
        decoded = time.perf_counter()
        encoder.embed_pixels(pixels)
        seconds["decode"] += decoded - began
        seconds["forward"] += time.perf_counter() - decoded
    images = len(samples) // CHUNK * CHUNK
    answers.put((images / seconds["decode"], images / seconds["forward"]))


def measure_limits(encoder_uri: Path, shards: Path, count: int, cores: int) -> Limits:
    """Images/s of all cores together: decoding alone, the model alone, and both on the same cores."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(cores), context.Queue()
    arguments = (str(encoder_uri), str(shards), count, barrier, answers)
    processes = [context.Process(target=measure_core, args=arguments) for _ in range(cores)]
    for process in processes:
        process.start()
    measured = [answers.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    both = sum(1 / (1 / decode + 1 / forward) for decode, forward in measured)
    return {"decode": sum(m[0] for m in measured), "forward": sum(m[1] for m in measured), "both": both}


def measure_run(job_file: Path, table: Path) -> tuple[float, float, int]:
    """(steady images/s, seconds of the whole run, images); steady by the times at which parts were committed."""
    started = time.perf_counter()
    result = run.run_job(load_job(job_file, [f"table={table}"]), publishes=False)
    seconds = time.perf_counter() - started
    committed = sorted(part.stat().st_mtime_ns for part in (table / "staging").rglob("*.parquet"))
    steady = (result.embedded - CHUNK) / (committed[-1] - committed[0]) * 1e9
    return steady, seconds, result.embedded


def benchmark(name: str, base: Path, shards: Path, repeats: int, probe: int) -> dict[str, Any]:
    """One workload: limits and runs in turn; the ratio of each run to the mean of the limits around it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "recipe.yaml").write_text(yaml.safe_dump({"base_model": str(base), "merge_method": "none"}))
        job = {"recipe": "recipe.yaml", "input": str(shards), "table": "table", "chunk_size": CHUNK, "batch_size": 16}
        (home / "job.yaml").write_text(yaml.safe_dump(job | {"precision": "float32"}))
        cluster.connect()
        cores = int(ray.cluster_resources()["CPU"])
        encoder = home / "encoder"
        build_encoder(gather(load_recipe(home / "recipe.yaml")), encoder, say)
        limits = [measure_limits(encoder, shards, probe, cores)]
        runs = []
        for number in range(repeats):
            runs.append(measure_run(home / "job.yaml", home / f"table{number}"))
            limits.append(measure_limits(encoder, shards, probe, cores))
        around = [(one["both"] + other["both"]) / 2 for one, other in itertools.pairwise(limits)]
    ratios = [steady / limit for (steady, _, _), limit in zip(runs, around, strict=True)]
    return {
        "workload": name,
        "cores": cores,
        "images": runs[0][2],
        "limits_images_per_s": {key: [round(limit[key], 1) for limit in limits] for key in limits[0]},
        "steady_images_per_s": [round(steady, 1) for steady, _, _ in runs],
        "whole_run_s": [round(seconds, 1) for _, seconds, _ in runs],
        "steady_over_limit": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workload", choices=["feeding", "compute", "all"], default="all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = []
        if arguments.workload in ("feeding", "all"):
            write_mosaics(Path(folder) / "many", 8000, per_shard=1000)
            tiny = save_tiny_model(Path(folder) / "tiny")
            results.append(benchmark("feeding-bound, tiny ViT at 224", tiny, Path(folder) / "many", arguments.repeats, 1000))
        if arguments.workload in ("compute", "all"):
            write_mosaics(Path(folder) / "few", 512, per_shard=64)
            small = parts.fetch_base_model(cache_root(), say)
            results.append(benchmark("compute-bound, ViT-S/14 at 224", small, Path(folder) / "few", arguments.repeats, 64))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
