"""A night over a table of many shards, of which one changed, one is gone and one is new, through the job's entry point.

Tars are real, three tiny images each: sixteen different ones under as many names as asked for. One run embeds sixteen of
them; the parts of all others are staged with the vectors that it made, and the same command publishes them. Then come the
night, a quiet night, forgetting one image, and, two days later by the disk's clock, `gc`, after which no object holds the
vector of that image. Each step is a process of its own. For each: seconds, peak memory of the process, requests and bytes by
folder of the stores, and, with `--profile`, seconds by function. Prints JSON; functions that grow faster than the shards are
named at the end.
"""

import argparse
import cProfile
import hashlib
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import itertools

from lora_embed.cli import main as cli_main
from lora_embed.config.models import load_job
from lora_embed.run.open import references_of
from lora_embed.schema import ChunkHead, Layout, Shard, sample_schema
from lora_embed.shards import listing
from lora_embed.store.store import Store
from lora_embed.table.parts import make_part, part_path, write_part
from lora_embed.table.read import open_table
from lora_embed.table.verify import verify_table
from night_inputs import KINDS, Loose, References, Tars
from traffic import counted_traffic

Input = Tars | Loose | References
GROWTH = 1.5  # times the growth of the shards, of the seconds that a function takes: more is named
NOTICED_S = 0.5
NOISE = 2e-6


def write_job(folder: Path, content: Input) -> Path:
    """A model of 384 dimensions, one layer deep, with two adapters."""
    from jobs import write_recipe  # imports torch, whose memory would count as that of each step
    from models import save_adapter, save_base

    base = save_base(folder / "base", "vit", hidden_size=384, num_hidden_layers=1, num_attention_heads=6)
    adapters = {save_adapter(folder / "ten", base, 10, seed=1): 0.5, save_adapter(folder / "more", base, 27, seed=2): 0.5}
    recipe = write_recipe(folder, base, adapters)
    job = folder / "job.yaml"
    settings = {"recipe": str(recipe), "input": [content.input], "table": str(folder / "table"), "precision": "float32"}
    settings |= {"batch_size": 16, "resources": {"actors": {"max": 1}}, "retain": {"versions": 2, "grace_days": 1}}
    settings |= content.settings
    job.write_text(yaml.safe_dump(settings))
    return job


def stage_others(folder: Path, job: Path, content: Input) -> None:
    """Parts of all shards that the first version lacks, with the vectors that it has of the same contents."""
    opened = open_table(str(folder / "table"))
    layout = Layout(**opened.manifest.lineage["layout"] | {"carry": ()})
    rows = opened.to_dataset().to_table().to_pylist()
    by_content = {content.content(row["shard"], row["key"]): row for row in rows}
    store = Store(str(folder / "table"))
    (folder / "table" / part_path(opened.space_id, layout.layout_id)).mkdir(parents=True, exist_ok=True)
    os.fsync = lambda file: None  # what is staged here need not survive a power cut
    known = {shard.id for shard in opened.manifest.shards.values()}
    for number, shard in enumerate(listing.list_shards((content.input,), {}, references=references_of(load_job(job)))):
        if shard.id not in known:
            staged = [by_content[made] | {"key": key} for key, made in content.names(shard)]
            _stage(store, opened.space_id, layout, shard, staged, number)


def _stage(store: Store, space_id: str, layout: Layout, shard: Shard, rows: list[dict[str, Any]], seed: int) -> None:
    head = ChunkHead(shard_id=shard.id, shard_name=shard.name, prefix=shard.prefix, last=True, good=len(rows))
    samples = [{name: row[name] for name in ("key", "width", "height", "sha256")} for row in rows]
    batch = pa.RecordBatch.from_pylist([sample | {"reason": None, "detail": None} for sample in samples], sample_schema(()))
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    # Their last bits are noise, below the limit of `drift`: else equal vectors would be compressed as no real ones are.
    vectors *= 1 + np.random.default_rng(seed).uniform(-NOISE, NOISE, vectors.shape).astype(np.float32)
    write_part(store, space_id, layout, head, make_part(head, batch, vectors, layout))


