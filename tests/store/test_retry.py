"""Which answers of a store are tried again, and which end a request at once."""

import http.client
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import botocore.exceptions as boto
import pytest

from lora_embed.errors import StorageError
from lora_embed.store import retry
from lora_embed.store.retry import is_transient, take_retries
from lora_embed.store.store import Store
from s3 import Faults, Proxy, Refusal, S3Server

PASSING = {
    "too many requests": Refusal(429, "TooManyRequests", "Slow down."),
    "slow down, by its code": Refusal(400, "SlowDown", "Slow down."),
    "an error of the server": Refusal(500, "InternalError", "Try again."),
    "no server behind the gateway": Refusal(502, "BadGateway", "Try again."),
    "two conditional PUTs at once": Refusal(409, "ConditionalRequestConflict", "Try again."),
    "two operations at once": Refusal(409, "OperationAborted", "Try again."),
    "a body that came late": Refusal(400, "RequestTimeout", "Idle."),
    "a body that came damaged": Refusal(400, "BadDigest", "Another MD5."),
    "a body that came damaged, as SHA-256 tells": Refusal(400, "XAmzContentSHA256Mismatch", "Another SHA-256."),
    "half a body": Refusal(400, "IncompleteBody", "Fewer bytes."),
}
LASTING = {
    "not implemented": Refusal(501, "NotImplemented", "No."),
    "a wrong request": Refusal(400, "InvalidArgument", "No."),
    "a conflict that stays": Refusal(409, "BucketNotEmpty", "No."),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_is_tried_again(server: S3Server, what: str) -> None:
    with Proxy(server.endpoint, Faults(answer=PASSING[what])) as proxy:
        store = Store("s3://images/passing", server.options(proxy.endpoint) | {"retry_s": 30})
        hits = iter(["error"])
        proxy.faults.draw = lambda request: next(hits, "")  # type: ignore[method-assign]
        take_retries()
        store.replace(what, b"1")
        assert take_retries() == 1
        assert [(request.method, request.status) for request in proxy.requests] == [("PUT", PASSING[what].status), ("PUT", 200)]
        assert store.read(what) == b"1"


@pytest.mark.parametrize("what", LASTING)
def test_what_lasts_is_said_at_once(server: S3Server, what: str) -> None:
    with Proxy(server.endpoint, Faults(error=1.0, answer=LASTING[what])) as proxy:
        store = Store("s3://images/lasting", server.options(proxy.endpoint) | {"retry_s": 30})
        started = time.monotonic()
        with pytest.raises(StorageError):
            store.replace("a", b"1")
        assert [request.status for request in proxy.requests] == [LASTING[what].status]
        assert time.monotonic() - started < 20  # of 30


class OfGoogle(Exception):
    """An error as gcsfs raises it, with its status in `code`."""

    def __init__(self, code: int) -> None:
        super().__init__("as gcsfs raises it")
        self.code = code


@pytest.mark.parametrize(("code", "passes"), [(429, True), (500, True), (503, True), (400, False), (404, False), (501, False)])
def test_the_status_of_another_library_decides_too(code: int, passes: bool) -> None:
    wrapped = OSError("as fsspec wraps it")
    wrapped.__cause__ = OfGoogle(code)
    assert is_transient(wrapped) == passes


RAISED = {
    "reset": (ConnectionResetError(), True),
    "too late": (TimeoutError(), True),
    "cut short": (http.client.IncompleteRead(b""), True),
    "cut short, by aiohttp": (aiohttp.ClientPayloadError(), True),
    "disconnected": (aiohttp.ServerDisconnectedError(), True),
    "silent": (boto.ReadTimeoutError(endpoint_url="http://store"), True),
    "denied": (PermissionError(), False),
    "not there": (FileNotFoundError(), False),
    "no keys": (boto.NoCredentialsError(), False),
}


@pytest.mark.parametrize("how", RAISED)
def test_the_kind_of_an_error_without_a_status_decides(how: str) -> None:
    error, passes = RAISED[how]
    assert is_transient(error) == passes


class Busy(BaseHTTPRequestHandler):
    """A store that cannot remove one of the objects at first."""

    asked = 0

    def do_POST(self) -> None:
        type(self).asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        failed = "<Error><Key>a</Key><Code>InternalError</Code><Message>Busy.</Message></Error>" if self.asked == 1 else ""
        body = f'<?xml version="1.0"?><DeleteResult>{failed}</DeleteResult>'.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_an_object_that_could_not_be_removed_is_removed_again() -> None:
    server, Busy.asked = ThreadingHTTPServer(("127.0.0.1", 0), Busy), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "us-east-1"}
        Store("s3://busy", {"key": "k", "secret": "s", "client_kwargs": place}).delete(["a", "b"])
    finally:
        server.shutdown()
        server.server_close()
    assert Busy.asked == 2


def unknown_host() -> None:
    """A real request for an address. No name of a host holds a space, so every name server says that there is none."""
    try:
        socket.getaddrinfo("no such host", 80)
    except OSError as error:
        raise boto.EndpointConnectionError(endpoint_url="https://no such host", error=error) from None


def test_a_host_whose_name_has_no_address_is_told_after_seconds_and_the_line_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "NO_NAME_S", 1.0)
    monkeypatch.setattr(retry, "SAY_AFTER_S", 0.0)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://b/x: no address is known for the name of its host \(.+\)\. Correct the name"):
        retry.retried(unknown_host, "s3://b/x", 60.0)
    assert time.monotonic() - started < 10  # of 60
    assert len(caplog.records) == 1
    assert take_retries() > 1


def test_another_error_gets_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(retry, "SAY_AFTER_S", 0.0)
    errors = iter([TimeoutError("slow"), TimeoutError("slow"), ConnectionResetError("reset"), TimeoutError("slow")])

    def fails() -> str:
        if (error := next(errors, None)) is not None:
            raise error
        return "here"

    assert retry.retried(fails, "s3://b/x", 60.0) == "here"
    assert [record.args[1] for record in caplog.records] == ["slow", "reset", "slow"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endpoint_url": 0.5}, r"with this URI and these storage options \(endpoint_url, key, secret\): .+\. Correct them"),
        ({"endpoint_url": "products"}, "storage options .*Invalid endpoint: products"),
        ({"client_kwargs": {"region_name": {"a": 1}}}, "storage options"),
        ({"client_kwargs": "x"}, "storage options"),
        ({"config_kwargs": {"connect_timeout": "x"}}, "cannot be reached"),
    ],
)
def test_storage_options_of_another_type_are_refused_at_once(options: dict[str, Any], says: str) -> None:
    store = Store("s3://products/table", {"key": "k", "secret": "hidden"} | {"endpoint_url": "http://127.0.0.1:9"} | options)
    started = time.monotonic()
    with pytest.raises(StorageError, match=says) as caught:
        store.check_reachable()
    assert "hidden" not in str(caught.value)
    assert time.monotonic() - started < 4
