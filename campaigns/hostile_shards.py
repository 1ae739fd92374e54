"""Shards made to do harm, many thousands by seed: each ends as rows, rejects or an error of its own, soon and in little memory.

python campaigns/hostile_shards.py --seed 7 --count 20000     # prints what became of them, by kind
"""

import argparse
import base64
import io
import json
import random
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # what campaigns and tests share

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data  # noqa: F401  # registers Arrow's extension types of Ray, as in its workers

from lora_embed.chain.chunks import decode_items
from lora_embed.chain.items import Block, WorkItem
from lora_embed.errors import ConfigError
from lora_embed.schema import REASONS, ChunkHead, Layout, from_ipc
from lora_embed.shards.listing import list_shards
from samples import PREPROCESSING, layout, png, tar_of

LIMIT_S = 10.0  # for one shard
ROOM = 3 * 2**30  # bytes of memory that the process of all of them may take beyond what it has at first
CARRY = (("label", "int64"), ("note", "string"), ("cls", "bool"))
IMAGES = [png(seed) for seed in range(4)]
Make = Callable[[random.Random], bytes]


@dataclass
class Findings:
    """What became of shards: outcomes by kind, the slowest, and what must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    failures: list[str] = field(default_factory=list)
    peak: int = 0  # bytes of memory beyond what there was at first

    def describe(self) -> str:
        names = ("rows", "rejects", "error", "refused")
        lines = [f"| kind | {' | '.join(names)} |"]
        for kind in sorted({kind for kind, _ in self.outcomes}):
            lines.append(f"| {kind} | {' | '.join(str(self.outcomes[kind, name]) for name in names)} |")
        lines.append(f"slowest: {self.slowest[0]:.2f} s, {self.slowest[1]}; memory {self.peak / 2**20:.0f} MiB")
        return "\n".join([*lines, *self.failures])


class Foreign(pa.ExtensionType):
    """A type that names itself as it is told, with what bytes it is told: to write what its namesake would read."""

    def __init__(self, storage: pa.DataType, name: str, told: bytes) -> None:
        self._told = told
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._told

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, told: bytes) -> "Foreign":
        return cls(storage, "foreign", told)


FOREIGN = (
    *(f"ray.data.arrow_{name}" for name in ("tensor", "tensor_v2", "variable_shaped_tensor", "pickled_object")),
    *(f"arrow.{name}" for name in ("fixed_shape_tensor", "json", "uuid", "bool8", "opaque")),
    "pandas.period", "pandas.interval", "nobody.s",
)  # fmt: skip
TOLD = (
    b"",
    b"\xff\xfe",
    b"[1, 2]",
    b"[-1]",
    b"null",
    b"[]",
    b'{"shape": [4611686018427387904, 9]}',
    b"[" * 5000,
    b'"x"',
    b"\x80\x04.",
)


def foreign(rng: random.Random) -> pa.Array:
    lists, structs = pa.array([[1, 2], [3, 4]]), pa.array([{"data": [1], "shape": [1]}, None])
    storage = rng.choice([lists, structs, pa.array([b"x", b"y"]), pa.array([1, 2]), lists.cast(pa.list_(pa.int64(), 2))])
    return pa.ExtensionArray.from_storage(Foreign(storage.type, rng.choice(FOREIGN), rng.choice(TOLD)), storage)


def values(rng: random.Random, rows: int) -> pa.Array:
    """A column of values that some reader does not expect."""
    far = [rng.choice((2**62, -(2**62), 10**17, 0)) for _ in range(rows)]
    kinds: list[Callable[[], pa.Array]] = [
        lambda: pa.array(
            far, pa.timestamp(rng.choice(("s", "ms", "us", "ns")), rng.choice((None, "UTC", "Nowhere/City", "+99:99")))
        ),
        lambda: pa.array([value % 2**31 for value in far], pa.date32()),
        lambda: pa.array(far, pa.date64()),
        lambda: pa.array(far, pa.duration("s")),
        lambda: pa.array([[[None] * 50] * 3] * rows),
        lambda: pa.array([[("k", value), ("k", None)] for value in far], pa.map_(pa.string(), pa.int64())),
        lambda: pa.StructArray.from_arrays([pa.array(far), pa.array(far)], names=["same", "same"]),
        lambda: pa.array([None] * rows, pa.null()),
        lambda: pa.array([b"\xff" * 9] * rows).view(pa.string()),
        lambda: pa.array([float("nan"), float("inf"), -0.0, 1e308][:rows] + [0.0] * max(0, rows - 4)),
        lambda: pa.array(["x" * rng.choice((1, 10**6, 2 * 10**7))] * rows),
        lambda: pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([b"D" * rng.choice((1, 5 * 10**6))])),
        lambda: pa.array([2**200] * rows, pa.decimal256(70)),
        lambda: pa.array([bytes(16)] * rows, pa.binary(16)),
    ]
    return rng.choice(kinds)()


def parquet_schemas(rng: random.Random) -> bytes:
    """Columns that are named twice, nested, of foreign types, far beyond what Python holds."""
    rows = 2
    columns: list[tuple[str, Any]] = [("image", pa.array(IMAGES[:rows]))]
    for name in rng.sample(["key", "label", "note", "cls", "image", "other", "key"], rng.randrange(1, 5)):
        columns.append((name, foreign(rng) if rng.random() < 0.35 else values(rng, rows)))
    rng.shuffle(columns)
    return written([array for _, array in columns], [name for name, _ in columns], rng)


def written(arrays: list[Any], names: list[str], rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    how = {"compression": rng.choice(("none", "snappy", "zstd", "gzip")), "use_dictionary": rng.random() < 0.6}
    how |= {"data_page_version": rng.choice(("1.0", "2.0")), "row_group_size": rng.choice((1, 64, 10**6))}
    try:
        pq.write_table(pa.Table.from_arrays(arrays, names=names), buffer, **how)
    except (pa.ArrowException, OSError, ValueError):  # what Arrow does not write, some other program may not either
        return written([pa.array(IMAGES[:2])], ["image"], rng)
    return buffer.getvalue()


def parquet_repeats(rng: random.Random) -> bytes:
    """A few bytes that stand for many: dictionaries, runs, and pages of zeros."""
    size, rows = rng.choice((10**3, 10**6, 3 * 10**7)), rng.choice((1, 100, 20_000))
    kind = rng.randrange(4)
    value = bytes(size)
    if kind == 0:
        image: Any = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
    elif kind == 1:
        image = pa.array([None] * rows * 5, pa.binary())  # each a row of its own: that takes its time
    elif kind == 2:
        image = pa.array([bytes(min(size, 10**5))] * min(rows, 200))
    else:
        image = pa.array([b"x"] * min(rows, 100))
    rest = (
        pa.array([[None] * min(size, 10**5)] * 3 + [[]] * (len(image) - 3)) if len(image) > 3 else pa.array([None] * len(image))
    )
    buffer = io.BytesIO()
    table = pa.table({"image": image, "note": rest})
    encoding = (
        {"column_encoding": {"image": "DELTA_BYTE_ARRAY"}, "use_dictionary": False} if kind == 2 else {"use_dictionary": True}
    )
    pq.write_table(table, buffer, compression="zstd", dictionary_pagesize_limit=2**30, **encoding)
    return buffer.getvalue()


def parquet_bytes(rng: random.Random) -> bytes:
    """A sound file in which bytes were changed: of its footer above all, of its pages' headers, of its Arrow schema."""
    data = bytearray(SOUND[rng.randrange(len(SOUND))])
    footer = int.from_bytes(data[-8:-4], "little") + 8
    for _ in range(rng.choice((1, 1, 2, 4, 30))):
        place = rng.choice((-rng.randrange(1, footer), rng.randrange(len(data)), rng.randrange(4, 200)))
        data[place] = rng.choice((0, 255, 0x80, 0x7F, rng.randrange(256)))
    if rng.random() < 0.1:
        place, length = rng.randrange(len(data)), rng.randrange(1, 400)
        data[place : place + length] = rng.choice((b"", bytes(length), data[:length]))
    if rng.random() < 0.1:
        data[-8:-4] = struct.pack("<I", rng.choice((0, 2**32 - 1, footer + 4000, len(data), rng.randrange(2**20))))
    return bytes(data)


