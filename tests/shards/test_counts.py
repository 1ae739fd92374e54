"""Samples in = rows + rejects + passed over, for 200 crooked inputs made by a seed, against a count made while writing them."""

import io
import os
import random
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.shards.kinds import IMAGES, OTHER_IMAGES, USUAL_IMAGES
from lora_embed.shards.listing import list_input
from samples import PREPROCESSING, layout, png, tar_of

PNG = png()


@dataclass
class Count:
    """What was written: samples with and without a good image, and what is to be passed over."""

    good: int = 0
    bad: int = 0
    passed: Counter[str] = field(default_factory=Counter)


def write_tar(path: Path, draw: random.Random, count: Count) -> None:
    """Samples of all kinds, each under a key of its own; what each of them adds to the count stands beside it."""
    buffer = io.BytesIO()
    kind = draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:

        def put(name: str, data: bytes = b"", type_: bytes = tarfile.REGTYPE, target: str = "") -> None:
            member = tarfile.TarInfo(draw.choice(["", "./"]) + name)
            member.type, member.linkname, member.size = type_, target, len(data)
            tar.addfile(member, io.BytesIO(data))

        put("d/anchor.png", PNG)
        count.good += 1
        for number in range(draw.randrange(12)):
            write_sample(f"{draw.choice(['', 'd/', 'e.f/'])}s{number}", put, draw, count)
    path.write_bytes(buffer.getvalue())


def write_sample(key: str, put, draw: random.Random, count: Count) -> None:  # type: ignore[no-untyped-def]
    folder = key.rpartition("/")[0]
    usual, other = draw.choice(USUAL_IMAGES), draw.choice(OTHER_IMAGES)
    match draw.randrange(13):
        case 0:
            put(f"{key}{usual.upper()}", PNG)
            put(f"{key}.json", b"{}")
            count.good += 1
        case 1:  # beside the image, in any order
            members = [(f"{key}.png", PNG), (f"{key}.seg.png", b"-"), (f"{key}.left.jpg", b"-"), (f"{key}.txt", b"-")]
            for name, data in draw.sample(members, 4):
                put(name, data)
            count.good += 1
            count.passed.update([".seg.png", ".left.jpg"])
        case 2:
            for ending in ("1.2m.png", "1.5m.png", "last.JPG")[: draw.randrange(1, 4)]:
                put(f"{key}.{ending}", PNG)
                count.good += 1
        case 3:
            put(f"{key}.{draw.choice(['json', 'txt', 'mp4', 'cls'])}", b"{}")
            count.bad += 1
        case 4:
            put(f"{key}.jpg", b"no image")
            count.bad += 1
        case 5:
            put(f"{folder}/.{key.rpartition('/')[2]}{usual}".lstrip("/"), PNG)
            count.passed[f"hidden {usual}"] += 1
        case 6:
            put(f"{key}{usual}", type_=tarfile.LNKTYPE, target="d/anchor.png")
            count.good += 1
        case 7:
            target = os.path.relpath("/d/anchor.png", f"/{folder}")
            put(f"{key}{usual}", type_=tarfile.SYMTYPE, target=target)
            count.good += 1
        case 8:
            put(
                f"{key}{usual}",
                type_=draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
                target=draw.choice(["/x.png", "../../y", ""]),
            )
            count.bad += 1
        case 9:
            put(f"{key}{other}", PNG)
            count.good += 1
        case 10:  # twice under one name
            put(f"{key}.png", PNG)
            put(f"{key}.png", PNG)
            count.good, count.bad = count.good + 1, count.bad + 1
        case 11:
            put(f"{key}.png", type_=tarfile.FIFOTYPE)
            count.bad += 1
        case _:  # neither is a sample
            put(f"{key}.png", type_=tarfile.DIRTYPE)
            put(f"{key}x", type_=tarfile.SYMTYPE, target="d")


def write_loose(folder: Path, draw: random.Random, count: Count) -> None:
    path = folder / draw.choice(["", "a", "a/b.c"]) / f"f{draw.randrange(10**9)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = draw.choice(IMAGES)
    image = path.with_name(path.name + draw.choice([ending, ending.upper(), f".x{ending}"]))
    match draw.randrange(7):
        case 0 | 1:
            image.write_bytes(PNG)
            count.good += 1
        case 2:
            image.symlink_to(draw.choice(["/nowhere", path.name + ".gone", image.name]))
            count.bad += 1
        case 3:
            hidden = draw.choice(["_", "."])
            image.with_name(hidden + image.name).write_bytes(PNG)
            count.passed[f"hidden {ending}"] += 1
        case 4:
            path.with_name(path.name + ".TXT").write_bytes(b"-")
            count.passed[".txt"] += 1
        case 5:
            path.write_bytes(PNG)  # a name without an ending
            count.passed["none"] += 1
        case _:
            (folder / "real.png").write_bytes(PNG)
            image.symlink_to(folder / "real.png")
            count.good += 1


@pytest.mark.parametrize("tenth", range(10))
def test_every_sample_of_a_crooked_input_is_a_row_a_reject_or_passed_over(tmp_path: Path, tenth: int) -> None:
    for seed in range(20 * tenth, 20 * tenth + 20):
        draw, count, folder = random.Random(seed), Count(), tmp_path / str(seed)
        folder.mkdir()
        (folder / "anchor.tar").write_bytes(tar_of([("anchor.png", PNG)]))
        count.good += 1
        for number in range(draw.randrange(4)):
            write_tar(folder / f"t{number}.tar", draw, count)
        for _ in range(draw.randrange(15)):
            write_loose(folder, draw, count)
        count.good += (folder / "real.png").exists()

        listed = list_input((str(folder),), {})
        passed, good, bad = Counter(listed.passed_over), 0, 0
        for shard in listed.shards:
            for chunk in decode_shard(WorkItem(shard=shard), layout(chunk_size=5), PREPROCESSING, {}):
                good, bad = good + chunk.head.good, bad + chunk.samples.num_rows - chunk.head.good
                passed.update(chunk.head.passed)
        assert (seed, good, bad, sum(passed.values())) == (seed, count.good, count.bad, count.passed.total())
        if "others" not in passed:
            assert passed == count.passed
