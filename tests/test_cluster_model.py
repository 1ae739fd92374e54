"""The model of a large cluster against cases computed by hand, and its costs as this machine has them."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray

from jobs import ROOT
from lora_embed.pipeline import BLOCKS_IN_WAVE, WAVE, plan_blocks
from lora_embed.schema import Shard, WorkItem
from lora_embed.storage import Entry

sys.path.append(str(ROOT / "benchmarks"))

from cluster_model import Costs, Setting, calibrate, describe, predict, shards_per_block, tabulate

SETTING = Setting(
    nodes=2, gpus_per_node=1, cpus_per_node=10, forward=100, node_bandwidth=1e6, storage_bandwidth=1e6, stream_bandwidth=1e5,
    commit_s=0.1, object_store=1e6, crossing=0.5, images=1000, image_bytes=1000, images_per_shard=100, chunk_size=60, side=10,
    dimension=250,
)  # fmt: skip
COSTS = Costs(
    read_s=0.001, decode_s=0.007, transfer_s=0.002, write_s=0.001, driver_s=0.05, plan_s=0.01, verify_s=0.02,
    manifest_bytes=150, wave_s=5,
)  # fmt: skip


def test_every_resource_allows_what_it_does_by_hand() -> None:
    """Shards of 100 in two chunks of 50; 300 bytes of pixels and 1000 of vectors an image; 20 CPUs and decoders, 2 GPUs."""
    found = predict(SETTING, COSTS)
    by_hand = {
        "GPUs": 2 * 100,
        "writers": 2 * 50 / (0.1 + 50 * 0.001),
        "storage": 1e6 / (1000 + 1000),
        "blocks": 10 / (0.01 + 1000 / 1e5),  # ten shards, each in one decoder that also waits for bytes
        "decode CPUs": 20 / (0.01 + 0.001 + 1 / 100),
        "decoders": 20 / (0.01 + 1000 / 1e5),
        "driver": 50 / 0.05,
        "object store": 20 * (0.5 * 1e6 / 300_000) / 0.02,
        "node network": 2 * 1e6 / (1000 + 0.5 * 300),
    }
    assert found.allows == pytest.approx(by_hand)
    assert next(iter(found.allows)) == "GPUs"
    assert found.rate == 200
    assert list(found.allows.values()) == sorted(found.allows.values())
    assert found.store_bytes == 2 * 50 * 300 * 10
    assert found.manifest_bytes == 10 * 150


def test_every_phase_takes_what_it_does_by_hand() -> None:
    found = predict(SETTING, COSTS)
    moved_s = 2 * 1000 * 1000 / 1e6  # vectors read and written, at the storage's rate
    by_hand = {"plan": 10 * 0.01, "embed": 1000 / 200, "waves": 5 + 100 * 0.02 / 2, "publish": 10 * 0.02 / 20 + moved_s}
    assert found.seconds == pytest.approx(by_hand)
    assert (found.bound, predict(SETTING, replace(COSTS, wave_s=3.9)).bound) == ("starts of waves", "GPUs")


def test_cores_that_embed_move_no_pixels() -> None:
    found = predict(replace(SETTING, gpus_per_node=0), COSTS)
    core_s = 0.008 + 0.001 + 1 / 100
    actor_s = core_s + 0.1 / 50 + 1000 / 1e5  # it waits for storage, too
    by_hand = {
        "blocks": 10 / actor_s,
        "storage": 500,
        "decoders": 20 / actor_s,
        "driver": 1000,
        "decode CPUs": 20 / core_s,
        "node network": 2000,
    }
    assert found.allows == pytest.approx(by_hand)
    assert found.store_bytes == 0


def test_half_a_cpu_per_decoder_is_twice_the_decoders_and_no_more_cpus() -> None:
    one, half = (predict(replace(SETTING, cpus_per_decode=share), COSTS) for share in (1.0, 0.5))
    assert half.allows["decoders"] == 2 * one.allows["decoders"]
    assert half.allows["decode CPUs"] == one.allows["decode CPUs"]
    assert half.allows["object store"] == one.allows["object store"]
    assert half.store_bytes == 2 * one.store_bytes


def test_each_wave_starts_its_actors_anew() -> None:
    setting = replace(SETTING, images=250_000, image_bytes=1e6)  # 2,500 shards of 100 MB: a block each
    found = predict(setting, COSTS)
    holds_s = 0.01 + 1e6 / 1e5
    assert found.seconds["waves"] == pytest.approx(2 * (5 + 100 * holds_s / 2))
    assert found.allows["blocks"] == pytest.approx(WAVE / holds_s)


def test_a_wave_holds_blocks_enough_for_all_decoders_of_a_large_cluster() -> None:
    large = predict(replace(SETTING, nodes=1000, images=10**8, image_bytes=1e6), COSTS)  # a million shards
    assert large.blocks == BLOCKS_IN_WAVE * 10_000 > WAVE


@pytest.mark.parametrize(("shards", "readers"), [(3, 2), (100, 2), (1000, 2), (5000, 4)])
@pytest.mark.parametrize("size", [1000, 3_000_000, 20_000_000, 100_000_000])
def test_blocks_are_those_of_the_pipeline(shards: int, readers: int, size: int) -> None:
    entry = Entry(path="a.tar", size=size, etag="")
    shard = Shard(id="0", name="a.tar", prefix="a.tar", kind="tar", root="/", files=(entry,))
    planned = plan_blocks([WorkItem(shard=shard)] * shards, readers)
    assert max(len(block.items) for block in planned) == min(shards_per_block(shards, readers, size), shards)
    assert len(planned) == -(-shards // shards_per_block(shards, readers, size))


def test_more_nodes_never_slow_a_wave_down() -> None:
    rates = [predict(replace(SETTING, nodes=nodes, images=10**9), COSTS).rate for nodes in range(1, 300)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_what_is_printed_names_the_bound_and_how_much_to_add() -> None:
    costs = replace(COSTS, wave_s=1)
    text = describe(SETTING, predict(SETTING, costs))
    assert "2 nodes, 1,000 images: 200 images/s inside a wave, bound by GPUs" in text
    assert "to add: 1 → 2.5 GPUs per node; then storage bounds" in text
    assert "driver        20.0%  allows         1,000 images/s" in text
    assert "most of it is its start" not in text
    assert "most of it is its start" in describe(SETTING, predict(SETTING, COSTS))
    lines = tabulate(SETTING, costs).splitlines()
    assert [int(line.split()[0]) for line in lines[1:]] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert lines[2].split() == ["2", "200", "0.00", "55%", "22%", "GPUs"]  # 5 of 9.11 s, 2 of them
    assert lines[-1].endswith("storage")
    assert tabulate(SETTING, COSTS).splitlines()[2].endswith("starts of waves")


@pytest.mark.long
def test_all_costs_are_measured(tmp_path: Path) -> None:
    ray.shutdown()
    costs = calibrate(tmp_path, dimension=384, count=12)
    ray.shutdown()
    assert all(cost > 0 for cost in asdict(costs).values()), costs
    assert 100 < costs.manifest_bytes < 300
