"""References to a real S3 server: keys as people have them, faults that pass, and places that a list may not name."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lists import write_list
from lora_embed.errors import ConfigError, ShardError, StorageError, StoreUnavailable
from lora_embed.schema import Sample, Shard
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from lora_embed.store.store import Store
from s3 import Faults, Proxy, S3Server
from samples import layout, png

KEYS = ["a.png", "b c.png", "d::e.png", "f{1}[2]*.png", "g?x=1#y.png", "h+i%20j.png", "ä/ö.png", "k//l.png", "n"]


@pytest.fixture(scope="module")
def images(server: S3Server) -> dict[str, bytes]:
    """What lies on the server below `images/in`, by key."""
    files = {key: png(number) for number, key in enumerate(KEYS)}
    for key, data in files.items():
        Store("s3://images/in", server.options()).replace(key, data)
    server.make_bucket("others")
    Store("s3://others", server.options()).replace("a.png", png(99))
    return files


def listed(source: str, options: dict[str, Any], **changes: Any) -> list[Shard]:
    return list_shards((source,), options, references=References(column="url", **changes))


def samples(shards: list[Shard], options: dict[str, Any]) -> list[Sample]:
    return [sample for shard in shards for sample in read_samples(shard, layout(), options, lambda number: True)]


def on_s3(folder: Path, server: S3Server, name: str, urls: list[str]) -> str:
    """A list that lies beside the images."""
    path = write_list(folder / name, {"url": urls})
    Store("s3://images/in", server.options()).replace(name, path.read_bytes())
    return f"s3://images/in/{name}"


@pytest.mark.parametrize("name", ["l.parquet", "l.jsonl"])
def test_every_key_is_found_by_its_name(tmp_path: Path, server: S3Server, images: dict[str, bytes], name: str) -> None:
    whole = [f"s3://images/in/{key}" for key in images]
    expected = list(images.values())
    relative = [key for key in images if "//" not in key]
    source = on_s3(tmp_path, server, name, [*whole, *relative, "gone.png", "../in/a.png"])
    found = samples(listed(source, server.options()), server.options())
    assert [sample.data for sample in found] == [*expected, *(images[key] for key in relative), None, images["a.png"]]
    assert found[-2].problem == ("no_image", "gone.png does not exist")
    local = write_list(tmp_path / name, {"url": [*whole, "s3a://images/in/a.png", "s3://images/in/gone.png"]})
    found = samples(listed(str(local), server.options(), roots=("s3://images/in",)), server.options())
    assert [sample.data for sample in found] == [*expected, images["a.png"], None]


@pytest.mark.parametrize(
    "reference", ["s3://others/a.png", "/etc/hostname", "file:///etc/hostname", "gs://images/in/a.png", "memory://a/b"]
)
def test_a_list_names_its_own_bucket(tmp_path: Path, server: S3Server, images: dict[str, bytes], reference: str) -> None:
    """Unless the job names a place: no other bucket, and nothing on this machine's disks."""
    source = on_s3(tmp_path, server, "m.csv", ["a.png", reference])
    with pytest.raises(ConfigError, match=r"row 2 names .*, but a list may name only files of its own store"):
        listed(source, server.options())
    if reference.startswith("s3"):
        with pytest.raises(ConfigError, match=r"set reference_roots in the job, for example to \[s3://others\]"):
            listed(source, server.options(), roots=("s3://others/b", "s3://other"))
        shards = listed(source, server.options(), roots=("s3://others",))
        assert [sample.data for sample in samples(shards, server.options())] == [images["a.png"], png(99)]


@pytest.mark.parametrize(
    "reference", ["../../others/a.png", "..", "s3://images/../others/a.png", "s3://x/a", "s3://images", "a\0b", "k" * 1025]
)
def test_what_can_name_nothing_is_a_reject(tmp_path: Path, server: S3Server, images: dict[str, bytes], reference: str) -> None:
    source = on_s3(tmp_path, server, "n.jsonl", ["a.png", reference])
    good, bad = samples(listed(source, server.options()), server.options())
    assert (good.data, bad.data) == (images["a.png"], None)
    assert bad.problem is not None
    assert bad.problem[0] == "no_image"


def test_faults_that_pass_cost_nothing_and_others_are_no_rejects(
    tmp_path: Path, server: S3Server, images: dict[str, bytes]
) -> None:
    source = on_s3(tmp_path, server, "o.csv", [f"s3://images/in/{key}" for key in images])
    with Proxy(server.endpoint, Faults(3, error=0.15, reset=0.1, cut=0.1)) as proxy:
        options = server.options(proxy.endpoint) | {"config_kwargs": {"read_timeout": 1.0}, "retry_s": 30}
        found = samples(listed(source, options), options)
    assert [sample.data for sample in found] == list(images.values())
    shards = listed(source, server.options())
    gone = server.options("http://127.0.0.1:1") | {"retry_s": 0.3}
    with pytest.raises(StoreUnavailable, match="no usable answer"):
        samples(shards, gone)
    with pytest.raises(StorageError, match=r"access denied"):
        samples(shards, server.options(keys=("wrongkey", "wrongsecret1")))


def test_an_object_that_changed_since_it_was_checked_is_noticed(
    tmp_path: Path, server: S3Server, images: dict[str, bytes]
) -> None:
    store = Store("s3://images/in", server.options())
    store.replace("p.png", png(1))
    shards = listed(on_s3(tmp_path, server, "p.csv", ["p.png"]), server.options(), checks=True)
    assert [sample.data for sample in samples(shards, server.options())] == [png(1)]
    store.replace("p.png", png(2))
    with pytest.raises(ShardError, match=r"p.png: changed since it was listed. Run the same command again."):
        samples(shards, server.options())


MILLION = """
import json, re, sys, time
from pathlib import Path
import psutil
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import list_shards
source, options = sys.argv[1], json.loads(sys.argv[2])
before, started = psutil.Process().memory_info().rss, time.monotonic()
shards = list_shards((source,), options, references=References(column="url", fields=("label",)))
seconds = time.monotonic() - started
peak = int(re.search(r"VmHWM:\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([seconds, psutil.Process().memory_info().rss - before, peak - before, [shard.id for shard in shards]]))
"""


@pytest.mark.long
def test_a_million_references_are_planned_in_seconds_and_little_memory(tmp_path: Path, server: S3Server) -> None:
    """And a night with one new image in the middle of the list has one stale range, or two."""
    urls = [f"s3://images/{n // 1000:05d}/{hashlib.md5(b'%d' % n).hexdigest()}.jpg" for n in range(1_000_000)]

    def listed_apart() -> tuple[float, int, int, list[str]]:
        columns = {"url": urls, "label": [f"class {url[-5]}" for url in urls]}
        pq.write_table(pa.table(columns), tmp_path / "m.parquet")
        Store("s3://images", server.options()).filesystem.put_file(str(tmp_path / "m.parquet"), "images/m.parquet")
        command = [sys.executable, "-c", MILLION, "s3://images/m.parquet", json.dumps(server.options())]
        seconds, held, peak, ids = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"\n{seconds:.1f} s, {held / len(urls):.0f} bytes a reference, {peak / len(urls):.0f} at most, {len(ids)} shards")
        return seconds, held, peak, ids

    seconds, held, peak, before = listed_apart()
    assert seconds < 60  # about 7 on one free core
    assert held < 300 * len(urls)
    assert peak < 400 * len(urls)
    urls.insert(500_000, "s3://images/new.jpg")
    assert len(set(listed_apart()[3]) - set(before)) <= 2