def parquet_lies(rng: random.Random) -> bytes:
    """Pages whose headers say sizes and numbers that they do not have, and a footer whose numbers are others."""
    data = bytearray(SOUND[rng.randrange(len(SOUND))])
    for _ in range(rng.choice((1, 2, 3))):
        numbers = [
            place for place in range(4, len(data) - 8) if data[place] in (0x15, 0x16, 0x26)
        ]  # of fields that are integers
        place = rng.choice(numbers)
        long = varint(rng.choice((0, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, rng.randrange(2**34))))
        if rng.random() < 0.5:
            data[place + 1 : place + 1 + len(long)] = long
        else:
            data[place + 1 : place + 2] = long
            data[-8:-4] = struct.pack("<I", int.from_bytes(data[-8:-4], "little") + len(long) - 1)
    return bytes(data)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def sound_files() -> list[bytes]:
    """What the bent ones are made of."""
    columns = {"image": IMAGES, "key": list("abcd"), "label": [1, None, 3, 4], "note": [["x"], [], None, ["y", "z"]]}
    made = []
    for compression, version, dictionary in (
        ("none", "1.0", True),
        ("zstd", "2.0", False),
        ("snappy", "1.0", False),
        ("gzip", "2.0", True),
    ):
        buffer = io.BytesIO()
        pq.write_table(
            pa.table(columns),
            buffer,
            compression=compression,
            data_page_version=version,
            use_dictionary=dictionary,
            store_schema=version == "1.0",
        )
        made.append(buffer.getvalue())
    return made


