"""Which members of a tar are samples: links, names with dots, several images of one key, hidden ones; none is lost."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_embed.schema import Layout, Sample, Shard, Span
from lora_embed.shards.read import read_samples
from samples import layout, png, samples_of, shard_at, tar_of, tar_shard

SYMBOLIC, HARD, PIPE, FOLDER = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE


def tar_with_links(members: list[tuple[str, bytes | tuple[bytes, str]]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files, given by their bytes, and of links and the like, given by their type and target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                tar.addfile(member)
    return buffer.getvalue()


def seen(samples: list[Sample]) -> list[tuple[str, bytes | None, str]]:
    return [(sample.key, sample.data, sample.missing) for sample in samples]


def nowhere(target: str) -> str:
    return f"a link to {target}, which is not in the archive"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (("l.jpg", (HARD, "d/a.jpg")), (b"1", "")),
        (("l.jpg", (HARD, "./d/a.jpg")), (b"1", "")),
        (("d/l.jpg", (SYMBOLIC, "a.jpg")), (b"1", "")),
        (("e/l.jpg", (SYMBOLIC, "../d/a.jpg")), (b"1", "")),
        (("l.jpg", (SYMBOLIC, "z.jpg")), (b"9", "")),  # the target stands behind the link
        (("l.jpg", (SYMBOLIC, "chain.jpg")), (b"1", "")),  # through another link
        (("l.jpg", (SYMBOLIC, "twice.jpg")), (b"7", "")),  # the nearest before the link
        (("l.jpg", (SYMBOLIC, "/etc/passwd")), (None, nowhere("/etc/passwd"))),
        (("l.jpg", (SYMBOLIC, "../../etc/passwd")), (None, nowhere("../../etc/passwd"))),
        (("l.jpg", (HARD, "gone.jpg")), (None, nowhere("gone.jpg"))),
        (("l.jpg", (SYMBOLIC, "l.jpg")), (None, nowhere("l.jpg"))),
        (("l.jpg", (SYMBOLIC, "circle.jpg")), (None, "a link to circle.jpg, which leads in a circle")),
        (("l.jpg", (SYMBOLIC, "pipe.jpg")), (None, "a link to pipe.jpg, which is a folder, pipe or device")),
        (("l.jpg", (PIPE, "")), (None, "a pipe or device")),
    ],
)
def test_a_link_in_a_tar_is_the_member_that_it_leads_to_or_says_why_not(
    tmp_path: Path, link: tuple[str, Any], expected: tuple[bytes | None, str]
) -> None:
    before: list[tuple[str, Any]] = [
        ("d/a.jpg", b"1"), ("chain.jpg", (SYMBOLIC, "./d/a.jpg")), ("twice.jpg", b"6"), ("twice.jpg", b"7"),
        ("circle.jpg", (SYMBOLIC, "circle2.jpg")), ("circle2.jpg", (SYMBOLIC, "circle.jpg")), ("pipe.jpg", (PIPE, "")),
    ]  # fmt: skip
    after: list[tuple[str, Any]] = [("z.jpg", b"9"), ("twice.jpg", b"8"), ("last.jpg", b"end")]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        shard = shard_at(tmp_path / "a.tar", tar_with_links([*before, link, *after], kind))
        samples = samples_of(shard)
        assert len(samples) == len(before) + 1 + len(after)
        assert seen(samples)[len(before)] == (link[0].removesuffix(".jpg"), *expected)
        assert seen(samples)[-3:] == [("z", b"9", ""), ("twice", b"8", ""), ("last", b"end", "")]


def test_links_that_look_like_no_image_are_fields_of_a_sample_or_nothing(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = [
        ("shared.json", b'{"label": 5}'), ("latest", (SYMBOLIC, "d")), ("notes.txt", (SYMBOLIC, "other.txt")),
        ("a.jpg", b"1"), ("a.json", (HARD, "shared.json")), ("b.jpg", b"2"), ("b.json", (SYMBOLIC, "gone.json")),
        ("d", (FOLDER, "")),
    ]  # fmt: skip
    samples = samples_of(shard_at(tmp_path / "a.tar", tar_with_links(members)), carry=(("label", "int64"),))
    assert [(sample.key, sample.data, sample.fields) for sample in samples] == [
        ("shared", None, {"label": 5}), ("a", b"1", {"label": 5}), ("b", b"2", {}),
    ]  # fmt: skip


def test_many_links_to_one_image_cannot_unpack_without_end(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = [("big.jpg", bytes(2**20))] + [(f"{n}.jpg", (HARD, "big.jpg")) for n in range(600)]
    with pytest.raises(Exception, match="unpack to more than 100 times as many bytes"):
        samples_of(shard_at(tmp_path / "a.tar", tar_with_links(members)))


ORDINARY = [
    ("0001.jpg", b"1"), ("0001.json", b"{}"), ("0001.left.png", b"-"), ("0002.depth.png", b"-"), ("0002.png", b"2"),
    ("0002.seg.png", b"-"), ("0003.jpg", b"3"), ("0003.png", b"-"), ("0004.heic", b"-"), ("0004.jpg", b"4"), ("0005.cls", b"5"),
]  # fmt: skip


def test_ordinary_tars_keep_their_keys_and_images(tmp_path: Path) -> None:
    samples = samples_of(tar_shard(tmp_path, ORDINARY))
    assert [(sample.key, sample.data) for sample in samples] == [
        ("0001", b"1"), ("0002", b"2"), ("0003", b"3"), ("0004", b"4"), ("0005", None),
    ]  # fmt: skip
    assert [sample.passed for sample in samples] == [
        {".left.png": 1}, {".depth.png": 1, ".seg.png": 1}, {".png": 1}, {".heic": 1}, {},
    ]  # fmt: skip
    unread = list(read_samples(tar_shard(tmp_path, ORDINARY), layout(), {}, lambda number: False))
    assert [(sample.key, sample.begin, sample.end, sample.passed) for sample in unread] == [
        (sample.key, sample.begin, sample.end, sample.passed) for sample in samples
    ]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"lamp_1.2m.png": b"1", "lamp_1.5m.png": b"2"}, {"lamp_1.2m": b"1", "lamp_1.5m": b"2"}),
        ({"Shot 10.11.12.PNG": b"1", "Shot 10.11.40.PNG": b"2"}, {"Shot 10.11.12": b"1", "Shot 10.11.40": b"2"}),
        ({"x.left.png": b"1", "x.right.png": b"2", "y.left.png": b"3"}, {"x.left": b"1", "x.right": b"2", "y.left": b"3"}),
        ({"d.e/v1.0_cat.jpg": b"1"}, {"d.e/v1.0_cat": b"1"}),
        ({"a.b.png": b"1", "a.b.jpg": b"-", "a.c.jpg": b"2"}, {"a.b": b"1", "a.c": b"2"}),  # one of them is passed over
        ({"a.heic": b"1", "b.avif": b"2", "c.b.jfif": b"3"}, {"a": b"1", "b": b"2", "c.b": b"3"}),
        ({f"f.{n:04}.jpg": b"%d" % n for n in range(200)}, {f"f.{n:04}": b"%d" % n for n in range(200)}),
    ],
)
def test_names_with_dots_are_samples_of_their_own(
    tmp_path: Path, members: dict[str, bytes], expected: dict[str, bytes]
) -> None:
    samples = samples_of(tar_shard(tmp_path, list(members.items())))
    assert {sample.key: sample.data for sample in samples} == expected
    assert len(samples) + sum(sum(sample.passed.values()) for sample in samples) == len(members)


def test_fields_of_names_with_dots(tmp_path: Path) -> None:
    members = [
        ("lamp_1.2m.json", b'{"label": 2}'), ("lamp_1.2m.png", b"1"), ("lamp_1.5m.cls", b"9"), ("lamp_1.5m.png", b"2"),
        ("lamp_1.txt", b"both"),
    ]  # fmt: skip
    carry = (("label", "int64"), ("cls", "int64"), ("txt", "string"))
    samples = samples_of(tar_shard(tmp_path, members), carry=carry)
    assert {sample.key: sample.fields for sample in samples} == {
        "lamp_1.2m": {"label": 2, "txt": "both"}, "lamp_1.5m": {"cls": "9", "txt": "both"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("image_member", "expected"),
    [
        (("jpg",), [("a", b"1"), ("b", None), ("c", b"5")]),
        (("left.png",), [("a", b"2"), ("b", b"3"), ("c", None)]),
        (("jpg;left.png",), [("a", b"1"), ("b", b"3"), ("c", b"5")]),
        (
            ("left.png", "right.png"),
            [("a#left", b"2"), ("a#right", None), ("b#left", b"3"), ("b#right", b"4"), ("c#left", None), ("c#right", None)],
        ),
        (("img",), [("a", None), ("b", None), ("c", b"6")]),  # whatever the ending
    ],
)
def test_a_setting_names_the_images_of_a_sample(
    tmp_path: Path, image_member: tuple[str, ...], expected: list[tuple[str, bytes | None]]
) -> None:
    members = [
        ("a.jpg", b"1"), ("a.left.png", b"2"), ("b.left.png", b"3"), ("b.right.png", b"4"), ("c.jpg", b"5"), ("c.img", b"6"),
        ("c.json", b'{"label": 1}'),
    ]  # fmt: skip
    samples = samples_of(tar_shard(tmp_path, members), image_member=image_member, carry=(("label", "int64"),))
    assert [(sample.key, sample.data) for sample in samples] == expected
    assert all(sample.fields == {"label": 1} for sample in samples if sample.key[0] == "c")
    if image_member == ("img",):
        assert samples[0].missing == "the sample has no member img, but jpg, left.png"


def test_the_setting_shapes_parts_only_where_it_is_given() -> None:
    known = Layout(precision="float32", batch_size=16)
    assert known.layout_id == Layout(precision="float32", batch_size=16, image_member=()).layout_id == "d60765309952"
    assert Layout(precision="float32", batch_size=16, image_member=("jpg",)).layout_id != known.layout_id


def test_hidden_images_in_a_tar_are_counted(tmp_path: Path) -> None:
    members = [("._a.jpg", b"x"), ("a.jpg", b"1"), (".b.jpg", b"x"), (".c.txt", b"x"), ("d.jpg", b"2"), ("._d.jpg", b"x")]
    samples = samples_of(tar_shard(tmp_path, members))
    assert [sample.key for sample in samples] == ["a", "d"]
    assert sum((Counter(sample.passed) for sample in samples), Counter()) == {"macOS ._": 2, "hidden .jpg": 1}
    (sample,) = samples_of(tar_shard(tmp_path, [(".a.jpg", b"x"), (".b.jpg", b"x"), (".c.txt", b"x")]))
    assert (sample.key, sample.data, sample.passed) == (".a.jpg", None, {"hidden .jpg": 1})
    assert "begin with a dot" in sample.missing


def crooked_tar() -> bytes:
    members: list[tuple[str, Any]] = []
    for number in range(12):
        members += [(f"{number:02}.depth.png", b"-"), (f"{number:02}.jpg", png(number)), (f"{number:02}.json", b'{"label": 1}')]
        members += [(f"l{number}.jpg", (HARD, "00.jpg")), (f"s{number}.jpg", (SYMBOLIC, "11.jpg"))]
        members += [(f"v{number}.1.png", b"%d" % number), (f"v{number}.2.png", b"%d+" % number)]
    return tar_with_links(members)


def test_reading_may_begin_and_end_at_any_sample_that_says_so(tmp_path: Path) -> None:
    """As a resumed run does: a link may lead to a member outside of the bytes that are read."""
    shard = shard_at(tmp_path / "a.tar", crooked_tar())
    carry = (("label", "int64"),)
    whole = samples_of(shard, carry=carry)
    assert len(whole) == 12 * 5
    begins = [(number, sample.begin) for number, sample in enumerate(whole) if sample.begin is not None]
    assert len(begins) == 12 * 4  # not the second of two images of one key
    for first, begin in begins:
        for last, end in [*[(number, at) for number, at in begins if number > first], (len(whole), None)]:
            assert begin is not None
            part = part_of(shard, Span(first=first, begin=begin, end=end), carry)
            assert part == whole[first:last]


def part_of(shard: Shard, span: Span, carry: tuple[tuple[str, str], ...]) -> list[Sample]:
    return list(read_samples(shard, layout(carry=carry), {}, lambda number: number >= span.first, span))


def test_what_is_not_wanted_changes_no_other_sample(tmp_path: Path) -> None:
    shard = shard_at(tmp_path / "a.tar", crooked_tar())
    whole = samples_of(shard)
    for chosen in range(0, len(whole), 7):
        samples = list(read_samples(shard, layout(), {}, lambda number, chosen=chosen: number == chosen))
        assert samples[chosen] == whole[chosen]
        assert [sample.key for sample in samples] == [sample.key for sample in whole]
        assert [number for number, sample in enumerate(samples) if sample.data is not None] == [chosen]


def test_a_tar_of_plain_members_is_read_forwards(tmp_path: Path) -> None:
    """Links and dotted names need seeks; an ordinary tar must not pay for them."""

    class Forwards(io.BytesIO):
        back = 0

        def seek(self, offset: int, whence: int = 0) -> int:
            type(self).back += whence == 0 and offset < self.tell() - 1
            return super().seek(offset, whence)

    from lora_embed.shards.tar import read_tar

    data = tar_of([(f"{n:03}.{ending}", b"1" * 700) for n in range(50) for ending in ("jpg", "json", "seg.png")])
    shard = shard_at(tmp_path / "a.tar", data)
    assert len(list(read_tar(Forwards(data), shard, layout(), lambda number: True))) == 50
    assert Forwards.back <= 1
