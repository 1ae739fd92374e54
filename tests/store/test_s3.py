"""The S3 server and the proxy that other tests rely on: they do what those tests assume, to the byte."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path

import psutil
import pytest
import s3fs

from s3 import Faults, Proxy, Request, S3Server, s3_server

BODY = bytes(range(256)) * 40
HOLDER = """
import sys, time
from pathlib import Path
import s3fs
from s3 import s3_server
with s3_server(Path(sys.argv[1])) as server:
    server.make_bucket("bucket")
    s3fs.S3FileSystem(**server.options()).pipe_file("bucket/mine", b"holder")
    print(server.pid, flush=True)
    time.sleep(60)
"""
HALF = """
import socket, sys, time
server = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
server.sendall(b"PUT /bucket/half HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 2000000\\r\\n\\r\\n" + b"x" * 1000000)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Anonymous, so that a plain client needs no signatures."""
    with s3_server(tmp_path_factory.mktemp("open"), anonymous=True) as server:
        server.make_bucket("bucket")
        yield server


def connect(server: S3Server, proxy: Proxy | None = None) -> s3fs.S3FileSystem:
    options = server.options(proxy.endpoint if proxy else None)
    return s3fs.S3FileSystem(**options, skip_instance_cache=True, use_listings_cache=False)


def address(proxy: Proxy | S3Server) -> tuple[str, int]:
    return "127.0.0.1", int(proxy.endpoint.rpartition(":")[2])


def plain(proxy: Proxy | S3Server, timeout: float = 10) -> HTTPConnection:
    return HTTPConnection(*address(proxy), timeout=timeout)


def ask(connection: HTTPConnection, method: str, path: str, **how: object) -> HTTPResponse:
    connection.request(method, path, **how)  # type: ignore[arg-type]
    return connection.getresponse()


def stored(server: S3Server, path: str) -> bytes | None:
    answer = ask(plain(server), "GET", path)
    return answer.read() if answer.status == 200 else None


def test_environment_alone_finds_the_server(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.pipe_file("bucket/environment/ä b+c=%20", BODY)
    assert fs.cat_file("bucket/environment/ä b+c=%20") == BODY
    assert connect(server).ls("bucket/environment") == ["bucket/environment/ä b+c=%20"]


def test_wrong_secret_and_missing_bucket_are_refused(server: S3Server) -> None:
    wrong = s3fs.S3FileSystem(**server.options() | {"secret": "other"}, skip_instance_cache=True)
    with pytest.raises(PermissionError, match="signature"):
        wrong.pipe_file("bucket/wrong", b"x")
    with pytest.raises(FileNotFoundError):
        connect(server).pipe_file("nowhere/a", b"x")


def test_read_only_keys_may_read_and_not_write(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(server).pipe_file("bucket/read/a", BODY)
    for name, value in server.read_only_environment().items():
        monkeypatch.setenv(name, value)
    for fs in (
        s3fs.S3FileSystem(**server.read_only_options(), skip_instance_cache=True),
        s3fs.S3FileSystem(skip_instance_cache=True),
    ):
        assert fs.ls("bucket/read") == ["bucket/read/a"]
        assert fs.cat_file("bucket/read/a") == BODY
        for write in (lambda fs=fs: fs.pipe_file("bucket/read/b", b"x"), lambda fs=fs: fs.rm_file("bucket/read/a")):
            with pytest.raises(PermissionError):
                write()
    assert connect(server).ls("bucket/read") == ["bucket/read/a"]


def test_two_servers_run_side_by_side(server: S3Server, open_server: S3Server) -> None:
    connect(open_server).pipe_file("bucket/mine", b"open")
    assert not connect(server).exists("bucket/mine")
    assert server.pid != open_server.pid


def test_server_dies_with_a_killed_test_and_the_next_one_has_its_data(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as holder:
        assert holder.stdout is not None
        weed = psutil.Process(int(holder.stdout.readline()))
        holder.kill()
    weed.wait(10)
    with s3_server(tmp_path) as server:
        assert connect(server).cat_file("bucket/mine") == b"holder"
    with pytest.raises(ConnectionError):
        plain(server).connect()
    assert not psutil.pid_exists(server.pid)


def test_failing_start_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "filerldb2").write_text("not a directory")
    with pytest.raises(RuntimeError, match=r"(?s)no answer.*exit code.*filerldb2"), s3_server(tmp_path):
        pass


def test_conditional_put_through_the_proxy_is_refused_and_recorded(server: S3Server) -> None:
    with Proxy(server.endpoint) as proxy:
        fs = connect(server, proxy)
        fs.pipe_file("bucket/once ü", b"first", mode="create")
        with pytest.raises(OSError, match="pre-conditions"):
            fs.pipe_file("bucket/once ü", b"second", mode="create")
        assert fs.cat_file("bucket/once ü") == b"first"
    puts = [request for request in proxy.requests if request.method == "PUT"]
    assert [(put.path, put.status, put.is_conditional, put.fault) for put in puts] == [
        ("/bucket/once ü", 200, True, ""),
        ("/bucket/once ü", 412, True, ""),
    ]
    assert not any(request.is_conditional for request in proxy.requests if request.method == "GET")


def test_strip_makes_a_store_that_ignores_conditions(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint, Faults(strip=("if-none-match",))) as proxy:
        fs = connect(open_server, proxy)
        fs.pipe_file("bucket/twice", b"first", mode="create")
        fs.pipe_file("bucket/twice", b"second", mode="create")
        proxy.faults = Faults()
        with pytest.raises(OSError, match="pre-conditions"):
            fs.pipe_file("bucket/twice", b"third", mode="create")
    assert stored(open_server, "/bucket/twice") == b"second"
    assert all(request.is_conditional for request in proxy.requests if request.method == "PUT")


def test_anonymous_environment_suffices_in_a_new_process(open_server: S3Server) -> None:
    code = "import s3fs; print(s3fs.S3FileSystem().ls('bucket') is not None)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | open_server.environment(), capture_output=True)
    assert done.stdout == b"True\n", done.stderr


def test_big_multipart_upload_comes_through_byte_for_byte(server: S3Server) -> None:
    data = random.Random(0).randbytes(24 << 20)
    with Proxy(server.endpoint) as proxy:
        fs = connect(server, proxy)
        fs.pipe_file("bucket/big", data, chunksize=6 << 20)
        assert fs.cat_file("bucket/big") == data
    assert connect(server).cat_file("bucket/big") == data
    assert sum("partNumber" in request.query for request in proxy.requests) == 4


def test_large_body_is_streamed(open_server: S3Server) -> None:
    piece, count = os.urandom(1 << 20), 64
    with Proxy(open_server.endpoint) as proxy:
        before = psutil.Process().memory_info().rss
        length = {"Content-Length": str(len(piece) * count)}
        assert ask(plain(proxy, 60), "PUT", "/bucket/huge", body=(piece for _ in range(count)), headers=length).status == 200
        answer = ask(plain(proxy, 60), "GET", "/bucket/huge")
        assert all(answer.read(len(piece)) == piece for _ in range(count))
        assert answer.read() == b""
        assert psutil.Process().memory_info().rss - before < 32 << 20


def test_kept_connection_chunked_bodies_and_answers_without_body(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint) as proxy:
        connection = plain(proxy)
        assert ask(connection, "PUT", "/bucket/chunked", body=iter([BODY, b"", b"end"]), encode_chunked=True).read() == b""
        first = connection.sock
        head = ask(connection, "HEAD", "/bucket/chunked")
        assert (head.read(), head.headers["Content-Length"]) == (b"", str(len(BODY) + 3))
        assert ask(connection, "GET", "/bucket/chunked").read() == BODY + b"end"
        assert ask(connection, "GET", "/bucket/missing").read().count(b"NoSuchKey")
        etag = {"If-None-Match": head.headers["ETag"]}
        assert ask(connection, "GET", "/bucket/chunked", headers=etag).read() == b""
        assert ask(connection, "DELETE", "/bucket/chunked").read() == b""
        assert connection.sock is first
        statuses = [(request.method, request.status) for request in proxy.requests]
    assert statuses == [("PUT", 200), ("HEAD", 200), ("GET", 200), ("GET", 404), ("GET", 304), ("DELETE", 204)]


def test_chunked_answers_and_answers_to_the_end_are_relayed() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nT: x\r\n\r\n"
    endless = b"HTTP/1.1 200 OK\r\n\r\nuntil the end"
    upstream = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in (chunked, chunked, endless):
            with upstream.accept()[0] as client:
                client.recv(65536)
                client.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    with Proxy(f"http://127.0.0.1:{upstream.getsockname()[1]}") as proxy:
        connection = plain(proxy)
        assert ask(connection, "GET", "/a").read() == b"abc0123456789"
        assert ask(connection, "GET", "/a").read() == b"abc0123456789"
        assert ask(connection, "GET", "/b").read() == b"until the end"


def test_expect_is_answered_and_headers_pass_unchanged() -> None:
    sent = b"PUT /a%2fb?x=%20y HTTP/1.1\r\nhOsT: some.where\r\nX-Odd:  two  spaces \r\ncontent-length: 4\r\n"
    upstream = socket.create_server(("127.0.0.1", 0))
    got: list[bytes] = []

    def serve() -> None:
        with upstream.accept()[0] as client:
            while not b"".join(got).endswith(b"body"):
                got.append(client.recv(65536))
            client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    with (
        Proxy(f"http://127.0.0.1:{upstream.getsockname()[1]}") as proxy,
        socket.create_connection(address(proxy), timeout=10) as client,
    ):
        client.sendall(sent + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"body")
        assert client.recv(100) == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert b"".join(got) == sent + b"\r\nbody"
    assert proxy.requests == [Request("PUT", "/a/b", "x=%20y", 204)]


def test_error_is_slow_down_and_not_forwarded(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint, Faults(error=1)) as proxy:
        connection = plain(proxy)
        answer = ask(connection, "PUT", "/bucket/error", body=BODY)
        assert answer.status == 503
        assert b"<Code>SlowDown</Code>" in answer.read()
        assert ask(connection, "HEAD", "/bucket/error").read() == b""
        proxy.faults = Faults()
        assert ask(connection, "GET", "/bucket/error").status == 404
    assert [(request.status, request.fault) for request in proxy.requests] == [(503, "error"), (503, "error"), (404, "")]


def test_reset_is_not_forwarded(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint, Faults(reset=1)) as proxy:
        with pytest.raises(ConnectionResetError) as caught:
            ask(plain(proxy), "PUT", "/bucket/reset", body=b"x")
        assert caught.type is ConnectionResetError, "not an orderly end"
    assert proxy.requests == [Request("PUT", "/bucket/reset", "", 0, "reset")]
    assert stored(open_server, "/bucket/reset") is None


def test_cut_sends_half_of_the_body_under_its_full_length(open_server: S3Server) -> None:
    ask(plain(open_server), "PUT", "/bucket/cut", body=BODY)
    with Proxy(open_server.endpoint, Faults(cut=1)) as proxy:
        answer = ask(plain(proxy), "GET", "/bucket/cut")
        assert answer.headers["Content-Length"] == str(len(BODY))
        with pytest.raises(IncompleteRead) as caught:
            answer.read()
        assert caught.value.partial == BODY[: len(BODY) // 2]
        with pytest.raises(ConnectionResetError):
            ask(plain(proxy), "HEAD", "/bucket/cut")
    assert [(request.status, request.fault) for request in proxy.requests] == [(200, "cut"), (0, "cut")]


def test_stall_answers_nothing_and_keeps_no_context_open(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint, Faults(stall=1)) as proxy:
        with pytest.raises(TimeoutError):
            ask(plain(proxy, timeout=0.3), "PUT", "/bucket/stall", body=b"x")
        assert proxy.requests == [Request("PUT", "/bucket/stall", "", 0, "stall")]
        proxy.faults = Faults(stall=1, stall_s=0.2)
        start = time.monotonic()
        with pytest.raises(ConnectionResetError):
            ask(plain(proxy), "GET", "/bucket/stall")
        assert 0.2 <= time.monotonic() - start < 2
        proxy.faults = Faults(stall=1)
        left = plain(proxy)
        left.request("GET", "/bucket/stall")
        start = time.monotonic()
    assert time.monotonic() - start < 2
    assert stored(open_server, "/bucket/stall") is None


def test_lost_answer_is_done_all_the_same(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint, Faults(lost_answer=1)) as proxy, pytest.raises(ConnectionResetError):
        ask(plain(proxy), "PUT", "/bucket/lost", body=BODY)
    assert proxy.requests == [Request("PUT", "/bucket/lost", "", 0, "lost_answer")]
    assert stored(open_server, "/bucket/lost") == BODY


def test_faults_are_shares_of_chosen_requests_and_repeat_with_their_seed() -> None:
    gets = [Request("GET", "/a", "")] * 2000
    faults = Faults(3, error=0.1, lost_answer=0.2, only=lambda request: request.method == "GET")
    drawn = [faults.draw(request) for request in gets]
    assert abs(drawn.count("error") - 200) < 50
    assert abs(drawn.count("lost_answer") - 400) < 80
    assert set(drawn) == {"", "error", "lost_answer"}
    assert faults.draw(Request("PUT", "/a", "")) == ""
    assert drawn == [again.draw(request) for again in [Faults(3, error=0.1, lost_answer=0.2)] for request in gets]


def test_watch_comes_before_and_answered_after_the_server(open_server: S3Server) -> None:
    seen: list[tuple[str, int, bytes | None]] = []
    with Proxy(open_server.endpoint) as proxy:

        def note(when: str, request: Request) -> None:
            seen.append((when, request.status, stored(open_server, "/bucket/watched")))
            assert not proxy.requests

        proxy.watch = lambda request: note("watch", request)
        proxy.answered = lambda request: note("answered", request)
        assert ask(plain(proxy), "PUT", "/bucket/watched", body=b"x").status == 200
        assert len(proxy.requests) == 1
    assert seen == [("watch", 0, None), ("answered", 200, b"x")]


def test_watch_can_refuse_and_its_failure_is_not_lost(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint) as proxy:
        proxy.watch = lambda request: False
        with pytest.raises(ConnectionResetError):
            ask(plain(proxy), "PUT", "/bucket/refused", body=b"x")
    assert proxy.requests == [Request("PUT", "/bucket/refused", "", 0, "reset")]
    assert stored(open_server, "/bucket/refused") is None
    with pytest.raises(ZeroDivisionError), Proxy(open_server.endpoint) as proxy:  # noqa: PT012
        proxy.watch = lambda request: 1 // 0
        with pytest.raises(ConnectionError):
            ask(plain(proxy), "GET", "/bucket/refused")


def test_upload_whose_client_is_killed_halfway_is_not_stored(open_server: S3Server) -> None:
    with Proxy(open_server.endpoint) as proxy:
        arrived = threading.Event()
        proxy.watch = lambda request: arrived.set()
        with subprocess.Popen([sys.executable, "-c", HALF, str(address(proxy)[1])]) as client:
            assert arrived.wait(10)
            time.sleep(0.2)
            os.kill(client.pid, signal.SIGKILL)
        end = time.monotonic() + 5
        while not proxy.requests and time.monotonic() < end:
            time.sleep(0.02)
        assert proxy.requests == [Request("PUT", "/bucket/half", "")]
    assert stored(open_server, "/bucket/half") is None


def test_server_that_is_gone_is_a_closed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with Proxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(ConnectionError):
        ask(plain(proxy), "GET", "/a")
    assert proxy.requests == [Request("GET", "/a", "")]
