"""What `test_month` holds a table against: the world outside of it, and what each of its versions must hold."""

import hashlib
import io
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from fsspec.implementations.dirfs import DirFileSystem
from PIL import Image

from lora_embed import load_encoder
from lora_embed.config.models import JobConfig
from lora_embed.errors import GateFailed, IncompleteRun, TableError
from lora_embed.model.encoder import Encoder
from lora_embed.run.job import run_job
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store
from lora_embed.table.lineage import forget
from lora_embed.table.read import open_table
from lora_embed.table.versions import roll_back
from models import edit_tensors
from samples import png, tar_of

KEEP, GRACE_DAYS = 4, 3
DAY = 86400.0


@dataclass(frozen=True)
class Content:
    """What a version must hold."""

    rows: dict[str, bytes]  # id → exact bits of the vector
    rejects: dict[str, str]  # id → reason
    forgotten: frozenset[str]  # ids that had been forgotten when it was made

    def without(self, ids: frozenset[str]) -> "Content":
        """A forgotten image stays a sample, as a reject."""
        rows = {id_: vector for id_, vector in self.rows.items() if id_ not in ids}
        return Content(rows, self.rejects | dict.fromkeys(self.rows.keys() & ids, "forgotten"), self.forgotten | ids)


@dataclass
class Month:
    """The world outside of the table, and what the table must be like."""

    folder: Path
    job: JobConfig
    rng: random.Random
    shards: dict[str, dict[str, int | None]] = field(default_factory=dict)  # name → key → image; None is no image
    changes: int = 0
    adapters: list[bytes] = field(default_factory=list)  # those that were in use before
    encoders: dict[str, Encoder] = field(default_factory=dict)
    published: dict[int, Content] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)  # version that is not retained any more → night since when
    gone: frozenset[str] = frozenset()  # ids whose forgetting came to its end
    night: int = 0
    opened: int = 0  # the highest version that a reader has opened
    most_shards: int = 1000
    mirrored: dict[str, int] = field(default_factory=dict)  # shard → time of its file when it was copied to the job's input

    @property
    def table(self) -> Path:
        """Where it is on a local disk."""
        return Path(self.job.table)

    @cached_property
    def files(self) -> Any:
        """The table's files wherever it is, by fsspec alone and never from a cache."""
        fs, root = fsspec.core.url_to_fs(self.job.table, use_listings_cache=False)
        return DirFileSystem(root, fs)

    @property
    def newest(self) -> Content:
        return self.published[max(self.published)] if self.published else Content({}, {}, frozenset())

    def go_on(self, changes_adapter: float = 0.2) -> None:
        """Other shards, and with this chance another adapter, the next night or before what was killed is done again."""
        self.change_shards()
        if self.rng.random() < changes_adapter:
            self.retrain()

    def change_shards(self) -> None:
        """Add, change and remove some; a changed one is another one in size or time."""
        for _ in range(self.rng.choice([0, 1, 2, 2, 3])):
            event = self.rng.choice(["add", "change", "remove"]) if len(self.shards) > 2 else "add"
            event = "remove" if event == "add" and len(self.shards) >= self.most_shards else event
            name = f"{self.changes:04d}.tar" if event == "add" else self.rng.choice(sorted(self.shards))
            self.changes += 1
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
            os.utime(path, ns=(self.changes * 10**9, self.changes * 10**9))

    def mirror(self) -> None:
        """Bring the shards on a server to the state of the folder."""
        fs, root = fsspec.core.url_to_fs(self.job.input[0], use_listings_cache=False)
        now = {path.name: path.stat().st_mtime_ns for path in (self.folder / "shards").iterdir()}
        for name in [name for name in now if self.mirrored.get(name) != now[name]]:
            fs.put_file(str(self.folder / "shards" / name), f"{root}/{name}")
        for name in self.mirrored.keys() - now.keys():
            fs.rm_file(f"{root}/{name}")
        self.mirrored = now

    def retrain(self) -> None:
        """Another adapter, or back to one of those before."""
        path = self.folder / "ten" / "adapter_model.safetensors"
        self.adapters.append(path.read_bytes())
        if self.rng.random() < 0.5:
            path.write_bytes(self.rng.choice(self.adapters[-3:]))
            return
        factor = self.rng.choice([0.5, 0.8, 1.25, 1.5])
        edit_tensors(path.parent, lambda tensors: {n: t * factor if "lora_B" in n else t for n, t in tensors.items()})

    def today(self, number: int, space_id: str) -> Content:
        """What a version made of today's shards must hold."""
        if space_id not in self.encoders:
            self.encoders[space_id] = load_encoder(f"{self.job.table}/{encoder_path(space_id)}")
        images = {f"{name}/{key}": seed for name, keys in self.shards.items() for key, seed in keys.items()}
        good = {id_: Image.open(io.BytesIO(png(seed))) for id_, seed in images.items() if seed is not None}
        vectors = self.encoders[space_id].embed(list(good.values())) if good else np.zeros((0, 0), np.float32)
        rows = {id_: vector.tobytes() for id_, vector in zip(good, vectors, strict=True)}
        rejects = dict.fromkeys(images.keys() - good.keys(), "not_an_image")
        return Content(rows, rejects, frozenset()).without(self.newest.forgotten)

    def manifests(self, folder: str = "versions") -> dict[int, dict[str, Any]]:
        paths = [path for path in sorted(self.files.find(folder)) if path.endswith(".json")]
        return {int(Path(path).stem): json.loads(self.files.cat_file(path)) for path in paths}

    def note(self, made: Callable[[int, str], Content]) -> None:
        """Versions that are new were made by this; one may be retired already."""
        found = self.manifests("retired") | self.manifests()
        for number in sorted(found.keys() - self.published.keys()):
            assert number == max(self.published, default=0) + 1
            content = made(number, found[number]["space_id"])
            assert content.forgotten >= self.newest.forgotten, "what was forgotten is back"
            self.published[number] = content

    def check(self) -> None:
        """What readers see: each version as it must be, and gone only if it is old or holds what was forgotten."""
        listed, tombs = self.manifests(), self.manifests("retired")
        self.check_listed(listed)
        there = sorted(self.published.keys() - self.left.keys())
        assert set(listed) <= set(there), "a retired version is back"
        for number in set(there) - set(listed):
            assert number not in there[-KEEP:] or self.published[number].rows.keys() & self.newest.forgotten
            self.left[number] = self.night
        for number in [number for number, since in self.left.items() if self.night - since < GRACE_DAYS]:
            assert self.read(tombs[number])[0] == self.published[number].rows, f"{number} is in its grace period"

    def open(self) -> None:
        """A reader who opens the table again and again never comes back to an older version, whatever CURRENT says."""
        found = open_table(self.job.table).version if self.published else 0
        assert found == max(self.published, default=0)
        assert found >= self.opened, f"version {found} after {self.opened}"
        self.opened = found

    def check_listed(self, listed: dict[int, dict[str, Any]]) -> None:
        """Each version that is there is as it must be, and the last that was made is there."""
        assert max(listed, default=0) == max(self.published, default=0)
        self.open()
        hint = self.files.cat_file("CURRENT") if self.files.exists("CURRENT") else b"0"
        assert int(hint) <= max(listed, default=0)
        for number, manifest in listed.items():
            expected = self.published[number]
            assert self.read(manifest) == (expected.rows, expected.rejects), number
            assert manifest["counts"]["vectors"] == len(expected.rows)
            assert manifest["counts"]["rejects"] == len(expected.rejects)
            assert not expected.rows.keys() & self.gone, f"version {number} holds what was forgotten"

    def read(self, manifest: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, str]]:
        """Vectors and reasons by id."""
        rows = [row for entry in manifest["files"] for row in self.read_file(entry, ["id", "embedding"])]
        rejects = [row for entry in manifest["rejects"] for row in self.read_file(entry, ["id", "reason"])]
        vectors = {row["id"]: np.array(row["embedding"], np.float32).tobytes() for row in rows}
        assert len(vectors) == len(rows)
        return vectors, {row["id"]: row["reason"] for row in rejects}

    def read_file(self, entry: dict[str, Any], columns: list[str]) -> list[dict[str, Any]]:
        data = self.files.cat_file(entry["path"])
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data), columns=columns).to_pylist()
        return rows

    def check_hint(self) -> None:
        """After a night that came to its end, programs that read no listing find the current version too."""
        assert int(self.files.cat_file("CURRENT")) == max(self.published)

    def check_cleared(self) -> None:
        """After a publication nothing is there that is old and nothing refers to, nor what the version has absorbed."""
        listed, tombs = self.manifests(), self.manifests("retired")
        assert len(listed) <= KEEP
        assert [number for number in tombs if self.night - self.left.get(number, self.night) > GRACE_DAYS] == []
        kept = {entry["path"] for m in (*listed.values(), *tombs.values()) for entry in (*m["files"], *m["rejects"])}
        newest = (self.table / "CURRENT").stat().st_mtime
        found = [path for folder in ("data", "rejects") for path in (self.table / folder).rglob("*.parquet")]
        old = {str(path.relative_to(self.table)) for path in found if path.stat().st_mtime < newest - (GRACE_DAYS + 1) * DAY}
        assert old <= kept
        staged = {(path.parts[-3], path.name.split("-")[0]) for path in (self.table / "staging").rglob("*.parquet")}
        assert not staged & shards_of(listed[max(listed)])
        assert all(path.stat().st_mtime > time.time() - DAY / 2 for path in (self.table / "_tmp").iterdir())

    def sleep(self) -> None:
        """A day goes by, for the table."""
        self.night += 1
        files = {path.stat().st_ino: path for path in self.table.rglob("*") if path.is_file()}  # a kill leaves two names of one
        for path in files.values():
            when = path.stat().st_mtime - DAY
            os.utime(path, (when, when))