def drive(arguments: list[str], profiles: bool) -> dict[str, Any]:
    """One command in this process, counted."""
    entry: Callable[[list[str]], int] = cli_main.nightly_job if arguments[0] == "nightly" else cli_main.run_command
    given = arguments[1:] if arguments[0] == "nightly" else arguments
    profile = cProfile.Profile(time.thread_time)  # CPU seconds, which other work on the machine hardly changes
    started = time.monotonic()
    with counted_traffic() as traffic:
        code = profile.runcall(entry, given) if profiles else entry(given)
    found = {
        "command": " ".join(arguments[:1]),
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 2),
        "peak_mb": _peak_kb() // 1024,
        "traffic": traffic.table(),
        "most_reads_of_a_file": max(traffic.paths_read.values(), default=0),
    }
    return found | ({"functions": _functions(profile)} if profiles else {})


def _peak_kb() -> int:
    """The most memory of this process so far. Not `ru_maxrss`, which is at least that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def _functions(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds in and below each function of the package."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ours = {(file, name): row[3] for (file, _, name), row in stats.items() if "/lora_embed/" in file}
    return {f"{Path(file).stem}.{name}": round(seconds, 3) for (file, name), seconds in ours.items() if seconds >= 0.01}


def step(folder: Path, arguments: list[str], *, profiles: bool = False) -> dict[str, Any]:
    """One command in a process of its own."""
    command = [sys.executable, __file__, *(["--profile"] if profiles else []), "--drive", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=folder)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["exit_code"] == 0, found
    return found


def measure(folder: Path, content: Input, *, profiles: bool, adds_column: bool) -> dict[str, Any]:
    """All steps at one size."""
    images = content.count * content.images_each
    content.write()
    job = write_job(folder, content)
    found: dict[str, Any] = {"count": content.count, "images": images}
    step(folder, ["nightly", "--config", str(job), "--set", f"input={content.first}"])
    stage_others(folder, job, content)
    # The first images are in shards of other names, unless they are tars.
    found["publish all"] = step(folder, ["nightly", "--config", str(job), "--set", "max_removed=1"], profiles=profiles)
    opened = open_table(str(folder / "table"))
    assert opened.count == images
    found["data files"] = {entry.path: entry.bytes for entry in opened.manifest.files}
    before = {entry.path for entry in opened.manifest.files}
    content.change()
    found["night"] = step(folder, ["nightly", "--config", str(job)], profiles=profiles)
    now = open_table(str(folder / "table"))
    assert now.count == images + content.grows
    touched = {path: found["data files"][path] for path in before - {entry.path for entry in now.manifest.files}}
    found["touched bytes"] = sum(touched.values())
    found["state"] = _last_state(folder)
    found["quiet night"] = step(folder, ["nightly", "--config", str(job)], profiles=profiles)
    if adds_column:
        vectors = _hash_of_vectors(folder)
        job.write_text(job.read_text() + "carry: [folder]\n")
        found["column added"] = step(folder, ["nightly", "--config", str(job)], profiles=profiles)
        found["column added"]["state"] = _last_state(folder)
        found["column added"]["vectors are equal"] = _hash_of_vectors(folder) == vectors
        now = open_table(str(folder / "table"))
    vector = now.rows([content.added], ["embedding"]).to_pylist()[0]["embedding"]
    found["forget"] = step(folder, ["forget", str(folder / "table"), content.added, "--why", "asked"], profiles=profiles)
    found["files with the vector"] = {"before": holders_of(folder / "table", vector)}
    age(folder / "table", days=2)
    found["gc"] = step(folder, ["gc", str(folder / "table")], profiles=profiles)
    found["files with the vector"]["after gc"] = holders_of(folder / "table", vector)
    verify_table(open_table(str(folder / "table")))
    return found


def _hash_of_vectors(folder: Path) -> int:
    """The sum of the SHA-256 of each id with its vector, which does not depend on the order of rows."""
    total = 0
    for entry in open_table(str(folder / "table")).manifest.files:
        for batch in pq.ParquetFile(folder / "table" / entry.path).iter_batches(columns=["id", "embedding"]):
            vectors = batch["embedding"].flatten().to_numpy().reshape(batch.num_rows, -1)
            for id_, vector in zip(batch["id"].to_pylist(), vectors, strict=True):
                total += int.from_bytes(hashlib.sha256(id_.encode() + vector.tobytes()).digest(), "big")
    return total


def age(folder: Path, days: float) -> None:
    """Make all that lies there older than the grace period, by the disk's clock."""
    for path in folder.rglob("*"):
        if path.is_file():
            when = path.stat().st_mtime - days * 86400
            os.utime(path, (when, when))


