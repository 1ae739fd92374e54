"""Going on within a tar: what is left comes out as it would have, and nothing of the rest is read."""

import itertools
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_embed.chain.chunks import DecodedChunk, decode_shard
from lora_embed.chain.items import Staged, WorkItem
from lora_embed.chain.resume import FROM_THE_START, find_stretches, missing_runs
from lora_embed.errors import ShardError
from lora_embed.schema import Shard, to_ipc
from lora_embed.store.store import Store
from lora_embed.table.parts import make_part, part_path, read_place, write_part
from samples import PREPROCESSING, layout, png, shard_at, tar_of

LAYOUT = layout(chunk_size=2, carry=(("label", "int64"),))
CHUNKS = 5
LONG = "folder/" * 20  # more than a header holds: it goes before, in a header of its own


def members() -> list[tuple[str, bytes]]:
    """Nine samples: three of them with a field, one without an image, one whose key an earlier chunk has, some hidden files."""
    found = [(f"{number}.png", png(number)) for number in range(8)]
    found[1:1] = [("0.json", b'{"label": 7}'), ("._1.png", b"of another system")]
    found[4:4] = [("._2.png", b"between two chunks")]
    found[7:7] = [("4.json", b'{"label": 8}')]
    return [*found[:-2], ("1.png", png(1)), ("no-image.json", b'{"label": 9}'), (f"{LONG}8.png", png(8))]


def key_of(chunk: DecodedChunk) -> tuple[object, ...]:
    """All that is handed on."""
    return replace(chunk.head, seconds={}), to_ipc(chunk.samples), chunk.pixels.tobytes()


def decoded(item: WorkItem) -> list[DecodedChunk]:
    return list(decode_shard(item, LAYOUT, PREPROCESSING, {}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "table"))


def commit(store: Store, chunks: list[DecodedChunk]) -> list[Path]:
    paths = []
    for chunk in chunks:
        vectors = np.zeros((max(1, chunk.head.good), 3), np.float32)
        assert write_part(store, "space", LAYOUT, chunk.head, make_part(chunk.head, chunk.samples, vectors, LAYOUT))
        paths.append(Path(store.full_path(part_path("space", LAYOUT.layout_id, chunk.head.part))))
    return paths


def what_is_left(shard: Shard, store: Store, done: set[int]) -> WorkItem:
    last = CHUNKS - 1 if CHUNKS - 1 in done else None
    return WorkItem(shard=shard, done=frozenset(done), staged=Staged(store=store, space_id="space", last=last))


def test_missing_runs() -> None:
    assert list(missing_runs(frozenset(), None)) == [(0, None)]
    assert list(missing_runs(frozenset({0, 1, 4}), None)) == [(2, 4), (5, None)]
    assert list(missing_runs(frozenset({1, 2, 5}), 5)) == [(0, 1), (3, 5)]
    assert list(missing_runs(frozenset({0, 1}), 1)) == []


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_whatever_is_missing_comes_out_as_it_was_and_only_that_is_read(tmp_path: Path, store: Store, kind: int) -> None:
    """The bytes of committed chunks are overwritten: whoever read one of them would not get past it."""
    path = tmp_path / "a.tar"
    shard = shard_at(path, tar_of(members(), kind))
    whole = decoded(WorkItem(shard=shard))
    assert [chunk.head.chunk for chunk in whole] == list(range(CHUNKS))
    assert whole[3].samples["reason"].to_pylist() == ["duplicate_id", "no_image"]
    assert [chunk.head.last for chunk in whole] == [False] * 4 + [True]
    commit(store, whole)
    good, state = path.read_bytes(), path.stat()
    for count in range(1, CHUNKS):
        for done in map(set, itertools.combinations(range(CHUNKS), count)):
            harmed = bytearray(good)
            for chunk in done:
                begin, end = whole[chunk].head.begin, whole[chunk].head.end
                assert begin is not None
                assert end is not None
                harmed[begin:end] = b"\xff" * (end - begin)
            path.write_bytes(harmed)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
            rest = decoded(what_is_left(shard, store, done))
            assert [key_of(chunk) for chunk in rest] == [key_of(chunk) for chunk in whole if chunk.head.chunk not in done]


def test_an_end_that_was_not_proven_is_proven(tmp_path: Path, store: Store) -> None:
    data = tar_of(members())
    end = decoded(WorkItem(shard=shard_at(tmp_path / "whole.tar", data)))[-1].head.end
    shard = shard_at(tmp_path / "a.tar", data[:end] + b"x" * 512)
    chunks = decode_shard(WorkItem(shard=shard), LAYOUT, PREPROCESSING, {})
    commit(store, list(itertools.islice(chunks, 3)))
    with pytest.raises(ShardError, match=r"incomplete (or damaged )?tar"):
        decoded(what_is_left(shard, store, {0, 1, 2}))


def test_a_shard_that_is_replaced_meanwhile_is_noticed(tmp_path: Path, store: Store) -> None:
    shard = shard_at(tmp_path / "a.tar", tar_of(members()))
    commit(store, decoded(WorkItem(shard=shard)))
    rest = decode_shard(what_is_left(shard, store, {0, 1, 3, 4}), LAYOUT, PREPROCESSING, {})
    os.utime(tmp_path / "a.tar", (1, 1))
    with pytest.raises(ShardError, match="changed since it was listed"):
        list(rest)


def test_it_reads_from_the_start_where_parts_are_gone_or_of_an_earlier_release(tmp_path: Path, store: Store) -> None:
    shard = shard_at(tmp_path / "a.tar", tar_of(members()))
    whole = decoded(WorkItem(shard=shard))
    paths = commit(store, whole)
    item = what_is_left(shard, store, {0, 1, 2})
    assert find_stretches(item, LAYOUT) != FROM_THE_START
    paths[1].unlink()
    assert find_stretches(item, LAYOUT) == FROM_THE_START
    head = replace(whole[1].head, begin=None, end=None)
    vectors = np.zeros((2, 3), np.float32)
    write_part(store, "space", LAYOUT, head, make_part(head, whole[1].samples, vectors, LAYOUT))
    assert find_stretches(item, LAYOUT) == FROM_THE_START
    assert [key_of(chunk) for chunk in decoded(item)] == [key_of(chunk) for chunk in whole[3:]]


def test_it_reads_from_the_start_where_headers_for_the_whole_tar_stand_there(tmp_path: Path, store: Store) -> None:
    """Such as the comment that `git archive` writes; others change how names are to be understood."""
    data = tar_of(members(), tarfile.PAX_FORMAT, pax_headers={"comment": "all"})
    shard = shard_at(tmp_path / "a.tar", data)
    whole = decoded(WorkItem(shard=shard))
    assert {(chunk.head.begin, chunk.head.end is None) for chunk in whole[:-1]} == {(None, True)}
    commit(store, whole)
    rest = decoded(what_is_left(shard, store, {0, 1, 3}))
    assert [key_of(chunk) for chunk in rest] == [key_of(chunk) for chunk in (whole[2], whole[4])]


def test_a_part_tells_its_bytes_and_keys(tmp_path: Path, store: Store) -> None:
    shard = shard_at(tmp_path / "a.tar", tar_of(members()))
    whole = decoded(WorkItem(shard=shard))
    commit(store, whole)
    places = [read_place(store, part_path("space", LAYOUT.layout_id, chunk.head.part)) for chunk in whole]
    found = [place for place in places if place is not None]
    assert len(found) == CHUNKS
    assert found[0].keys == {"0", "1"}
    assert [place.begin for place in found[1:]] == [place.end for place in found[:-1]]
