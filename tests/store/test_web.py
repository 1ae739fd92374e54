"""Objects on the web that a stranger's list names: what is fetched, a reject, tried again, or not asked for."""

import gc
import gzip
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from listener import listening
from lists import write_list
from lora_embed.errors import ConfigError, StoreUnavailable
from lora_embed.schema import Sample
from lora_embed.shards.isolated import read_isolated
from lora_embed.shards.list_rows import References
from lora_embed.shards.listing import list_shards
from lora_embed.shards.read import read_samples
from lora_embed.shards.references import AT_ONCE
from lora_embed.store import web
from samples import all_of_them, layout, png
from web_server import Answer, Answers, WebServer, web_server

IMAGE = png(1)


def asked(
    folder: Path, urls: list[str], *roots: str, retry_s: float = 5.0, rejects_unreachable: bool = False, **changes: int
) -> list[Sample]:
    """The samples of a list of URLs."""
    path = write_list(folder / "a.csv", {"url": urls})
    options = {"retry_s": retry_s}
    references = References(column="url", roots=roots, rejects_unreachable=rejects_unreachable)
    shards = list_shards((str(path),), options, references=references)
    return [s for shard in shards for s in read_samples(shard, layout(**changes), options, lambda number: True)]


def to(place: str, status: int = 302) -> Answer:
    return status, {"Location": place}, b""


ANSWERS: Answers = {
    "/a.png": IMAGE,
    "/a%20b.png": IMAGE,
    "/a.png?size=1&x=%2F": IMAGE,
    "/moved": to("/a.png"),
    "/moved/twice": to("../moved", 308),
    "/unsure": (200, {"Content-Length": ""}, IMAGE),
    "/forbidden": (403, {}, b""),
    "/gone": (410, {}, b""),
    "/part": (206, {}, IMAGE[:10]),
    "/loop": to("/loop"),
    "/file": to("file:///etc/hostname"),
    "/packed": (200, {"Content-Encoding": "gzip"}, gzip.compress(IMAGE)),
    "/never": (501, {}, b""),
    "/busy": lambda times: (503, {}, b"") if times < 3 else IMAGE,
    "/slow": lambda times: (429, {}, b"") if times < 3 else IMAGE,
    "/cut": lambda times: (200, {"Content-Length": str(len(IMAGE)), "Connection": "close"}, IMAGE[:9] if times < 3 else IMAGE),
}


@pytest.fixture(scope="module")
def pages() -> Iterator[WebServer]:
    with web_server(ANSWERS) as server:
        yield server


def test_what_a_server_has_is_an_image(tmp_path: Path, pages: WebServer) -> None:
    good = ["/a.png", "/a%20b.png", "/a.png?size=1&x=%2F", "/moved", "/moved/twice", "/unsure", "/busy", "/slow", "/cut"]
    samples = asked(tmp_path, [f"{pages.url}{path}" for path in good], pages.url)
    assert [(sample.problem, sample.data) for sample in samples] == [(None, IMAGE)] * len(good)
    assert [len(pages.requests[path]) for path in ("/busy", "/slow", "/cut")] == [3, 3, 3]


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/none", "is not there: HTTP 404 Not Found"),
        ("/forbidden", "may not be read: HTTP 403 Forbidden"),
        ("/gone", "is not there: HTTP 410 Gone"),
        ("/part", "is not sent: HTTP 206 Partial Content"),
        ("/never", "is not sent: HTTP 501 Not Implemented"),
        ("/loop", "redirects more than 5 times"),
        ("/file", "redirects to another host"),
        ("/packed", "is sent compressed, as 'gzip', which is not unpacked"),
    ],
)
def test_what_a_server_does_not_have_is_a_reject(tmp_path: Path, pages: WebServer, path: str, detail: str) -> None:
    (sample,) = asked(tmp_path, [f"{pages.url}{path}"], pages.url)
    assert sample.data is None
    assert sample.problem is not None
    assert sample.problem[0] == "no_image"
    assert sample.problem[1].startswith(f"{pages.url}{path} {detail}")
    assert len(pages.requests[path]) == (5 if path == "/loop" else 1)


def test_an_object_is_read_up_to_its_limit(tmp_path: Path) -> None:
    """Whether or not the server says how large it is; and one that waits for room is read in its turn."""
    large = bytes(web.UNASKED + 1)
    answers: Answers = {"/said": large, "/unsaid": (200, {"Content-Length": ""}, large)}
    with web_server(answers) as server:
        urls = [f"{server.url}{path}" for path in answers]
        samples = asked(tmp_path, urls, server.url, max_bytes=web.UNASKED)
        assert [(sample.data, sample.excess > web.UNASKED) for sample in samples] == [(None, True)] * 2
        samples = asked(tmp_path, urls, server.url, max_bytes=2**30)  # more than all objects together may hold
        assert [sample.data == large for sample in samples] == [True, True]


