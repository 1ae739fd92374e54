"""Sixteen readers of a table that is published to all the time: `python campaigns/readers.py --minutes 10`.

A publisher adds, changes and removes shards, trains the adapter again, forgets images and rolls back, on a real S3 server,
and keeps few versions for a short grace period. The readers look at the status, search, read everything by the package and
by pyarrow alone, some in a process for each read; what each of them has read of a version must be what the publisher's model
says of it, bit for bit. Ends with exit code 1 where a read fails, differs, or goes back to an earlier version.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch

from jobs import run_here, tiny_recipe, write_job
from lora_embed import open_table
from lora_embed.config.models import load_job
from lora_embed.table.read import Table
from lora_embed.table.status import describe_table
from month_world import Month, embedding, forgetting, rolling_back
from s3 import OWNER, s3_server
from samples import png

TABLE, SHARDS, BUCKET = "s3://readers/table", "s3://readers/shards", "readers"
KEPT_VERSIONS, GRACE_S, HELD_S = 3, 60.0, 45.0
MOST_SHARDS = 15  # each night's file is small, so that some are put together
PAUSE_S = 1.0  # at most, between two reads of a reader
STARTING_S, LATE_S = 1800.0, 600.0  # for the first version and the first read of each; for the last read of each
KINDS = {  # who reads → how many
    "status": 3, "status by a process": 1, "search": 3, "search by a process": 1,
    "open and read all": 2, "read a version again": 2, "pyarrow alone": 4,
}  # fmt: skip


class Read(NamedTuple):
    """What a read has found: the version, and a digest of ids and vectors where it has read them all."""

    version: int
    digest: str | None = None
    again: int = 0  # times it had to start again


def digest(rows: dict[str, bytes]) -> str:
    """Of vectors by id."""
    return hashlib.sha256(b"".join(id_.encode() + rows[id_] for id_ in sorted(rows))).hexdigest()


def vectors_of(ids: pa.ChunkedArray, embedding: Any, dimension: int) -> dict[str, bytes]:
    values = embedding.combine_chunks() if isinstance(embedding, pa.ChunkedArray) else embedding
    matrix = values.flatten().to_numpy().reshape(-1, dimension)
    return {id_: matrix[row].tobytes() for row, id_ in enumerate(ids.to_pylist())}


def read_all(table: Table) -> dict[str, bytes]:
    rows: dict[str, bytes] = {}
    for batch in table.batches(["id", "embedding"]):
        rows |= vectors_of(batch.column("id"), batch.column("embedding"), table.dimension)
    assert len(rows) == table.count, f"{len(rows)} of {table.count} vectors"
    return rows


def look(place: Path) -> Read:
    """`lora-embed status`."""
    state = describe_table(TABLE)
    assert state.version is not None
    assert state.counts["samples"] == state.counts["vectors"] + state.counts["rejects"]
    return Read(state.version)


def search(place: Path) -> Read:
    """`lora-embed search`, held against all cosines of the version it has searched."""
    from lora_embed.search.search import search_image

    table = open_table(TABLE)
    found = search_image(table, str(place / "query.png"), 5, None)
    assert (found.version, found.space_id) == (table.version, table.space_id)
    rows = read_all(table)
    if not rows:
        return Read(table.version, digest(rows))
    matrix = np.array([np.frombuffer(vector, np.float32) for vector in rows.values()], np.float64)
    from PIL import Image

    query = table.encoder().embed([Image.open(place / "query.png")])[0].astype(np.float64)
    cosines = matrix @ query / np.linalg.norm(matrix, axis=1) / np.linalg.norm(query)
    assert [hit.score for hit in found.hits] == pytest.approx(sorted(cosines, reverse=True)[:5], abs=1e-5)
    return Read(table.version, digest(rows))


def run_command(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from lora_embed.cli.main import main; main()", *arguments, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def look_by_a_process(place: Path) -> Read:
    return Read(run_command("status", TABLE)["version"])


def search_by_a_process(place: Path) -> Read:
    return Read(run_command("search", TABLE, str(place / "query.png"))["version"])


def open_and_read(place: Path) -> Read:
    table = open_table(TABLE)
    return Read(table.version, digest(read_all(table)))


class Holder:
    """Opens a version and reads it again and again for most of the grace period, whatever is published meanwhile."""

    def __init__(self) -> None:
        self.table: Table | None = None
        self.since = 0.0

    def __call__(self, place: Path) -> Read:
        if self.table is None or time.monotonic() - self.since > HELD_S:
            self.table, self.since = open_table(TABLE), time.monotonic()
        return Read(self.table.version, digest(read_all(self.table)))


def read_alone(place: Path) -> Read:
    """As a program in another language does: highest manifest → files, which are held against their sums."""
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    fs = pyarrow.fs.S3FileSystem(
        access_key=OWNER[0], secret_key=OWNER[1], endpoint_override=endpoint, scheme="http", region="us-east-1"
    )
    folder = TABLE.removeprefix("s3://")

    def content(path: str) -> bytes:
        with fs.open_input_stream(f"{folder}/{path}") as file:
            data: bytes = file.read()
            return data

    again = 0
    while True:
        listed = fs.get_file_info(pyarrow.fs.FileSelector(f"{folder}/versions"))
        number = max(int(file.base_name[:8]) for file in listed)
        try:
            manifest = json.loads(content(f"versions/{number:08d}.json"))
            break
        except FileNotFoundError:  # retired just now
            again += 1
    assert (manifest["format"], manifest["version"]) == (1, number)
    rows: dict[str, bytes] = {}
    for entry in manifest["files"]:
        data = content(entry["path"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        read = pq.read_table(pa.BufferReader(data), columns=["id", "embedding"])
        assert read.num_rows == entry["rows"]
        rows |= vectors_of(read.column("id"), read.column("embedding"), manifest["dimension"])
    assert len(rows) == manifest["counts"]["vectors"]
    return Read(number, digest(rows), again)


READS: dict[str, Callable[[Path], Read]] = {
    "status": look,
    "status by a process": look_by_a_process,
    "search": search,
    "search by a process": search_by_a_process,
    "open and read all": open_and_read,
    "pyarrow alone": read_alone,
}


def read_on(kind: str, number: int, place: Path, begins: Event, ends: Event) -> None:
    """A reader: from the one event to the other, a line of JSON for each read into a file of its own."""
    find_server(place, begins)
    read = Holder() if kind == "read a version again" else READS[kind]
    rng, seen = random.Random(number), 0
    with (place / f"reads-{number}.jsonl").open("w") as file:
        while not ends.is_set():
            started, line = time.monotonic(), {"kind": kind, "first": seen == 0}
            try:
                found = read(place)
                assert found.version >= seen, f"version {found.version} after {seen}"
                seen = found.version
                line |= found._asdict()
            except Exception as error:  # noqa: BLE001 that none fails is what is looked for
                line |= {"error": f"{type(error).__name__}: {error}"}
            file.write(json.dumps(line | {"seconds": time.monotonic() - started}) + "\n")
            file.flush()
            time.sleep(rng.uniform(0, PAUSE_S))


def publish_on(seed: int, place: Path, begins: Event, ends: Event) -> None:
    """The publisher: after the first version a file says so; in the end another holds each version's digest."""
    find_server(place, begins)
    retain = {"versions": KEPT_VERSIONS, "grace_days": GRACE_S / 86400}
    options = {"chunk_size": 4, "max_rejects": 1.0, "max_removed": 1.0, "retain": retain, "input": [SHARDS], "table": TABLE}
    job = load_job(write_job(place, tiny_recipe(place), place, **options))
    month = Month(place, job, random.Random(seed), most_shards=MOST_SHARDS)
    happened: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        what = ""
        while not ends.is_set():
            month.go_on(changes_adapter=0.9 if what == "held back" else 0.1)
            month.mirror()
            step = month.rng.choices([embedding, forgetting, rolling_back], [8, 1, 1])[0](month)
            what = step.act()
            month.note(step.made)
            happened[what] += 1
            if month.published:
                (place / "published").write_text("yes")
    truth = {version: digest(content.rows) for version, content in month.published.items()}
    (place / "truth.json").write_text(json.dumps({"happened": happened, "digests": truth}))


