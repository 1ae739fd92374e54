"""A table on S3 read by other libraries while the store fails: as patient as our own reads, and of one version of each file."""

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pds
import pytest

from lora_embed import open_table
from lora_embed.errors import StorageError, StoreUnavailable
from lora_embed.store.lend import lend
from lora_embed.store.store import Store
from lora_embed.table.read import Table
from s3 import Faults, Proxy, Request, S3Server
from tables import noise_vectors, publish_vectors, spread

HASTY = {"config_kwargs": {"read_timeout": 1.0}}  # a stall costs a second, not fifteen
# It ends at once: pyarrow's threads may still let go of files that are Python's, and an orderly end then aborts now and then.
UNPICKLE = "import os, pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).to_table().num_rows, flush=True); os._exit(0)"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return publish_vectors(tmp_path_factory.mktemp("lent") / "table", spread(noise_vectors(300), 6))


@pytest.fixture(scope="module", autouse=True)
def _copied(server: S3Server, local: Table) -> None:
    Store("s3://images", server.options()).filesystem.put(local.store.uri, "images/lent", recursive=True)


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with Proxy(server.endpoint) as proxy:
        yield proxy


def lent(server: S3Server, proxy: Proxy, retry_s: float = 20.0) -> Table:
    options = server.options(proxy.endpoint) | HASTY | {"retry_s": retry_s}
    return open_table("s3://images/lent", storage_options=options)


def rows(dataset: pds.Dataset) -> pa.Table:
    return dataset.to_table(columns=["id", "embedding", "label"]).sort_by("id")


def test_a_dataset_is_read_at_the_first_503(server: S3Server, proxy: Proxy, local: Table) -> None:
    """The README's own example, with every kind of request refused once."""
    table = lent(server, proxy)
    refused: set[tuple[str, str]] = set()

    def once(request: Request) -> str:
        seen = (request.method, request.path)
        return "" if seen in refused or refused.add(seen) else "error"  # type: ignore[func-returns-value]

    proxy.faults.draw = once  # type: ignore[method-assign]
    assert rows(table.to_dataset()).equals(rows(local.to_dataset()))
    assert {method for method, _ in refused} >= {"HEAD", "GET"}
    assert len(refused) >= 2 * len(local.manifest.files)


@pytest.mark.slow
def test_a_dataset_is_read_whatever_fails_in_between(server: S3Server, proxy: Proxy, local: Table) -> None:
    """A third of all requests: 503, connections reset, bodies cut, answers that do not come."""
    table = lent(server, proxy)
    proxy.faults = Faults(seed=2, error=0.1, reset=0.1, cut=0.1, stall=0.04, stall_s=20)
    for _ in range(4):
        assert rows(table.to_dataset()).equals(rows(local.to_dataset()))
    assert {request.fault for request in proxy.requests} >= {"error", "reset", "cut", "stall"}


@pytest.mark.slow
def test_patience_ends_with_its_reason(server: S3Server, proxy: Proxy) -> None:
    """Not with a file that is not there, as libraries take it where they may."""
    table = lent(server, proxy, retry_s=1.0)
    proxy.faults = Faults(error=1.0)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"s3://images/lent/data/\S+: no usable answer in \d s and \d tries"):
        table.to_dataset().to_table()
    assert time.monotonic() - started < 60  # of 120
    filesystem = table.to_dataset().filesystem.handler.fs
    for ask in (filesystem.exists, filesystem.isfile, filesystem.isdir):
        with pytest.raises(StoreUnavailable):
            ask(f"images/lent/{table.manifest.files[0].path}")


def test_a_file_that_is_gone_is_not_there_and_one_that_was_replaced_is_not_read_in_part(
    server: S3Server, proxy: Proxy, local: Table
) -> None:
    table = lent(server, proxy)
    store = Store("s3://images/replaced", table.store.options)
    store.replace("large", bytes(20_000_000))
    file = lend(store).open("images/replaced/large")
    file.read(10)
    store.replace("large", bytes(20_000_001))
    file.seek(18_000_000)
    with pytest.raises(StorageError, match="no longer exists"):
        file.read()
    with pytest.raises(FileNotFoundError):
        pds.dataset("images/lent/nothing.parquet", schema=local.schema, filesystem=lend(table.store)).to_table()


def test_other_libraries_take_what_is_lent(server: S3Server, proxy: Proxy, local: Table, tmp_path: Path) -> None:
    """pandas by the file system, DuckDB by the dataset, pyarrow by a folder, another process by a pickle."""
    pandas, duckdb = pytest.importorskip("pandas"), pytest.importorskip("duckdb")
    table = lent(server, proxy)
    proxy.faults = Faults(seed=3, error=0.2)
    dataset, filesystem = table.to_dataset(), lend(table.store)
    read = pandas.read_parquet(dataset.files[0], columns=["id"], filesystem=filesystem)
    assert list(read["id"]) == local.to_dataset().to_table(columns=["id"])["id"].to_pylist()[: len(read)]
    assert duckdb.sql("SELECT count(DISTINCT id) FROM dataset").fetchall() == [(300,)]
    folder = pds.dataset("images/lent/data", schema=local.schema, format="parquet", filesystem=filesystem)
    assert rows(folder).equals(rows(local.to_dataset()))
    (tmp_path / "pickle").write_bytes(pickle.dumps(dataset))
    command = [sys.executable, "-c", UNPICKLE, str(tmp_path / "pickle")]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout == "300\n"
    assert any(request.fault for request in proxy.requests)


def test_what_is_lent_lists_as_a_disk_does_and_takes_nothing(server: S3Server, proxy: Proxy, local: Table) -> None:
    table = lent(server, proxy)
    mine, theirs, root = lend(table.store), lend(local.store), local.store.uri
    (Path(root) / "_tmp").rmdir()
    for below in ("", "/data", "/versions"):
        path, same = f"images/lent{below}", f"{root}{below}"
        for depth in (None, 1, 2):
            expected = [one.replace(root, "images/lent") for one in theirs.find(same, maxdepth=depth)]
            assert mine.find(f"{path}/", maxdepth=depth) == mine.find(path, maxdepth=depth) == expected
        assert mine.ls(path, detail=False) == sorted(one.replace(root, "images/lent") for one in theirs.ls(same, detail=False))
        assert [mine.isdir(path), mine.exists(path), mine.isfile(path)] == [True, True, False]
    file = f"images/lent/{table.manifest.files[0].path}"
    assert mine.info(file)["size"] == table.store.filesystem.info(file)["size"] == mine.open(file).seek(0, 2)
    with pytest.raises(FileNotFoundError, match="lies outside"):
        mine.info("images/lenting/x")
    with pytest.raises(FileNotFoundError):
        mine.ls("images/lent/nowhere")
    with pytest.raises(OSError, match="can only be read"):
        mine.open(file, "wb")
    assert server.options()["secret"] not in repr(mine) + repr(table)