def test_a_server_that_fails_for_a_while_is_no_reject(tmp_path: Path) -> None:
    with web_server({"/busy": (503, {}, b"")}) as server:
        with pytest.raises(StoreUnavailable, match=r"/busy: no usable answer in .* tries; last error: HTTP 503"):
            asked(tmp_path, [f"{server.url}/busy"], server.url, retry_s=0.5)
        assert len(server.requests["/busy"]) > 1
    with pytest.raises(StoreUnavailable, match="no usable answer"):  # nobody listens there any more
        asked(tmp_path, [f"{server.url}/busy"], server.url, retry_s=0.5)


def test_servers_that_are_gone_are_rejects_where_the_job_says_so(tmp_path: Path) -> None:
    """A host that gives no connection is tried for `retry_s` once, and not again for each of its images."""
    with web_server({"/busy": (503, {}, b""), "/a.png": IMAGE}) as server, web_server({}) as other:
        dead = other.url
        urls = [f"{server.url}/busy", f"{server.url}/a.png"]
        found = asked(tmp_path, urls, server.url, retry_s=0.5, rejects_unreachable=True)
    assert [sample.data for sample in found] == [None, IMAGE]
    assert found[0].problem == ("no_image", f"{server.url}/busy cannot be reached: HTTP 503 Service Unavailable")
    started = time.monotonic()
    found = asked(tmp_path, [f"{dead}/{number}" for number in range(200)], dead, retry_s=1, rejects_unreachable=True)
    assert all(sample.problem and "cannot be reached: Cannot connect" in sample.problem[1] for sample in found)
    assert time.monotonic() - started < 6  # of 7 s for each 32 of them


def test_a_name_that_no_host_has_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not while names cannot be looked up."""

    def nobody(code: int, text: str) -> None:
        def look_up(*_: object, **__: object) -> None:
            raise socket.gaierror(code, text)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    nobody(socket.EAI_NONAME, "Name or service not known")
    (sample,) = asked(tmp_path, ["http://nobody.example/a.png"])
    assert sample.problem == ("no_image", "http://nobody.example/a.png is not there: no host has the name nobody.example")
    nobody(socket.EAI_AGAIN, "Temporary failure in name resolution")
    with pytest.raises(StoreUnavailable, match="no usable answer"):
        asked(tmp_path, ["http://somebody.example/a.png"], retry_s=0.3)


PRIVATE = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0", "[::1]", "[::ffff:127.0.0.1]", "LOCALHOST"]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_not_asked(tmp_path: Path, host: str) -> None:
    """However they are written: services that give away a machine's keys have such addresses."""
    with listening() as listener:
        (sample,) = asked(tmp_path, [f"http://{host}:{listener.port}/a.png"], retry_s=0.3)
    assert sample.problem is not None
    assert "which is not public" in sample.problem[1] or "is no URL" in sample.problem[1]
    assert listener.requests == []


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "10.0.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "[fe80::1]",
        "[fd00::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_other_addresses_that_are_not_public(tmp_path: Path, address: str) -> None:
    (sample,) = asked(tmp_path, [f"http://{address}/latest/meta-data"], retry_s=0.3)
    assert sample.problem is not None
    assert "which is not public. To allow that, add to reference_roots in the job: [http://" in sample.problem[1]