SOUND = sound_files()


def header(name: str, size: int, kind: bytes = b"0", **changes: bytes) -> bytes:
    """A tar's header as it is told, with a right sum."""
    member = tarfile.TarInfo(name[:90])
    member.type = kind
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"\x80" + size.to_bytes(11, "big", signed=True) if not 0 <= size < 8**11 else b"%011o\0" % size
    for place, value in ((int(name[1:]), value) for name, value in changes.items()):
        raw[place : place + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def records(rng: random.Random) -> bytes:
    """What a pax header may say."""
    keys = (b"path", b"size", b"hdrcharset", b"comment", b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.map", b"mtime",
            b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.numblocks", b"GNU.sparse.name", b"uid")  # fmt: skip
    texts = (
        b"1",
        b"0",
        b"-1",
        b"9" * 30,
        b"9" * 5000,
        b"BINARY",
        b"\xff\xfe",
        b"a.png",
        b"0,1," * 200,
        b"../x.png",
        b"nan",
        b"x" * 70_000,
    )
    many = b"".join(record(b"k%d" % number, b"v") for number in range(rng.choice((0, 0, 0, 1000, 60_000))))
    said = b"".join(record(rng.choice(keys), rng.choice(texts)) for _ in range(rng.randrange(5))) + many
    return said if rng.random() < 0.85 else rng.choice((b"1 1 1 1 1 1 " * 5000 + b"=", b"9" * 100_000, b"0 x=y\n", b"5 x=y"))


def tar_headers(rng: random.Random) -> bytes:
    """Members and headers of all kinds, with sizes of all kinds."""
    pieces = []
    for number in range(rng.choice((1, 3, 10, 60))):
        what = rng.randrange(8)
        if what == 0:
            said = records(rng)
            pieces.append(
                header("h", len(said) + rng.choice((0, 0, 0, 600, -3)), rng.choice((b"x", b"g", b"X"))) + padded(said)
            )
        elif what == 1:
            long = b"n" * rng.choice((1, 300, 70_000, 2**20))
            pieces.append(header("L", len(long), rng.choice((b"L", b"K"))) + padded(long))
        elif what == 2:
            pieces.append(
                header(
                    "l.png",
                    rng.choice((0, 0, 5)),
                    rng.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"D", b"M", b"V", b"9")),
                )
            )
        elif what == 3:
            pieces.append(sparse(rng, number))
        elif what == 4:
            size = rng.choice((0, 5, 10**6, 10**12, 2**62, -1, -512, -(2**40)))
            pieces.append(header(f"{number}.png", size))
        else:
            data = rng.choice(
                (IMAGES[number % 4], b"{}", b'{"label": ' + b"9" * rng.choice((1, 5000)) + b"}", b"[" * 3000, b"\xff")
            )
            name = rng.choice(("a", f"{number}", "./x/" + "d/" * 30 + "y", "..", "", "caf\xe9")) + rng.choice(
                (".png", ".json", ".note", ".cls", "")
            )
            pieces.append(header(name, len(data)) + padded(data))
    data = b"".join(pieces) + bytes(rng.choice((1024, 10240, 0, 512, 100)))
    return data if rng.random() < 0.9 else data[: rng.randrange(1, len(data))]


def sparse(rng: random.Random, number: int) -> bytes:
    """An old sparse header, continued or not, whose map is as it likes."""

    def place(value: int) -> bytes:
        return (
            b"\x80" + value.to_bytes(11, "big", signed=True)
            if rng.random() < 0.5 or value < 0
            else b"%011o\0" % (value % 8**11)
        )

    sizes = (0, 1, 512, 10**6, 10**9, 2**40, -5)
    entries = b"".join(place(rng.choice(sizes)) for _ in range(8))
    more = rng.choice((0, 0, 1))
    head = header(
        f"{number}.png",
        512,
        b"S",
        _386=entries,
        _482=bytes([more]),
        _483=place(rng.choice((0, 512, 10**6, 2 * 10**8, 10**15, -1))),
    )
    blocks = [
        b"".join(place(rng.choice(sizes)) for _ in range(42)) + b"\1" + bytes(7)
        for _ in range(rng.choice((1, 20, 3000)) * more)
    ]
    return head + b"".join(blocks) + bytes(512)


