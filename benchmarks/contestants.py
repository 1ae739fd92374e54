"""Who does the work: how each contestant is started, when its vectors arrive, and where they lie afterwards."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset
import yaml

from compare import RunTimes, Vectors, sort_vectors, times_of
from lora_embed import open_table
from lora_embed.store.fetch import cache_root
from meter import Metered, run
from places import Place
from workloads import Workload

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
OURS = {"lora-embed": "float32", "lora-embed-bfloat16": "bfloat16"}  # → precision
SCRIPTS = {  # → file below peers, variant
    "guide": ("guide.py", ""),
    "dataloader": ("dataloader.py", ""),
    "ray-data": ("ray_data.py", ""),
    "daft": ("daft_udf.py", "webdataset"),
    "daft-bytes": ("daft_udf.py", "bytes"),
}
DAFT = cache_root().resolve() / "peers" / "daft"  # by itself: its metadata want an older pyarrow than this project's
BATCH_SIZE = 16
LAST_WORDS = 20  # lines that a failure shows of its log
SILENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0", "DAFT_ANALYTICS_ENABLED": "0",
}  # fmt: skip


class ContestantFailed(Exception):
    """It ended with an error or ran past its limit; the message says which, and shows its last lines."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contestants of a workload share."""

    workload: Workload
    place: Place
    model: Path  # an encoder's directory
    cores: int


class Arrivals:
    """When parts of a table came to be, in the order of their times: (seconds since the epoch, images)."""

    def __init__(self, place: Place, table: str, images: int) -> None:
        self._filesystem, self._folder, self._images = place.filesystem(), f"{table}/staging", images
        self._is_local = place.store is None
        self._seen: dict[str, float] = {}
        self._next = 0.0

    def look(self) -> None:
        """List the parts; those on a disk have their times, others that of the look, five times a second."""
        if self._is_local:
            for path in Path(self._folder).glob("*/*/*.parquet"):
                if str(path) not in self._seen:
                    with contextlib.suppress(FileNotFoundError):  # absorbed by a version just now
                        self._seen[str(path)] = path.stat().st_mtime
        elif time.time() >= self._next:
            self._next = time.time() + 0.2
            self._filesystem.invalidate_cache()
            for found in self._filesystem.find(self._folder):
                if found.endswith(".parquet"):
                    self._seen.setdefault(found, time.time())

    def times(self) -> list[tuple[float, int]]:
        return [(moment, self._images) for moment in sorted(self._seen.values())]


def run_contestant(name: str, setting: Setting, folder: Path) -> RunTimes:
    """One run; `folder`, a new one, gets its log, and gives its table the name. Raises ContestantFailed."""
    folder.mkdir(parents=True)
    return run_ours(name, setting, folder) if name in OURS else run_peer(name, setting, folder)


def run_ours(name: str, setting: Setting, folder: Path) -> RunTimes:
    """`jobs/embed.py`, from its start to a published version."""
    workload = setting.workload
    arrivals = Arrivals(setting.place, f"{setting.place.tables}/{folder.name}", min(workload.chunk_size, workload.per_shard))
    metered = finish(command_of_ours(name, setting, folder), setting, folder, arrivals.look)
    if not arrivals.times():
        raise ContestantFailed("no part was seen: they were absorbed faster than they were looked for")
    return times_of(metered, arrivals.times(), workload.images)


def command_of_ours(name: str, setting: Setting, folder: Path) -> list[str]:
    """Write the job file and say how it is run."""
    job = {
        "recipe": str(setting.model),
        "input": setting.place.inputs,
        "table": setting.place.uri(f"{setting.place.tables}/{folder.name}"),
        "chunk_size": setting.workload.chunk_size,
        "batch_size": BATCH_SIZE,
        "precision": OURS[name],
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return [sys.executable, str(ROOT / "jobs" / "embed.py"), "--config", str(folder / "job.yaml"), "--json"]


def forecast_s(setting: Setting, folder: Path) -> float:
    """Seconds that a run would take by `lora-embed plan --forecast`, before there is a table. Raises ContestantFailed."""
    folder.mkdir(parents=True)
    command_of_ours("lora-embed", setting, folder)  # for the job file
    command = [str(Path(sys.executable).parent / "lora-embed"), "plan", str(folder / "job.yaml"), "--forecast", "--json"]
    finish(command, setting, folder)
    said = (folder / "log.txt").read_text().splitlines()
    return float(json.loads(next(line for line in reversed(said) if line.startswith("{")))["forecast"]["seconds"])


def run_peer(name: str, setting: Setting, folder: Path) -> RunTimes:
    """A script of `peers`, from its start to a written table."""
    place, (script, variant) = setting.place, SCRIPTS[name]
    table, progress = f"{place.tables}/{folder.name}", folder / "progress.txt"
    place.filesystem().makedirs(table, exist_ok=True)
    task = {
        "shards": place.signed if name == "dataloader" and place.signed else place.shards,
        "model": str(setting.model),
        "out": table,
        "progress": str(progress),
        "batch_size": BATCH_SIZE,
        "cores": setting.cores,
        "store": place.store,
        "variant": variant,
    }
    (folder / "task.json").write_text(json.dumps(task))
    environment = {"PYTHONPATH": str(DAFT)} if name.startswith("daft") and DAFT.is_dir() else {}
    command = [sys.executable, str(PEERS / script), str(folder / "task.json")]
    metered = finish(command, setting, folder, environment=environment)
    arrivals = [line.split() for line in progress.read_text().splitlines()]
    return times_of(metered, sorted((float(moment), int(images)) for moment, images in arrivals), setting.workload.images)


def finish(
    command: list[str],
    setting: Setting,
    folder: Path,
    watch: Callable[[], object] = lambda: None,
    environment: dict[str, str] | None = None,
) -> Metered:
    """Run to a good end. Raises ContestantFailed."""
    log, limit_s = folder / "log.txt", setting.workload.limit_s
    own = SILENT | {"LORA_EMBED_CACHE": str(folder / "cache")} | setting.place.environment | (environment or {})
    metered = run(command, log, os.environ | own, limit_s, watch)
    if metered.exit_code == 0:
        return metered
    how = f"exit code {metered.exit_code}" if metered.exit_code is not None else f"killed after {limit_s:.0f} s"
    words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_WORDS:]
    raise ContestantFailed("\n".join([f"{how}: {words[-1] if words else 'no output'}", *words]))


def read_vectors(name: str, place: Place, folder: Path) -> Vectors:
    """The table that a run left."""
    table = f"{place.tables}/{folder.name}"
    if name in OURS:
        opened = open_table(place.uri(table), storage_options=place.storage_options())
        return sort_vectors(opened.to_dataset().to_table(columns=["id", "embedding"]))
    files = pyarrow.dataset.dataset(table, filesystem=place.filesystem(), format="parquet")
    return sort_vectors(files.to_table(columns=["id", "embedding"]))


def remove_table(place: Place, folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        place.filesystem().rm(f"{place.tables}/{folder.name}", recursive=True)