def test_a_name_of_a_private_address_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger may give a name of their own any address."""
    with listening() as listener:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", listener.port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        (sample,) = asked(tmp_path, [f"http://pictures.example:{listener.port}/a.png"], retry_s=0.3)
        assert sample.problem is not None
        assert "pictures.example has the address 127.0.0.1, which is not public" in sample.problem[1]
        assert listener.requests == []
        (sample,) = asked(
            tmp_path, [f"http://pictures.example:{listener.port}/a.png"], f"http://pictures.example:{listener.port}"
        )
        assert len(listener.requests) == 1


def test_a_redirect_to_another_host_is_not_followed(tmp_path: Path) -> None:
    with listening() as other, web_server({}) as server:
        answers: Answers = {"/a": to(f"http://127.0.0.1:{other.port}/a"), "/b": to(f"//localhost:{server.port}/b")}
        with web_server(answers) as leading:
            samples = asked(tmp_path, [f"{leading.url}{path}" for path in answers], leading.url, server.url)
    details = [sample.problem[1] for sample in samples if sample.problem]
    refused = "which is not followed. List that address"
    assert [detail.split(" redirects to another host, ")[1] for detail in details] == [
        f"127.0.0.1:{other.port}, {refused}", f"localhost:{server.port}, {refused}",
    ]  # fmt: skip
    assert (other.requests, server.count) == ([], 0)


def test_credentials_stay_with_their_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the input's storage options, no cookie and no password of this machine reaches a server that a list names."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    answers: Answers = {"/a.png": (200, {"Set-Cookie": "id=hidden", "Content-Length": str(len(IMAGE))}, IMAGE), "/b.png": IMAGE}
    with web_server(answers) as server:
        path = write_list(tmp_path / "a.csv", {"url": [f"{server.url}/a.png", f"{server.url}/b.png"]})
        options = {"key": "hidden", "secret": "hidden", "headers": {"Authorization": "hidden"}, "retry_s": 1}
        (shard,) = list_shards((str(path),), options, references=References(column="url", roots=(server.url,)))
        samples = list(read_samples(shard, layout(), options, lambda number: True))
    assert [sample.data for sample in samples] == [IMAGE, IMAGE]
    headers = [name.lower() for asked in server.requests.values() for request in asked for name in request]
    assert set(headers) == {"host", "accept", "accept-encoding", "user-agent"}


LEADING_OUT = [
    "/etc/hostname",
    "file:///etc/hostname",
    "local:///etc/hostname",
    "s3://bucket/a.png",
    "http+unix://a/b",
    "ftp://127.0.0.1/a",
]


@pytest.mark.parametrize("reference", LEADING_OUT)
def test_a_list_on_the_web_names_nothing_on_this_machine(tmp_path: Path, reference: str) -> None:
    """Its relative paths lead to its own server, which the user named."""
    answers: Answers = {
        "/in/a.csv": f"url\nb.png\n{reference}\n".encode(),
        "/in/b.png": IMAGE,
        "/in/c.csv": b"url\nb.png\n../d.png\n",
    }
    answers["/d.png"] = IMAGE
    with web_server(answers) as server:
        with pytest.raises(ConfigError, match=r"row 2 names .*, but a list may name only files of its own store"):
            list_shards((f"{server.url}/in/a.csv",), {}, references=References(column="url"))
        (shard,) = list_shards((f"{server.url}/in/c.csv",), {}, references=References(column="url"))
        assert [s.data for s in read_samples(shard, layout(), {}, lambda number: True)] == [IMAGE, IMAGE]


def test_etags_of_the_web_are_checked(tmp_path: Path) -> None:
    answers: Answers = {"/a.png": (200, {"ETag": '"1"', "Content-Length": str(len(IMAGE))}, IMAGE)}
    with web_server(answers) as server:
        path = write_list(tmp_path / "a.csv", {"url": [f"{server.url}/a.png", f"{server.url}/none"]})
        checking = References(column="url", roots=(server.url,), checks=True)

        def state() -> str:
            (shard,) = list_shards((str(path),), {}, references=checking)
            return shard.id

        before = state()
        assert state() == before
        answers["/a.png"] = (200, {"ETag": '"2"', "Content-Length": str(len(IMAGE))}, IMAGE)
        assert state() != before


def test_a_list_is_read_in_a_child_too(tmp_path: Path) -> None:
    """As after a crash: with a limit for memory, in which all threads must find room."""
    answers: Answers = {f"/{number}.png": png(number) for number in range(100)}
    with web_server(answers) as server:
        path = write_list(tmp_path / "a.csv", {"url": [f"{server.url}{name}" for name in answers]})
        (shard,) = list_shards((str(path),), {}, references=References(column="url", roots=(server.url,)))
        assert [sample.data for sample in read_isolated(shard, layout(), {}, all_of_them)] == list(answers.values())


def test_a_reader_that_stops_leaves_no_request_behind(tmp_path: Path) -> None:
    """It asked for a few objects ahead of their turn, and waits for no others."""
    answers: Answers = {f"/{number}.png": png(number) for number in range(200)}
    with web_server(answers) as server:
        path = write_list(tmp_path / "a.csv", {"url": [f"{server.url}{name}" for name in answers]})
        (shard,) = list_shards((str(path),), {}, references=References(column="url", roots=(server.url,)))
        for _, sample in zip(range(5), read_samples(shard, layout(), {}, lambda number: True), strict=False):
            assert sample.data
        gc.collect()
        asked = server.count
        assert asked < 5 + 2 * AT_ONCE
        time.sleep(0.2)
        assert server.count == asked
