"""Hostile shards: each ends as rows, rejects or an error of its own, soon; the good ones beside it are embedded."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray  # noqa: F401  # registers Ray's types

from hostile_shards import Foreign, header, padded, record, try_apart
from jobs import read_rows, tiny_recipe, write_job, write_tars
from lora_embed.chain.chunks import decode_items
from lora_embed.chain.items import Block, WorkItem
from lora_embed.cli.main import embed_job
from lora_embed.errors import ShardError
from lora_embed.schema import ChunkHead
from lora_embed.shards import isolated, read
from lora_embed.shards.fields import MOST_FIELD, typed
from lora_embed.shards.isolated import read_isolated, read_or_die
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from samples import PREPROCESSING, all_of_them, layout, parquet_of, png, samples_of, shard_at, tar_of

MIB = 2**20
CARRY = (("label", "string"),)


def parquet(**columns: Any) -> bytes:
    return parquet_of({"image": [png(1), png(2)]} | columns)


def foreign(name: str, told: bytes, storage: Any = None) -> Any:
    kept = pa.array([[1, 2], [3, 4]]) if storage is None else storage
    return pa.ExtensionArray.from_storage(Foreign(kept.type, name, told), kept)


def twice(name: str) -> bytes:
    buffer = io.BytesIO()
    columns = [pa.array([png(1), png(2)]), pa.array(["a", "b"]), pa.array(["c", "d"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", name, name]), buffer)
    return buffer.getvalue()


FAR = pa.array([2**62, -(2**62)], pa.timestamp("us"))
SCHEMAS: dict[str, tuple[Callable[[], bytes], str]] = {  # what is said of it; "" where it is read
    "two key columns": (lambda: twice("key"), "has 2 columns named 'key'"),
    "two image columns": (lambda: twice("image"), "has 3 columns named 'image'"),
    "two carried columns": (lambda: twice("label"), "has 2 columns named 'label'"),
    "two columns that nobody asked for": (lambda: twice("other"), ""),
    "days beyond Python's": (lambda: parquet(key=FAR, label=pa.array([10**9, -(10**9)], pa.date32())), ""),
    "a time zone that is none": (lambda: parquet(key=pa.array([0, 1], pa.timestamp("s", "Nowhere/City")), label=FAR), ""),
    "tensors with bad metadata": (lambda: parquet(other=foreign("ray.data.arrow_tensor", b"null")), ""),
    "tensors with metadata that are no text": (lambda: parquet(other=foreign("ray.data.arrow_tensor_v2", b"\xff")), ""),
    "tensors as labels": (lambda: parquet(label=foreign("ray.data.arrow_tensor_v2", b"[")), "'label' is of type ray.data"),
    "tensors of another storage": (lambda: parquet(x=foreign("ray.data.arrow_variable_shaped_tensor", b"2")), ""),
    "periods with bad metadata": (lambda: parquet(key=foreign("pandas.period", b"{}", pa.array([1, 2]))), ""),
    "Arrow's tensors with bad metadata": (lambda: parquet(x=foreign("arrow.fixed_shape_tensor", b"{")), "cannot be read as"),
    "a struct of two fields of a name": (
        lambda: parquet(label=pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=["x", "x"])),
        "",
    ),
}  # fmt: skip


def heads_of(*paths: Path, **changes: Any) -> dict[str, ChunkHead]:
    """By shard name, as the chain's stage gives them."""
    items = tuple(WorkItem(shard=shard) for shard in list_shards(tuple(map(str, paths)), {}))
    rows = decode_items({"block": [Block(items=items)]}, layout(carry=CARRY, **changes), PREPROCESSING, {})
    heads = [ChunkHead.from_json(row["head"][0]) for row in rows]
    return {head.shard_name: head for head in heads}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", SCHEMAS)
def test_a_hostile_schema_costs_its_own_shard_alone(tmp_path: Path, what: str) -> None:
    made, says = SCHEMAS[what]
    (tmp_path / "0.parquet").write_bytes(parquet())
    (tmp_path / "1.parquet").write_bytes(made())
    (tmp_path / "2.tar").write_bytes(tar_of([("a.png", png(3))]))
    heads = heads_of(tmp_path)
    assert [(heads[name].good, heads[name].error) for name in ("0.parquet", "2.tar")] == [(2, ""), (1, "")]
    assert says in heads["1.parquet"].error
    assert bool(heads["1.parquet"].error) == bool(says)
    assert heads["1.parquet"].good == (0 if says else 2)