def wait_for(files: list[Path], publisher: ForkProcess) -> None:
    """Until there is something in each: imports alone take minutes on a machine that is busy."""
    deadline = time.monotonic() + STARTING_S
    while not all(path.exists() and path.stat().st_size for path in files):
        assert publisher.is_alive(), "the publisher died"
        assert time.monotonic() < deadline, "nothing was published, or not read"
        time.sleep(0.1)


def find_server(place: Path, begins: Event) -> None:
    """Wait for it, and take its address and keys into the environment."""
    begins.wait()
    os.environ.update(json.loads((place / "environment").read_text()))


def collect(place: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines = [json.loads(line) for path in sorted(place.glob("reads-*.jsonl")) for line in path.read_text().splitlines()]
    return lines, json.loads((place / "truth.json").read_text())


def find_faults(lines: list[dict[str, Any]], truth: dict[str, Any]) -> list[str]:
    """What must not be: reads that failed, and those of something else than the version is."""
    faults = [f"{line['kind']}: {line['error']}" for line in lines if "error" in line]
    for line in lines:
        expected = truth["digests"].get(str(line.get("version")))
        if line.get("digest") not in (None, expected):
            faults.append(f"{line['kind']}: version {line['version']} is not what was published")
    return faults


def describe(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of how many reads of each kind there were, and how long they took."""
    seconds: dict[str, list[float]] = defaultdict(list)
    versions: dict[str, set[int]] = defaultdict(set)
    for line in lines:
        if not line["first"]:  # which imports
            seconds[line["kind"]].append(line["seconds"])
        versions[line["kind"]].add(line.get("version", 0))
    rows = ["| reader | readers | reads | versions seen | p50, s | p99, s | longest, s |", "| --- " * 7 + "|"]
    for kind, readers in KINDS.items():
        p50, p99, most = np.percentile(seconds[kind] or [0.0], [50, 99, 100])
        rows += [
            f"| {kind} | {readers} | {len(seconds[kind]):,} | {len(versions[kind])} | {p50:.2f} | {p99:.2f} | {most:.2f} |"
        ]
    return "\n".join(rows)


def read_while_publishing(minutes: float, seed: int, place: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All that was read, and what is true."""
    (place / "shards").mkdir()
    (place / "query.png").write_bytes(png(1))
    kinds = [kind for kind, readers in KINDS.items() for _ in range(readers)]
    forks = multiprocessing.get_context("fork")  # before there are threads: seventeen imports take minutes on two cores
    begins, first, read, published = (forks.Event() for _ in range(4))
    publisher = forks.Process(target=publish_on, args=(seed, place, begins, published), daemon=True)
    readers = [forks.Process(target=read_on, args=(kind, n, place, first, read), daemon=True) for n, kind in enumerate(kinds)]
    for process in (publisher, *readers):
        process.start()
    with s3_server(place / "server") as server:
        server.make_bucket(BUCKET)
        variables = server.environment() | {"LORA_EMBED_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
        (place / "environment").write_text(json.dumps(variables))
        begins.set()
        wait_for([place / "published"], publisher)
        first.set()
        resident = [number for number, kind in enumerate(kinds) if "process" not in kind]
        wait_for([place / f"reads-{number}.jsonl" for number in resident], publisher)
        time.sleep(minutes * 60)
        for event, processes in ((read, readers), (published, [publisher])):
            event.set()
            for process in processes:
                process.join(LATE_S)
                assert process.exitcode == 0, "a reader or the publisher hangs, or died"
        return collect(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where every read goes, a line of JSON each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the readers end too
    with tempfile.TemporaryDirectory(prefix="readers") as place:
        lines, truth = read_while_publishing(arguments.minutes, arguments.seed, Path(place))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    faults = find_faults(lines, truth)
    print(f"{describe(lines)}\n{len(truth['digests'])} versions: {truth['happened']}")
    print(f"started again: {sum(line.get('again', 0) for line in lines)} times, since a version was retired just then")
    print("\n".join([f"{len(faults)} of {len(lines):,} reads failed", *faults[:20]]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
