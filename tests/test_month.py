"""Thirty nights of one table: shards and adapters come and go, runs are killed and overtaken, versions rolled back.

Each night every retained version is read by plain pyarrow and held against a model that knows only what was published.
"""

import contextlib
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import job_of, tiny_recipe
from lora_embed import cluster, load_encoder, pipeline
from lora_embed.config import JobConfig
from lora_embed.embed import EmbedShards
from lora_embed.errors import GateFailed, IncompleteRun
from lora_embed.model.encoder import Encoder
from lora_embed.run import run_job
from lora_embed.schema import ChunkStats, WorkItem, encoder_path
from lora_embed.storage import Store
from lora_embed.versions import roll_back
from models import edit_tensors
from samples import png, tar_of

NIGHTS, THROUGH_RAY = 30, (4, 13, 22)
KEEP, GRACE_DAYS = 4, 3
DAY = 86400.0
Rows = dict[str, bytes]


class Killed(BaseException):
    """The process ends here: nothing that it would still have done is done."""


@dataclass
class Month:
    """The world outside of the table, and what each version must hold."""

    folder: Path
    job: JobConfig
    rng: random.Random
    shards: dict[str, dict[str, int | None]] = field(default_factory=dict)  # name → key → image; None is no image
    published: dict[int, Rows] = field(default_factory=dict)
    made: int = 0
    encoders: dict[str, Encoder] = field(default_factory=dict)

    @property
    def table(self) -> Path:
        return Path(self.job.table)

    @property
    def store(self) -> Store:
        return Store(self.job.table)

    def change_shards(self) -> None:
        """Add, change and remove some; a changed one is another one in size or time."""
        for _ in range(self.rng.randint(0, 3)):
            event = self.rng.choice(["add", "change", "remove"]) if len(self.shards) > 2 else "add"
            name = f"{self.made:04d}.tar" if event == "add" else self.rng.choice(sorted(self.shards))
            self.made += 1
            if event == "remove":
                del self.shards[name]
                (self.folder / "shards" / name).unlink()
                continue
            count = self.rng.choice([0, 1, 3, 5, 9])
            keys = {f"{key:03d}": self.rng.choice([None, *range(8)]) and self.rng.randrange(10**6) for key in range(count)}
            self.shards[name] = keys
            members = [(f"{key}.png", b"no image" if seed is None else png(seed)) for key, seed in keys.items()]
            path = self.folder / "shards" / name
            path.write_bytes(tar_of(members))
            os.utime(path, ns=(self.made * 10**9, self.made * 10**9))

    def retrain(self) -> None:
        factor = self.rng.choice([0.5, 0.8, 1.25, 1.5])
        edit_tensors(self.folder / "ten", lambda tensors: {n: t * factor if "lora_B" in n else t for n, t in tensors.items()})

    def encoder(self, space_id: str) -> Encoder:
        if space_id not in self.encoders:
            self.encoders[space_id] = load_encoder(self.table / encoder_path(space_id))
        return self.encoders[space_id]

    def rows(self, space_id: str) -> Rows:
        """What a version made of today's shards must hold."""
        wanted = {f"{n}/{key}": seed for n, keys in self.shards.items() for key, seed in keys.items() if seed is not None}
        images = [Image.open(io.BytesIO(png(seed))) for seed in wanted.values()]
        vectors = self.encoder(space_id).embed(images) if images else []
        return {id_: vector.tobytes() for id_, vector in zip(wanted, vectors, strict=True)}

    def manifests(self) -> dict[int, dict[str, Any]]:
        return {int(path.stem): json.loads(path.read_text()) for path in sorted((self.table / "versions").glob("*.json"))}

    def note_new_versions(self) -> None:
        """A night's new version holds that night's shards."""
        for number, manifest in self.manifests().items():
            if number not in self.published:
                assert number == max(self.published, default=0) + 1
                self.published[number] = self.rows(manifest["space_id"])

    def check(self) -> None:
        """Every retained version, as any reader sees it, and nothing that is left over."""
        manifests = self.manifests()
        if not manifests:
            return
        assert int((self.table / "CURRENT").read_text()) <= max(manifests)
        assert len(manifests) >= min(len(self.published), KEEP)
        for number, manifest in manifests.items():
            found: Rows = {}
            for entry in manifest["files"]:
                data = (self.table / entry["path"]).read_bytes()
                assert hashlib.sha256(data).hexdigest() == entry["sha256"]
                rows = pq.read_table(io.BytesIO(data), columns=["id", "embedding"]).to_pylist()
                found |= {row["id"]: np.array(row["embedding"], np.float32).tobytes() for row in rows}
            assert found == self.published[number], number
            assert len(found) == manifest["counts"]["vectors"]

    def orphans(self) -> list[str]:
        """Objects that nothing refers to, although they are older than the grace period and a publication came after."""
        manifests = list(self.manifests().values())
        if not manifests:
            return []
        tombs = [json.loads(path.read_text()) for path in (self.table / "retired").glob("*.json")]
        kept = {entry["path"] for m in (*manifests, *tombs) for entry in (*m["files"], *m["rejects"])}
        newest = (self.table / "CURRENT").stat().st_mtime
        found = [path for folder in ("data", "rejects") for path in (self.table / folder).rglob("*.parquet")]
        old = [path for path in found if path.stat().st_mtime < newest - (GRACE_DAYS + 1) * DAY]
        return [str(path) for path in old if str(path.relative_to(self.table)) not in kept]

    def sleep(self) -> None:
        """A day goes by, for the table."""
        for path in self.table.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    when = path.stat().st_mtime - DAY
                    os.utime(path, (when, when))


