"""Compressed tars: read like the tars in them, in bounded memory, up to their checked end."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import job_of, run_here, tiny_recipe
from lora_embed.errors import ShardError, StoreUnavailable
from lora_embed.run.job import run_job
from lora_embed.shards import compressed, read
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import count_samples, read_samples
from lora_embed.store.store import Store
from s3 import Faults, Proxy, S3Server
from samples import layout, png, samples_of, shard_at, tar_of


def by_arrow(kind: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, kind) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESS = {
    ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress, ".tbz2": bz2.compress, ".tar.xz": lzma.compress,
    ".txz": lzma.compress, ".tar.zst": by_arrow("zstd"), ".tzst": by_arrow("zstd"), ".tar.lz4": by_arrow("lz4"),
}  # fmt: skip
# Sizes on both sides of what is unpacked at once, so that headers lie on both sides of a piece's end.
MEMBERS = [
    (f"{n:03d}.{kind}", data) for n in range(40) for kind, data in (("png", png(n) + bytes(n * 6000)), ("cls", b"%d" % n))
]
TAR = tar_of(MEMBERS)
KINDS = pytest.mark.parametrize("ending", COMPRESS)


@KINDS
def test_a_compressed_tar_is_read_like_the_tar_in_it(tmp_path: Path, ending: str) -> None:
    carry = (("cls", "string"),)
    plain = samples_of(shard_at(tmp_path / "a.tar", TAR), carry=carry)
    unpacked = samples_of(shard_at(tmp_path / f"A{ending.upper()}", COMPRESS[ending](TAR)), carry=carry)
    assert [(s.key, s.data, s.fields) for s in unpacked] == [(s.key, s.data, s.fields) for s in plain]
    assert {(sample.begin, sample.end) for sample in unpacked} == {(None, None)}  # no reader can begin within
    assert len(TAR) > 4 * compressed.PIECE


@KINDS
def test_only_wanted_members_are_kept(tmp_path: Path, ending: str) -> None:
    shard = shard_at(tmp_path / f"a{ending}", COMPRESS[ending](TAR))
    samples = list(read_samples(shard, layout(), {}, lambda number: number in (3, 39)))
    assert [number for number, sample in enumerate(samples) if sample.data] == [3, 39]
    assert count_samples(shard, layout(), {}, 10**6) == 40


@KINDS
def test_what_follows_or_is_missing_is_noticed(tmp_path: Path, ending: str) -> None:
    whole = COMPRESS[ending](TAR)
    damaged = whole[: len(whole) // 2] + bytes(9) + whole[len(whole) // 2 + 9 :]
    half = COMPRESS[ending](TAR[: len(TAR) // 2])  # whole for its compression, and cut short as a tar
    for bad in (
        whole[:-20],
        whole[: len(whole) // 2],
        whole + b"garbage!" * 9,
        damaged,
        half,
        COMPRESS[ending](b"no tar" * 999),
    ):
        if bad == damaged and ending in (".tar.zst", ".tzst", ".tar.lz4"):  # Arrow writes them without sums
            continue
        with pytest.raises(ShardError, match=r"incomplete|damaged|is not a tar"):
            samples_of(shard_at(tmp_path / f"a{ending}", bad))


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
def test_streams_that_follow_each_other_are_one_tar(tmp_path: Path, ending: str) -> None:
    """As programs write them that compress on several cores."""
    pieces = [COMPRESS[ending](TAR[start : start + 700_000]) for start in range(0, len(TAR), 700_000)]
    assert len(samples_of(shard_at(tmp_path / f"a{ending}", b"".join(pieces)))) == 40


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    assert samples_of(shard_at(tmp_path / "a.tar.gz", gzip.compress(tar_of([])))) == []
    with pytest.raises(ShardError, match="has 0 bytes"):
        samples_of(shard_at(tmp_path / "b.tar.gz", b""))


@KINDS
def test_a_bomb_ends_at_its_limit(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MOST_UNPACKED", 3 * 2**20)
    monkeypatch.setattr(read, "TIMES_UNPACKED", 1)
    shard = shard_at(tmp_path / f"a{ending}", COMPRESS[ending](tar_of([("a.png", png()), ("b.bin", bytes(8 * 2**20))])))
    with pytest.raises(ShardError, match="unpacks to more than 3 MiB"):
        samples_of(shard)


def test_an_xz_that_needs_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "MOST_DICTIONARY", 2**20)
    with pytest.raises(ShardError, match="Memory usage limit exceeded"):
        samples_of(shard_at(tmp_path / "a.tar.xz", lzma.compress(TAR)))


def test_a_store_that_fails_while_a_tar_is_unpacked_is_no_damaged_tar(server: S3Server) -> None:
    Store("s3://images/packed", server.options()).replace("a.tar.gz", gzip.compress(TAR))
    (shard,) = list_shards(("s3://images/packed/a.tar.gz",), server.options())
    flaky = {"config_kwargs": {"read_timeout": 1.0}, "retry_s": 30}
    with Proxy(server.endpoint, Faults(5, error=0.2, reset=0.1, cut=0.1)) as proxy:
        assert len(list(read_samples(shard, layout(), server.options(proxy.endpoint) | flaky, lambda number: True))) == 40
    never = Faults(5, only=lambda request: request.method == "GET", error=1.0)
    with Proxy(server.endpoint, never) as proxy, pytest.raises(StoreUnavailable, match="no usable answer"):
        list(read_samples(shard, layout(), server.options(proxy.endpoint) | flaky | {"retry_s": 0.5}, lambda number: True))


def test_a_stopped_run_embeds_only_the_missing_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar.gz").write_bytes(gzip.compress(TAR))
    job = job_of(tmp_path, tiny_recipe(tmp_path), tmp_path / "in", chunk_size=8)
    assert run_job(job, publishes=False).embedded == 40
    parts = sorted((tmp_path / "table" / "staging").rglob("*-0000000*.parquet"))
    assert len(parts) == 5
    for part in parts[1:3]:
        part.unlink()
    result = run_job(job)
    assert (result.embedded, result.counts["vectors"]) == (16, 40)


def test_going_far_back_is_one_message() -> None:
    file = compressed.Unpacked(io.BytesIO(gzip.compress(bytes(4 * compressed.PIECE))), "a.tgz", 2**30, "a.tgz")
    file.seek(3 * compressed.PIECE)
    assert (file.seek(3 * compressed.PIECE - 1), file.read(2)) == (3 * compressed.PIECE - 1, b"\0\0")
    with pytest.raises(ShardError, match=r"a.tgz: cannot be read in order, which a compressed tar must be"):
        file.seek(0)
