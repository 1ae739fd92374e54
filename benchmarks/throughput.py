"""Steady rate of a run against what its cores allow, on the same images in the same go; prints JSON.

The limit of a core that both decodes and embeds is 1 / (1/decode + 1/forward), with decode and forward measured alone,
one process per core at the same time. Limits are measured before and after each run, and the mean is what counts, so
that a machine whose speed drifts does not decide the ratio. Steady rate: from the first committed chunk to the last.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from lora_embed import pipeline, run
from lora_embed.config import load_job
from lora_embed.decode import decode_image
from lora_embed.demo import parts
from lora_embed.fetch import cache_root
from lora_embed.plan import list_shards
from lora_embed.progress import say
from lora_embed.read import read_samples
from lora_embed.schema import ChunkStats, Layout

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
    """Images/s of decoding alone and of the model alone, in one process beside its siblings."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from lora_embed.model.encoder import load_encoder

    torch.set_num_threads(1)
    encoder = load_encoder(encoder_uri)
    prepare = encoder.description.preprocessing
    samples = list(read_samples(list_shards((shard_folder,), {})[0], LAYOUT, {}, lambda number: True))[:count]
    encoder.embed_pixels(np.stack([decode_image(s.data or b"", prepare).pixels for s in samples[:16]]))
    barrier.wait()
    started = time.perf_counter()
    pixels = np.stack([decode_image(sample.data or b"", prepare).pixels for sample in samples])
    decoded = time.perf_counter()
    barrier.wait()
    again = time.perf_counter()
    encoder.embed_pixels(pixels)
    ended = time.perf_counter()
    answers.put((len(samples) / (decoded - started), len(samples) / (ended - again)))


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
    """(steady images/s, seconds of the whole run, images)."""
    arrivals: list[tuple[float, ChunkStats]] = []
    embed_items = pipeline.embed_items

    def timed(*arguments: Any) -> Any:
        for stats in embed_items(*arguments):
            arrivals.append((time.perf_counter(), stats))
            yield stats

    pipeline.embed_items = timed
    started = time.perf_counter()
    try:
        run.run_job(load_job(job_file, [f"table={table}"]))
    finally:
        pipeline.embed_items = embed_items
    seconds = time.perf_counter() - started
    first, last = arrivals[0][0], arrivals[-1][0]
    after_first = sum(stats.samples for moment, stats in arrivals[1:])
    return after_first / (last - first), seconds, sum(stats.samples for _, stats in arrivals)


def benchmark(name: str, base: Path, shards: Path, repeats: int, probe: int) -> dict[str, Any]:
    """One workload: limits and runs in turn; the ratio of each run to the mean of the limits around it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "recipe.yaml").write_text(yaml.safe_dump({"base_model": str(base), "merge_method": "none"}))
        job = {"recipe": "recipe.yaml", "input": str(shards), "table": "table", "chunk_size": 32, "batch_size": 16}
        (home / "job.yaml").write_text(yaml.safe_dump(job | {"precision": "float32"}))
        pipeline.connect()
        cores = int(ray.cluster_resources()["CPU"])
        run.provide_encoder(run.gather(run.find_recipe(str(home / "recipe.yaml"))), None, run.Store(str(home / "e")), None)
        encoder = next((home / "e" / "encoders").iterdir())
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
            write_mosaics(Path(folder) / "many", 6000, per_shard=250)
            tiny = save_tiny_model(Path(folder) / "tiny")
            results.append(benchmark("feeding-bound, tiny ViT at 224", tiny, Path(folder) / "many", arguments.repeats, 1500))
        if arguments.workload in ("compute", "all"):
            write_mosaics(Path(folder) / "few", 512, per_shard=64)
            small = parts.fetch_base_model(cache_root(), say)
            results.append(benchmark("compute-bound, ViT-S/14 at 224", small, Path(folder) / "few", arguments.repeats, 64))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