def embed_here(items: list[WorkItem], job: pipeline.Job, topology: cluster.Topology) -> Iterator[ChunkStats]:
    """The chain in this process: the actor without its cluster."""
    uri = f"{job.store.uri}/{encoder_path(job.encoder.space_id)}"
    writing = (job.store, job.encoder.space_id, job.layout)
    actor = EmbedShards((uri, {}, job.layout), job.input_options, writing, lambda: False)
    for block in pipeline.plan_blocks(items, 1):
        for row in actor({"block": np.array([block], dtype=object)}):
            yield ChunkStats.from_json(row["stats"][0])


@contextlib.contextmanager
def interrupted(at: int, does: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, after: bool) -> Iterator[None]:
    """At its `at`-th write to the table something happens, before the write or after it."""
    count = 0
    with monkeypatch.context() as patch:
        for name in ("create", "replace", "delete"):
            right = getattr(Store, name)

            def write(store: Store, *arguments: Any, right: Any = right) -> Any:
                nonlocal count
                count += 1
                now = count == at
                if now and not after:
                    does()
                result = right(store, *arguments)
                if now and after:
                    does()
                return result

            patch.setattr(Store, name, write)
        yield


def kill() -> None:
    raise Killed


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 7))])
def test_a_month(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    recipe = tiny_recipe(tmp_path)
    retain = {"versions": KEEP, "grace_days": GRACE_DAYS}
    options = {"chunk_size": 4, "max_rejects": 1.0, "max_removed": 1.0, "retain": retain}
    month = Month(tmp_path, job_of(tmp_path, recipe, tmp_path / "shards", **options), random.Random(seed))
    happened: list[str] = []
    for night in range(NIGHTS):
        month.change_shards()
        if not month.shards:
            continue
        if month.rng.random() < (0.6 if happened[-1:] == ["held back"] else 0.2):
            month.retrain()
        event = month.rng.choice(["nothing", "nothing", "kill", "kill", "second", "rollback"]) if night else "nothing"
        with monkeypatch.context() as patch:
            if night not in THROUGH_RAY:
                patch.setattr(pipeline, "embed_items", embed_here)
                patch.setattr(cluster, "connect", lambda: None)
                patch.setattr(cluster, "choose_topology", lambda resources: None)
                patch.setattr(cluster, "count_nodes", lambda: 1)
            happened.append(spend(month, event, night, monkeypatch))
        month.note_new_versions()
        month.check()
        assert month.orphans() == []
        month.sleep()
    counts = {what: happened.count(what) for what in sorted(set(happened))}
    print(f"\n{len(month.published)} versions in {NIGHTS} nights: {counts}")
    assert {"published", "killed", "rolled back"} <= set(happened)
    assert len(month.published) > NIGHTS / 3


def spend(month: Month, event: str, night: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """One night; returns what happened."""
    if event == "rollback" and len(month.manifests()) > 1:
        to = month.rng.choice(sorted(month.manifests())[:-1])
        month.published[max(month.published) + 1] = month.published[to]
        roll_back(month.store, to, f"night {night}")
        return "rolled back"
    at, after = month.rng.randint(1, 14), month.rng.random() < 0.5
    try:
        if event == "kill" and night not in THROUGH_RAY:
            with interrupted(at, kill, monkeypatch, after=after):
                run_job(month.job, replaces=True)
        elif event == "second" and night not in THROUGH_RAY:
            overtaken = []
            with interrupted(at, lambda: overtaken.append(run_job(month.job, replaces=True)), monkeypatch, after=after):
                run_job(month.job, replaces=True)
            return "overtaken" if overtaken else "nothing to overtake"
        else:
            return "published" if run_job(month.job, replaces=True).published else "nothing stale"
    except Killed:
        return "killed"
    except GateFailed:
        return "held back"
    except IncompleteRun:
        return "incomplete"
    return "published before the kill"