def tar_bytes(rng: random.Random) -> bytes:
    """A sound tar in which bytes were changed, with right sums or wrong ones, or that was cut."""
    members = [
        (f"{number}.{kind}", data)
        for number, image in enumerate(IMAGES)
        for kind, data in (("png", image), ("json", b'{"label": 1}'))
    ]
    data = bytearray(tar_of(members, kind=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))))
    for _ in range(rng.choice((1, 3, 10))):
        block = 512 * rng.randrange(len(data) // 512)
        place = block + rng.choice((0, 124, 130, 135, 156, 257, 345, 386, 482, rng.randrange(512)))
        data[place] = rng.choice((0, 255, 48, 55, 128, rng.randrange(256)))
        if rng.random() < 0.8:
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    return bytes(data) if rng.random() < 0.8 else bytes(data[: rng.randrange(len(data))])


def loose(rng: random.Random) -> bytes:
    """An image alone: bytes that are none, or are one, or begin as one."""
    data = rng.choice(IMAGES)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + (ihdr := b"IHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    )
    return rng.choice(
        (data, b"", data[: rng.randrange(len(data))], bomb + struct.pack(">I", zlib.crc32(ihdr)), bytes(1000), b"GIF89a" + data)
    )


KINDS: dict[str, tuple[str, Make]] = {
    "parquet: schemas": ("parquet", parquet_schemas),
    "parquet: repeated values": ("parquet", parquet_repeats),
    "parquet: changed bytes": ("parquet", parquet_bytes),
    "parquet: false numbers": ("parquet", parquet_lies),
    "tar: headers": ("tar", tar_headers),
    "tar: changed bytes": ("tar", tar_bytes),
    "loose images": ("png", loose),
}
SHARES = (6, 1, 6, 6, 6, 4, 2)


def shards(seed: int, count: int, first: int = 0) -> Iterator[tuple[int, str, str, bytes]]:
    """(number, kind, extension, bytes), the same for a seed and number, however many come before."""
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        (kind,) = rng.choices(list(KINDS), SHARES)
        extension, make = KINDS[kind]
        yield number, kind, extension, make(rng)


def outcome_of(path: Path, how: Layout) -> str:
    """`rows`, `rejects` or `error`, by the stage of the chain that reads and decodes; `refused` before anything is started."""
    try:
        (shard,) = list_shards((str(path),), {})
    except ConfigError:
        return "refused"
    outcome = "rows"
    for row in decode_items({"block": [Block(items=(WorkItem(shard=shard),))]}, how, PREPROCESSING, {}):
        head = ChunkHead.from_json(row["head"][0])
        if head.error:
            assert head.error.startswith(str(path.parent)), head.error
            assert len(head.error) < 2000, head.error
            return "error"
        reasons = set(from_ipc(row["samples"][0]).column("reason").to_pylist()) - {None}
        assert reasons <= set(REASONS), reasons
        outcome = "rejects" if reasons else outcome
    return outcome


def try_all(seed: int, count: int, first: int = 0) -> Findings:
    """Read and decode them, one after the other, in this process: whatever else than those outcomes is a failure."""
    found, how = Findings(), layout(chunk_size=64, carry=CARRY, max_bytes=2**28)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, kind, extension, data in shards(seed, count, first):
            path = Path(folder, f"{number}.{extension}")
            path.write_bytes(data)
            started = time.monotonic()
            try:
                outcome = outcome_of(path, how)
            except Exception as error:  # noqa: BLE001  # which is what is looked for
                outcome = "failure"
                found.failures.append(f"number {number}, {kind}: {type(error).__name__}: {str(error)[:300]}")
            seconds = time.monotonic() - started
            if seconds > LIMIT_S:
                found.failures.append(f"number {number}, {kind}: {seconds:.1f} s")
            found.outcomes[kind, outcome] += 1
            found.slowest = max(found.slowest, (seconds, f"number {number}, {kind}, {len(data)} bytes"))
            path.unlink()
        found.peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if found.peak > ROOM:
        found.failures.append(f"{found.peak / 2**20:.0f} MiB of memory")
    return found


def try_apart(seed: int, count: int, timeout_s: float = 3600) -> Findings:
    """The same in a process of its own, which may die of it."""
    command = [sys.executable, __file__, "--seed", str(seed), "--count", str(count), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if ended.returncode not in (0, 1) or not ended.stdout:
        return Findings(failures=[f"exit code {ended.returncode}: {ended.stderr[-2000:]}"])
    told = json.loads(base64.b64decode(ended.stdout.splitlines()[-1]))
    outcomes = Counter({(kind, name): number for kind, name, number in told["outcomes"]})
    return Findings(outcomes=outcomes, slowest=tuple(told["slowest"]), failures=told["failures"], peak=told["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a line of base64 in place of a table")
    options = parser.parse_args()
    found = try_all(options.seed, options.count, options.first)
    if options.json:
        outcomes = [[*key, number] for key, number in found.outcomes.items()]
        told = {"outcomes": outcomes, "slowest": found.slowest, "failures": found.failures, "peak": found.peak}
        print(base64.b64encode(json.dumps(told).encode()).decode())
    else:
        print(found.describe())
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