def holders_of(folder: Path, vector: list[float]) -> int:
    """Objects of any kind that hold the vector: Parquet by its rows, others by their bytes."""
    wanted = np.array(vector, np.float32)
    return sum(_holds(path, wanted) for path in folder.rglob("*") if path.is_file())


def _holds(path: Path, wanted: NDArray[np.float32]) -> bool:
    if path.suffix != ".parquet":
        return wanted.tobytes() in path.read_bytes()
    with pq.ParquetFile(path) as file:
        if "embedding" not in file.schema_arrow.names:
            return False
        batches = (batch.column("embedding").flatten().to_numpy() for batch in file.iter_batches(8192, columns=["embedding"]))
        return any(bool((values.reshape(-1, len(wanted)) == wanted).all(axis=1).any()) for values in batches)


def _last_state(folder: Path) -> dict[str, Any]:
    """The record of the last run that embedded something."""
    record = max((folder / "table" / "runs").glob("*/record.json"))
    found = json.loads(record.read_text())
    return {key: found[key] for key in ("seconds", "embedded", "stages", "outcome")}


def name_growth(results: list[dict[str, Any]]) -> list[str]:
    """Functions whose seconds grow faster than the shards, of those that take long enough to tell."""
    named = []
    for small, large in itertools.pairwise(results):
        for name in ("publish all", "night", "quiet night", "forget", "gc"):
            grows = large["count"] / small["count"]
            before = small[name].get("functions", {})
            for function, seconds in large[name].get("functions", {}).items():
                if seconds >= NOTICED_S and seconds > GROWTH * grows * max(before.get(function, 0.0), 0.02):
                    was = before.get(function, 0.0)
                    named.append(f"{name}: {function} {was} s at {small['count']:,}, {seconds} s at {large['count']:,}")
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--kind", choices=KINDS, default="tars", help="what is counted: tars, loose images or references")
    parser.add_argument("--new", type=int, default=2, help="loose images that come in the night")
    parser.add_argument("--column", action="store_true", help="also add a carried field to the table")
    parser.add_argument("--place", help="where the input lies, for example s3://bucket/night, for references only")
    parser.add_argument("--profile", action="store_true", help="seconds by function, which slows the whole by a tenth or more")
    parser.add_argument("--keep", type=Path, help="leave input and table of the last size in this folder")
    parser.add_argument("--drive", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # this process is one step
    arguments = parser.parse_args()
    if arguments.drive:
        print("\n" + json.dumps(drive(arguments.drive, arguments.profile)))
        return
    results = []
    for count in arguments.count:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            options = {"new": arguments.new} if arguments.kind == "loose" else {}
            content = KINDS[arguments.kind](arguments.place or str(folder), count, **options)
            results.append(measure(folder, content, profiles=arguments.profile, adds_column=arguments.column))
            print(json.dumps(results[-1], indent=1), file=sys.stderr)
            if arguments.keep is not None and count == arguments.count[-1]:
                shutil.copytree(folder, arguments.keep)
    print(json.dumps({"results": results, "faster than the shards": name_growth(results)}, indent=1))


if __name__ == "__main__":
    main()