def shards_of(manifest: dict[str, Any]) -> set[tuple[str, str]]:
    """Space and shard id of all that a version holds."""
    return {(manifest["space_id"], shard["id"]) for entry in manifest["files"] for shard in entry["shards"]}


@dataclass(frozen=True)
class Step:
    """Something that is done to the table, and what a version of this number and space must hold if that made it."""

    name: str
    act: Callable[[], str]  # returns what became of it
    made: Callable[[int, str], Content]


def embedding(month: Month) -> Step:
    """The night's run."""

    def act() -> str:
        try:
            return "published" if run_job(month.job, replaces=True).published else "nothing stale"
        except GateFailed:
            return "held back"
        except IncompleteRun:
            return "incomplete"

    return Step("run", act, month.today)


def forgetting(month: Month) -> Step:
    """Take one to three images of the current version out."""
    ids = sorted(month.newest.rows)
    ids = month.rng.sample(ids, min(len(ids), month.rng.randint(1, 3)))
    if not ids:
        return embedding(month)

    def act() -> str:
        forget(Store(month.job.table), ids, f"night {month.night}")
        month.gone |= set(ids)
        return "forgotten"

    return Step("forget", act, lambda number, _: month.published[number - 1].without(frozenset(ids)))


def rolling_back(month: Month) -> Step:
    """To a version from which nothing was forgotten since; to others it is refused."""
    older = sorted(month.manifests())[:-1]
    if not older:
        return embedding(month)
    to = month.rng.choice(older)

    def act() -> str:
        try:
            roll_back(Store(month.job.table), to, f"night {month.night}")
        except TableError:
            assert to not in month.manifests() or month.newest.forgotten - month.published[to].forgotten
            return "refused"
        return "rolled back"

    return Step("rollback", act, lambda *_: month.published[to])