def test_no_code_of_a_foreign_type_runs_whatever_the_environment_says(tmp_path: Path) -> None:
    """Ray opens pickles in the metadata of its tensors where a variable says so."""
    marker, path = tmp_path / "ran", tmp_path / "a.parquet"
    told = f"cposix\nsystem\n(Vtouch {marker}\ntR.".encode()
    path.write_bytes(parquet(x=foreign("ray.data.arrow_tensor_v2", told)))
    code = (
        "import sys; from pathlib import Path; import ray.data, pyarrow.parquet as pq\n"
        "from samples import samples_of, shard_at\n"
        "print(len(samples_of(shard_at(Path(sys.argv[1])))), Path(sys.argv[2]).exists())\n"
        "try:\n    pq.read_metadata(sys.argv[1])\nexcept TypeError: pass\n"
    )
    environment = os.environ | {"RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code, str(path), str(marker)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert ended.stdout == "2 False\n"
    assert marker.exists()  # which shows that Arrow's own opening does run it


def test_what_the_user_or_the_machine_does_is_no_error_of_the_shard(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.tar", tar_of([("a.png", png(1)), ("b.png", png(2))]))

    def interrupted(number: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(read_samples(shard, layout(), {}, interrupted))
    with pytest.raises(ZeroDivisionError):  # of whoever takes the samples
        [1 // len(sample.fields) for sample in read_samples(shard, layout(), {}, lambda number: True)]


@pytest.mark.parametrize("kind", ["string", "int64", "float64", "bool"])
def test_a_value_that_cannot_be_converted_is_null(kind: str) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise SystemError

        __int__ = __float__ = __str__

    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert typed(Hostile(), kind) is None
    assert typed(nested, kind) is None


def dictionary_of(size: int) -> bytes:
    """A Parquet file of one value of that many bytes in a dictionary, for 20 rows, that is a few thousand bytes."""
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 20), pa.array([bytes(size)]))
    return packed(pa.table({"image": image}), use_dictionary=True)


def packed(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**30, **options)
    return buffer.getvalue()


def nothings(count: int) -> pa.Array:
    return pa.ListArray.from_arrays([0, count], pa.nulls(count, pa.int8()))


def prefixes() -> bytes:
    values = [bytes(30 * MIB)] + [bytes(30 * MIB) + b"x"] * 7
    return packed(pa.table({"image": values}), use_dictionary=False, column_encoding={"image": "DELTA_BYTE_ARRAY"})


REPEATS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a dictionary of one value of 60 MB": (lambda: dictionary_of(60_000_000), "more than 512 MiB"),
    "a page of 400 MB of zeros": (
        lambda: packed(pa.table({"image": [bytes(400 * MIB)]}), use_dictionary=False), "at most 67108864, or"
    ),
    "values that begin as the one before": (prefixes, "8 samples"),
    "30 million rows without an image": (
        lambda: packed(pa.table({"image": pa.nulls(30_000_000, pa.binary())})), "has 30000000 rows"
    ),
    "a list of 40 million nothings": (
        lambda: packed(pa.table({"image": [b"x"], "label": nothings(40_000_000)})),
        "40000000 values in",
    ),
    "a label of 60 MB": (lambda: packed(pa.table({"image": [b"x"], "label": ["y" * 60_000_000]})), "1 samples"),
}  # fmt: skip
LIMITED = """
import resource, sys
from pathlib import Path
from samples import layout, shard_at
from lora_embed.errors import ShardError
from lora_embed.images.isolate import limit_memory
from lora_embed.shards.read import read_samples
shard = shard_at(Path(sys.argv[1]))
limit_memory(int(sys.argv[2]))
try:
    count = sum(1 for _ in read_samples(shard, layout(carry=(("label", "string"),)), {}, lambda number: True))
    print(count, "samples")
except ShardError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", REPEATS)
def test_a_few_bytes_take_no_more_memory_than_is_worth_it(tmp_path: Path, what: str) -> None:
    """In a process that may take 1.5 GiB of address space, most of which Arrow's threads have before they begin."""
    made, says = REPEATS[what]
    path = tmp_path / "a.parquet"
    path.write_bytes(made())
    assert path.stat().st_size < 200_000
    command = [sys.executable, "-c", LIMITED, str(path), str(1536 * MIB)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert says in ended.stdout, (ended.stdout, ended.stderr[-500:])


def test_a_label_that_is_too_large_is_null_and_others_are_not(tmp_path: Path) -> None:
    labels = ["y" * (MOST_FIELD + 1), "z", None]
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"image": [b"1", b"2", b"3"], "label": labels}))
    assert [sample.fields["label"] for sample in samples_of(shard, carry=CARRY)] == [None, "z", None]


