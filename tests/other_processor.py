"""The steps of `tests/images/test_processors.py`; most of them run in a process that computes as on another kind of processor.

`python other_processor.py FOLDER STEP ARGUMENT … + STEP …` prints a line of JSON after each step: all answers so far.
"""

import hashlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import embed_here, run_here
from lora_embed.chain import pipeline
from lora_embed.config.models import load_job, load_recipe
from lora_embed.model import merge
from lora_embed.model.build import build_encoder
from lora_embed.model.change import LowRank
from lora_embed.model.encoder import load_encoder
from lora_embed.model.fold import Limit
from lora_embed.model.ingredients import gather
from lora_embed.run.job import run_job
from lora_embed.schema import ChunkHead

EQUAL_METHODS = ("weighted_sum", "linear", "ties", "magnitude_prune")  # give the same bits on every processor


def multiply(folder: Path) -> dict[str, Any]:
    """The SHA-256 of merged changes in float64, by method, of factors that are the same numbers everywhere."""
    rng = np.random.default_rng(0)
    shape = torch.Size((301, 499))
    parts = []
    for weight in (0.3, 0.45, -0.1):
        up, down = (torch.from_numpy(rng.random(size, np.float32) - np.float32(0.5)) for size in ((301, 24), (24, 499)))
        parts.append(merge.Weighted(weight, LowRank(down=down, up=up, scale=1 / math.sqrt(3), shape=shape)))
    merged = {method: getattr(merge, method)(parts, torch.zeros(shape)) for method in EQUAL_METHODS}
    return {method: hashlib.sha256(change.numpy().tobytes()).hexdigest() for method, change in merged.items()}


def build(folder: Path) -> dict[str, Any]:
    """Each recipe built; the space ids by recipe."""
    spaces = {}
    for recipe in sorted(folder.glob("recipe-*.yaml")):
        ingredients = gather(load_recipe(str(recipe)))
        with tempfile.TemporaryDirectory() as scratch:
            spaces[recipe.stem] = build_encoder(ingredients, Path(scratch) / "encoder", str).space_id
    return spaces


def build_factors(folder: Path) -> dict[str, Any]:
    """An encoder that this processor's SVD made, kept as an adapter at `folder/factors`."""
    ingredients = gather(load_recipe(str(folder / "recipe-weighted_sum.yaml")))
    return {"space": build_encoder(ingredients, folder / "factors", str, limit=Limit(rank=3)).space_id}


def check(folder: Path, *encoders: str) -> dict[str, Any]:
    """How far these encoders, built by another processor, are from their golden vectors here, by precision."""
    return {
        precision: max(
            load_encoder(folder / name, precision=precision, check=False).check_golden(folder / name) for name in encoders
        )
        for precision in ("float32", "bfloat16", "float16")
    }


def run(folder: Path) -> dict[str, Any]:
    """The job, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        result = run_job(load_job(folder / "job.yaml"))
    return {"embedded": result.embedded, "version": result.version, "space": result.space_id}


def run_and_die(folder: Path, chunks: str) -> dict[str, Any]:
    """The job, in a process that is killed once it has committed this many chunks."""

    def embed(*arguments: Any) -> Iterator[ChunkHead]:
        for committed, stats in enumerate(embed_here(*arguments), start=1):
            if committed == int(chunks):
                os.kill(os.getpid(), signal.SIGKILL)
            yield stats

    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        patch.setattr(pipeline, "embed_items", embed)
        run_job(load_job(folder / "job.yaml"))
    return {}


STEPS = {step.__name__: step for step in (multiply, build, build_factors, check, run, run_and_die)}


def take(folder: Path, steps: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Take these steps here, such as "run" or "check encoder-a encoder-b"; all answers so far, after each."""
    answers: dict[str, Any] = {"kernels": torch.backends.cpu.get_cpu_capability()}
    for step in steps:
        name, *arguments = step.split()
        answers[name] = STEPS[name](folder, *arguments)
        yield answers


def main() -> None:
    torch.set_num_threads(1)
    for answers in take(Path(sys.argv[1]), " ".join(sys.argv[2:]).split(" + ")):
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
