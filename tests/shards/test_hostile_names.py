"""Names from archives are keys and nothing else: never paths, never markup, never a terminal's commands."""

import io
import tarfile
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jobs import job_of, read_rejects, read_rows, run_here, snapshot, tiny_recipe, write_tars
from lora_embed.cli.main import run_command
from lora_embed.errors import ShardError
from lora_embed.run.job import run_job
from samples import png, samples_of, shard_at, tar_of

NAMES = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "\x1b[2J\x1b]0;alert(1)\x07", "'><svg onload=alert(1)>",
    "\u202egnpexe", "</title></style><script>1</script>", "javascript:alert(1)", "../../../../outside", "/absolute",
    "a/../../up", "./../dots", "~root/home", "C:\\windows\\x", "//host/share", "$HOME/`id`", "line\nbreak", "tab\there",
    "-rf", "--help", "%s%n{0}", "s3://bucket/key", "con", "nul\x7f", "x" * 3000, "\u0430\u0301\u0302", " ", "*?[a]",
]  # fmt: skip
ESCAPES = NAMES[2]
ATTACHED = {
    tarfile.SYMTYPE: "/etc/passwd",
    tarfile.LNKTYPE: "../../etc/passwd",
    tarfile.CHRTYPE: "",
    tarfile.FIFOTYPE: "",
    tarfile.DIRTYPE: "",
}


def archive(kind: int = tarfile.PAX_FORMAT) -> bytes:
    """An image and a damaged one of each name, and links, devices and folders that look like images."""
    members = [(f"{name}.png", png(number)) for number, name in enumerate(NAMES)]
    members += [(f"bad{name}.png", b"no image") for name in NAMES]
    buffer = io.BytesIO(tar_of(members, kind=kind))
    with tarfile.open(fileobj=buffer, mode="a", format=kind) as tar:
        for type_, target in ATTACHED.items():
            member = tarfile.TarInfo("../../../../etc/link.png")
            member.type, member.linkname, member.mode = type_, target, 0o4777
            tar.addfile(member)
    return buffer.getvalue()


class Tags(HTMLParser):
    """What a browser would make of a page: tags, attributes that run something, and places that are asked for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.live: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in ("src", "href") and not (value or "").startswith(("#", "data:image/jpeg;"))):
                self.live.append(f"{tag} {name}={value}")


def assert_harmless(page: Path) -> None:
    text = page.read_text()
    found = Tags(text)
    assert not found.live
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert "alert(1)" in text  # the name is there
    assert not any(control in text for control in ("\x1b", "\x07", "\u202e"))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_run_over_hostile_names_writes_nothing_but_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: int
) -> None:
    run_here(monkeypatch)
    recipe, source = tiny_recipe(tmp_path), write_tars(tmp_path / "shards", shards=1, images=1)
    (source / "<b>0001.tar").write_bytes(archive(kind))
    job = job_of(tmp_path, recipe, source, max_rejects=1.0)
    before = snapshot(tmp_path)
    assert run_job(job).published
    new = set(snapshot(tmp_path)) - set(before)
    table = Path(job.table)
    assert new
    assert all(name.startswith("table/") for name in new)
    assert not any(part in name for part in ("outside", "absolute", "script", "etc") for name in new)
    ids = {f"<b>0001.tar/{name.removeprefix('./')}" for name in NAMES}
    assert ids < set(read_rows(table)["id"].to_pylist())
    rejects = read_rejects(table)
    assert rejects.pop("<b>0001.tar/../../../../etc/link") == "no_image"  # its links lead to nothing in the archive
    assert len(rejects) == len(NAMES)
    assert set(rejects.values()) == {"not_an_image"}

    (report,) = (table / "runs").glob("*/report.html")
    assert_harmless(report)
    page, query = tmp_path / "found.html", tmp_path / "query.png"
    query.write_bytes(png(8))
    assert run_command(["search", str(table), str(query), "-k", "60", "--page", str(page), "--input", str(source)]) == 0
    assert_harmless(page)
    assert run_command(["explain", str(table), f"<b>0001.tar/{ESCAPES}"]) == 0
    assert run_command(["explain", str(table), f"nowhere/{ESCAPES}"]) == 2
    said = capfd.readouterr()
    assert "alert(1)" in said.out
    assert "alert(1)" in said.err
    assert not any(control in said.out + said.err for control in ("\x1b", "\x07"))


def pax(size: int, data: bytes = b"", kind: bytes = b"x", name: str = "h") -> bytes:
    """A header that says something of the next one, of that size."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def record(key: str, value: str) -> bytes:
    """A line of a pax header, with its own length before it."""
    text = f" {key}={value}\n".encode()
    length = len(text)
    while len(str(length)) + len(text) != length:
        length = len(str(length)) + len(text)
    return str(length).encode() + text


IMAGE = tar_of([("a.png", png())])
BACK = record("size", "-1024")
HOSTILE: dict[str, bytes] = {
    "names within names": pax(0) * 5000 + IMAGE,
    "long names within long names": pax(1, b"n", b"L") * 5000 + IMAGE,
    "a name of 8 GB": pax(8**11 - 1, bytes(2048), b"L") + IMAGE,
    "a header of 1 PB": pax(10**15, bytes(2048)) + IMAGE,
    "a header for all of 64 MB": pax(2**26, bytes(2**26), b"g") + IMAGE,
    "a member of less than nothing": pax(-1024, kind=b"0", name="b.txt") + IMAGE,
    "a header that makes it less than nothing": pax(len(BACK), BACK) + pax(0, kind=b"0", name="b.txt") + IMAGE,
    "a folder of less than nothing": pax(-512, kind=b"9", name="b.png") + IMAGE,
    "a sparse map without end": pax(len(one := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")), one)
    + pax(512, b"99999999999\n" + bytes(500), b"0", "b.png")
    + IMAGE,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_an_error_of_its_own(tmp_path: Path, what: str) -> None:
    """Soon, and in no more memory than it is worth; other shards go on."""
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=r"a\.tar: incomplete"):
            samples_of(shard_at(tmp_path / "a.tar", HOSTILE[what]))
    finally:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - started < 5
    assert taken < 8 * 2**20
