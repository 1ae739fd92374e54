"""Where tars lie and tables are written: a folder of the local disk, or the tests' S3 server with the tars copied there."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from s3 import OWNER, s3_server

BUCKET = "bench"
SIGNED_FOR_S = 86400


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a workload's tars lie and tables are written: the local disk, or an S3 store."""

    inputs: list[str]  # the tars, as lora-embed takes them
    shards: list[str]  # as peers do: paths, or keys `bucket/…`
    tables: str  # folder, or key
    store: dict[str, str] | None = None  # endpoint, key, secret
    environment: dict[str, str] = field(default_factory=dict)  # by which lora-embed finds the store
    signed: list[str] = field(default_factory=list)  # the shards' addresses over HTTP

    def filesystem(self) -> Any:
        """fsspec's, for both."""
        return fsspec.filesystem("file") if self.store is None else fsspec.filesystem("s3", **self.storage_options())

    def storage_options(self) -> dict[str, Any]:
        if self.store is None:
            return {}
        client = {"endpoint_url": self.store["endpoint"], "region_name": "us-east-1"}
        return {"key": self.store["key"], "secret": self.store["secret"], "client_kwargs": client}

    def uri(self, path: str) -> str:
        return path if self.store is None else f"s3://{path}"


def local_place(shards: list[Path], folder: Path) -> Place:
    tables = folder / "tables"
    tables.mkdir()
    paths = [str(shard) for shard in shards]
    return Place(inputs=paths, shards=paths, tables=str(tables))


@contextmanager
def s3_place(shards: list[Path], folder: Path) -> Iterator[Place]:
    """A server that lives as long as the block, on data in `folder`. For the main thread: the server ends with its own."""
    assert threading.current_thread() is threading.main_thread()
    with s3_server(folder / "s3") as server:
        server.make_bucket(BUCKET)
        keys = [f"{BUCKET}/shards/{shard.name}" for shard in shards]
        store = {"endpoint": server.endpoint, "key": OWNER[0], "secret": OWNER[1]}
        inputs, environment = [f"s3://{key}" for key in keys], server.environment()
        place = Place(inputs=inputs, shards=keys, tables=f"{BUCKET}/tables", store=store, environment=environment)
        filesystem = place.filesystem()
        for shard, key in zip(shards, keys, strict=True):
            filesystem.pipe_file(key, shard.read_bytes())
        yield replace(place, signed=[filesystem.sign(key, expiration=SIGNED_FOR_S) for key in keys])
