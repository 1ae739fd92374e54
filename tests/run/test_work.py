"""What a worker is given at once, and a job whose table would be lost."""

from pathlib import Path

import pytest

from jobs import job_of
from lora_embed.chain.items import WorkItem
from lora_embed.chain.pipeline import BLOCK_BYTES, BLOCK_ITEMS, plan_blocks
from lora_embed.entries import Entry
from lora_embed.errors import ConfigError
from lora_embed.run.open import OpenJob
from lora_embed.run.refuse import SUBMITTED, refuse_local_paths
from lora_embed.schema import Shard
from lora_embed.shards.listing import Listing
from lora_embed.store.store import Store


def items(count: int, size: int) -> list[WorkItem]:
    files = [(f"{number:05d}.tar", Entry(path=f"{number:05d}.tar", size=size, etag="1")) for number in range(count)]
    return [
        WorkItem(shard=Shard(id=name, name=name, prefix=name, kind="tar", root="s3://images", files=(entry,)))
        for name, entry in files
    ]


@pytest.mark.parametrize(
    ("count", "size", "actors", "blocks"),
    [
        (20, 1000, 2, 20),  # few: one each, so that every actor has work
        (10_000, 1000, 2, 157),  # many small ones: as many to a block as may be
        (10_000, 1000, 100, 834),  # but every actor gets several blocks
        (100, BLOCK_BYTES, 1, 100),  # large ones go alone
        (1000, BLOCK_BYTES // 4, 2, 250),
    ],
)
def test_blocks_hold_one_large_shard_or_several_small_ones(count: int, size: int, actors: int, blocks: int) -> None:
    given = items(count, size)
    planned = plan_blocks(given, actors)
    assert len(planned) == blocks
    assert [item for block in planned for item in block.items] == given
    assert max(len(block.items) for block in planned) <= BLOCK_ITEMS


def test_a_table_in_the_submitted_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "submitted").mkdir()
    monkeypatch.chdir(tmp_path / "submitted")
    job = job_of(tmp_path / "submitted", tmp_path / "recipe.yaml", tmp_path / "shards")
    opened = OpenJob(job=job, store=Store(job.table), listing=Listing(shards=[]), source=tmp_path, current=None, encoder=None)
    monkeypatch.setenv(SUBMITTED, "{}")
    with pytest.raises(ConfigError, match="is in Ray's copy of the submitted folder, which Ray removes"):
        refuse_local_paths(opened, None)