def of_all(keys: int, size: int = 1) -> bytes:
    said = b"".join(record(b"k%07d" % number, b"v" * size) for number in range(keys))
    return header("h", len(said), b"g") + padded(said)


MEMBERS = b"".join(header(f"{number:05d}.png", 1) + padded(b"x") for number in range(3000)) + bytes(1024)
OLD_SPARSE = header("s.png", 512, b"S", _386=b"0" * 96, _482=b"\1", _483=b"0" * 11 + b"\0")
HEADERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "one header of many fields for the whole tar": (lambda: of_all(40_000) + MEMBERS, ""),
    "twenty headers of 1 MiB for the whole tar": (lambda: of_all(45_000) * 20 + MEMBERS, "the headers before the member"),
    "headers for the whole tar between the members": (
        lambda: b"".join(header(f"{number}.png", 0) + of_all(15_000) for number in range(20)) + bytes(1024),
        "the headers before the member",
    ),
    "a map of holes that goes on and on": (
        lambda: OLD_SPARSE + (b"0" * 504 + b"\1" + bytes(7)) * 20_000 + bytes(1536),
        "the headers before the member",
    ),
    "records without an end": (
        lambda: header("h", MIB, b"x") + padded(b"1 " * (MIB // 2 - 1) + b"==") + MEMBERS,
        "with a damaged record at its byte 0",
    ),
    "digits in a row": (
        lambda: header("h", 900_000, b"x") + padded(record(b"comment", b"9" * (900_000 - 16))) + MEMBERS,
        "digits in a row",
    ),
    "a long name for each member": (
        lambda: b"".join(header("L", MIB, b"L") + bytes(MIB) + header("a.png", 0) for _ in range(20)) + bytes(1024),
        "the headers before the member",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_headers_of_a_tar_cost_what_their_bytes_do(tmp_path: Path, what: str) -> None:
    made, says = HEADERS[what]
    shard = shard_at(tmp_path / "a.tar", made())
    started = time.process_time()
    if says:
        with pytest.raises(ShardError, match=says):
            samples_of(shard)
    else:
        assert len(samples_of(shard)) == 3000
    assert time.process_time() - started < 3


def test_what_a_header_says_of_the_whole_tar_still_counts(tmp_path: Path) -> None:
    said = record(b"comment", b"x") + record(b"path", b"same.png")
    data = header("h", len(said), b"g") + padded(said) + header("a.png", 1) + padded(b"1") + header("b.png", 1) + padded(b"2")
    samples = samples_of(shard_at(tmp_path / "a.tar", data + bytes(1024)))
    assert [(sample.key, sample.data, sample.begin) for sample in samples] == [("same", b"1", None), ("same", b"2", None)]


def test_images_that_a_shard_repeats_end_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros from sparse members of a few thousand bytes: the others would go on for days."""
    monkeypatch.setattr(read, "MOST_UNPACKED", 2**24)
    members = b"".join(
        header(f"{number}.png", 512, b"S", _386=b"%011o\0%011o\0" % (0, 512), _483=b"%011o\0" % (2**22)) + bytes(512)
        for number in range(30)
    )
    shard = shard_at(tmp_path / "a.tar", members + bytes(1024))
    taken = itertools.count()
    with pytest.raises(ShardError, match="unpack to more than 100 times as many bytes of images"):
        list(zip(read_samples(shard, layout(), {}, lambda number: True), taken, strict=False))
    assert next(taken) < 10


def test_a_reader_in_a_child_gives_the_same_samples(tmp_path: Path) -> None:
    for shard in (
        shard_at(tmp_path / "a.tar", tar_of([("a.png", png(1)), ("a.json", b'{"label": 3}'), ("b.png", png(2))])),
        shard_at(tmp_path / "b.parquet", parquet(label=["x", "y"])),
    ):
        how = layout(carry=CARRY)
        wanted = all_of_them
        assert (
            list(read_isolated(shard, how, {}, wanted))
            == list(read_or_die(shard, how, {}, wanted))
            == samples_of(shard, carry=CARRY)
        )
    with pytest.raises(ShardError, match="cannot be read as Parquet"):
        list(read_isolated(shard_at(tmp_path / "c.parquet", b"PAR1nothing"), layout(), {}, all_of_them))


HARM: dict[str, tuple[signal.Signals, str]] = {
    "stopped": (signal.SIGSTOP, "the reader gave no answer in 2 s"),
    "killed": (signal.SIGKILL, "the reader was killed by signal 9"),
    "crashed": (signal.SIGSEGV, "the reader was killed by signal 11"),
    "aborted": (signal.SIGABRT, "the reader was killed by signal 6"),
}


@pytest.mark.parametrize("how", HARM)
def test_what_ends_or_stops_a_reader_is_its_shards_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    number, says = HARM[how]
    shard = shard_at(tmp_path / "a.tar", tar_of([("a.png", png(1)), ("b.png", png(2))]))
    samples = read_isolated(shard, layout(), {"retry_s": 0}, all_of_them)
    assert next(samples).key == "a"
    (child,) = [child for child in psutil.Process().children() if "lora_embed.images.isolate" in child.cmdline()]
    monkeypatch.setattr(isolated, "READ_S", 2.0)
    child.send_signal(number)
    with pytest.raises(ShardError, match=f"a.tar: cannot be read: {says}"):
        list(samples)
    assert not psutil.pid_exists(child.pid)


def test_a_shard_that_makes_no_progress_ends_the_process_that_reads_it(tmp_path: Path) -> None:
    """So that its task is tried again, with a reader in a child."""
    shard_at(tmp_path / "a.tar", tar_of([("a.png", png(1))]))
    code = (
        "import sys, time; from pathlib import Path; from samples import layout, shard_at\n"
        "from lora_embed.shards import isolated\n"
        "isolated.READ_S = 0.5\n"
        "shard = shard_at(Path(sys.argv[1]))\n"
        "list(isolated.read_or_die(shard, layout(), {'retry_s': 0}, lambda number: time.sleep(60)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tar")], timeout=300, env=environment, check=False)
    assert ended.returncode == -signal.SIGALRM


def test_hostile_shards_are_rows_rejects_or_their_own_errors() -> None:
    assert_sound(try_apart(seed=1, count=120, timeout_s=600), 120)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_many_hostile_shards_are_rows_rejects_or_their_own_errors(seed: int) -> None:
    assert_sound(try_apart(seed=100 + seed, count=5000), 5000)


def assert_sound(found: Any, count: int) -> None:
    print(f"\n{found.describe()}")
    assert not found.failures
    assert sum(found.outcomes.values()) == count
    for kind in (
        "parquet: schemas",
        "parquet: changed bytes",
        "tar: changed bytes",
    ):  # all refused at the door would test nothing
        assert found.outcomes[kind, "rows"] + found.outcomes[kind, "rejects"] > count / 100
        assert found.outcomes[kind, "error"] > count / 100


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_over_hostile_shards_keeps_what_the_good_ones_gave(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through the entry point: it ends incomplete and names them, and without them the same command publishes."""
    source = write_tars(tmp_path / "shards", shards=2, images=3)
    for number, what in enumerate(("two key columns", "tensors as labels", "Arrow's tensors with bad metadata")):
        (source / f"bad{number}.parquet").write_bytes(SCHEMAS[what][0]())
    (source / "bad3.tar").write_bytes(HEADERS["twenty headers of 1 MiB for the whole tar"][0]())
    (source / "good.parquet").write_bytes(SCHEMAS["days beyond Python's"][0]())
    job = write_job(tmp_path, tiny_recipe(tmp_path), source, carry=["label"])
    assert embed_job(["--config", str(job), "--json"]) == 1
    said = capfd.readouterr().err
    assert "4 of 7 shards are not complete, so nothing was published" in said
    assert all(f"bad{number}." in said for number in range(4))
    assert "Traceback" not in said
    staged = list((tmp_path / "table" / "staging").rglob("*-last.parquet"))
    assert len(staged) == 3
    for path in source.glob("bad*"):
        path.unlink()
    assert embed_job(["--config", str(job), "--json"]) == 0
    [result] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert json.loads(result)["embedded"] == 0
    assert read_rows(tmp_path / "table").num_rows == 8
