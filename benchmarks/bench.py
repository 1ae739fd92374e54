"""lora-embed against what the machine allows and against its peers, all in one go, on the same images and weights.

Prints tables, and writes `bench.json` and `bench.svg`. Contestants take turns in another order at each repeat; limits are
measured before and after, so that a machine whose speed drifts does not decide. docs/performance.md says how to read it.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("LORA_EMBED_CACHE", str(Path(__file__).resolve().parents[1] / ".cache"))  # as the Makefile does

from chart import draw
from compare import RunTimes, Vectors, break_even, deviation_of, median_of, spread_of
from contestants import (
    DAFT,
    OURS,
    SCRIPTS,
    SILENT,
    ContestantFailed,
    Setting,
    forecast_s,
    read_vectors,
    remove_table,
    run_contestant,
)
from limits import core_limits, measure_start, measure_storage, measure_store
from lora_embed.monitor.progress import say
from lora_embed.store.fetch import cache_root
from meter import adopt_orphans
from places import Place, local_place, s3_place
from report import describe
from resume import measure_resume
from workloads import WORKLOADS, Workload, build_model, write_shards

PACKAGES = ("torch", "transformers", "ray", "pyarrow", "pillow", "webdataset", "daft")
REFERENCE = {"lora-embed": "guide", "lora-embed-bfloat16": "guide"}  # whose vectors one is held against; else lora-embed's


@dataclass
class Tally:
    """What one contestant did in a workload."""

    runs: list[RunTimes] = field(default_factory=list)
    vectors: Vectors | None = None
    failed: str = ""


def measure(workload: Workload, model: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """One workload: limits, then each contestant in turn, `repeats` times, limits again after each round."""
    shards, cores = write_shards(workload, folder / "shards"), len(os.sched_getaffinity(0))
    facts = {"about": workload.about, "model": workload.model, "images": workload.images, "shards": workload.shards}
    facts |= {"bytes": sum(shard.stat().st_size for shard in shards), "cores": cores}
    if workload.name == "resume":
        setting = Setting(workload=workload, place=local_place(shards, folder), model=model, cores=cores)
        return facts | {"resume": measure_resume(setting, shards, folder, repeats)}
    tallies = {name: Tally() for name in workload.contestants}
    probe = core_limits(model, folder / "shards", workload.probe, cores)
    with place_of(workload, shards, folder) as place, probe as limits_now:
        setting = Setting(workload=workload, place=place, model=model, cores=cores)
        limits = [limits_now()]
        storage = storage_of(place, shards, folder)
        forecast = forecast_s(setting, folder / "forecast")
        for number in range(repeats):
            turn = number % len(tallies)
            for name in [*list(tallies)[turn:], *list(tallies)[:turn]]:
                take_turn(name, tallies[name], setting, folder / f"{name}-{number}")
            limits.append(limits_now())
    both = sum(limit.both for limit in limits) / len(limits)
    return facts | {
        "limits_images_per_s": [asdict(limit) for limit in limits],
        "storage": storage,
        "forecast_s": forecast,
        "contestants": {name: summary(name, tallies, both) for name in tallies},
    }


@contextlib.contextmanager
def place_of(workload: Workload, shards: list[Path], folder: Path) -> Iterator[Place]:
    if workload.name != "s3":
        yield local_place(shards, folder)
        return
    with s3_place(shards, folder) as place:
        yield place


def storage_of(place: Place, shards: list[Path], folder: Path) -> dict[str, float]:
    if place.store is None:
        return measure_storage(shards, folder, 64)
    return measure_store(place.filesystem(), place.shards, place.tables, 64)


def take_turn(name: str, tally: Tally, setting: Setting, folder: Path) -> None:
    """One run; who failed once does not run again."""
    if tally.failed:
        return
    try:
        tally.runs.append(run_contestant(name, setting, folder))
        tally.vectors = tally.vectors or read_vectors(name, setting.place, folder)
        say(f"{setting.workload.name}: {name} {tally.runs[-1].whole_s:.1f} s")
    except ContestantFailed as failed:
        tally.failed = str(failed)
        say(f"{setting.workload.name}: {name} failed: {failed}")
    remove_table(setting.place, folder)


def summary(name: str, tallies: dict[str, Tally], limit: float) -> dict[str, Any]:
    """Runs, medians, spread, share of the limit (images/s), deviation of the vectors, break-even with lora-embed."""
    tally = tallies[name]
    if tally.failed or tally.vectors is None:
        return {"failed": tally.failed}
    median, ours = median_of(tally.runs), tallies["lora-embed"]
    found = {
        "precision": OURS.get(name, "float32"),
        "runs": [asdict(run) for run in tally.runs],
        "median": asdict(median),
        "spread": spread_of(tally.runs),
        "steady_over_limit": median.steady_images_per_s / limit,
    }
    reference = tallies.get(REFERENCE.get(name, "lora-embed"))
    if reference is not None and reference.vectors is not None:
        deviation = deviation_of(tally.vectors, reference.vectors)
        found["deviation"] = asdict(deviation) | {"is_same": deviation.is_same}
    if name not in OURS and ours.runs:
        found["break_even"] = asdict(break_even(median_of(ours.runs), median))
    return found


def machine() -> dict[str, Any]:
    """What it ran on, and with which versions."""
    places = [*sys.path, str(DAFT)]
    versions = {of.name: of.version for of in distributions(path=places) if of.name in PACKAGES}
    facts = dict(line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "native_bfloat16": bool({"avx512_bf16", "amx_bf16"} & set(facts.get("flags", "").split())),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def chosen(names: list[str] | None, *, short: bool) -> list[Workload]:
    """Those that are named, or all."""
    wanted = [workload for workload in WORKLOADS if not names or workload.name in names]
    return [workload.shortened() if short else workload for workload in wanted]


def among(names: list[str] | None, workload: Workload) -> Workload:
    """The workload with those of its contestants alone that are named, lora-embed always."""
    kept = (name for name in workload.contestants if not names or name in names or name == "lora-embed")
    return replace(workload, contestants=tuple(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few minutes at tiny sizes: does everything work?")
    parser.add_argument("--workload", action="append", metavar="NAME", help=", ".join(w.name for w in WORKLOADS))
    parser.add_argument("--contestant", action="append", metavar="NAME", help=", ".join([*OURS, *SCRIPTS]))
    parser.add_argument("--repeats", type=int, help="default 3, and 1 with --short")
    parser.add_argument("--out", type=Path, default=cache_root() / "bench", help="folder for bench.json and bench.svg")
    arguments = parser.parse_args()
    workloads = [among(arguments.contestant, workload) for workload in chosen(arguments.workload, short=arguments.short)]
    if not workloads:
        parser.error(f"no workload has one of the names {arguments.workload}")
    adopt_orphans()
    arguments.out.mkdir(parents=True, exist_ok=True)
    repeats, began = arguments.repeats or (1 if arguments.short else 3), time.time()
    found: dict[str, Any] = {"machine": machine(), "short": arguments.short, "repeats": repeats}
    found["start"] = measure_start(os.environ | SILENT)
    found["workloads"] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        models: dict[str, Path] = {}
        for workload in workloads:
            if workload.model not in models:
                models[workload.model] = build_model(workload.model, Path(scratch))
            folder = Path(scratch) / f"{workload.name}-run"
            found["workloads"][workload.name] = measure(workload, models[workload.model], folder, repeats)
            found["seconds"] = time.time() - began
            # Each time: what is measured stays if a later workload fails.
            (arguments.out / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, arguments.out / "bench.svg")
    print(describe(found))


if __name__ == "__main__":
    main()
