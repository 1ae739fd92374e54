"""Objects on the web that a list names: limits on size, time, addresses and redirects, since the list may be a stranger's."""

import asyncio
import atexit
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import aiohttp
import fsspec.asyn
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from lora_embed.store.retry import describe, explained, retried

SILENCE_S, WHOLE_S = 15.0, 90.0  # how long a server may send nothing, and how long one try may take in all
MOST_REDIRECTS = 5
AT_ONCE = 64  # connections of a process
UNASKED = 2**22  # bytes that are read of an object whose size the server does not say, before there must be room for more
_REDIRECTS = (301, 302, 303, 307, 308)
_NOT_YET = (408, 425, 429)  # statuses of requests that may succeed later
_NEVER = (501, 505, 507, 511)  # statuses from 500 on that will not
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Got:
    """An object's bytes, or why there are none."""

    data: bytes | None = None
    missing: str = ""
    excess: int = 0
    waits: bool = False
    etag: str = ""


class _NotNow(ConnectionError):
    """An answer that may be another one later."""


class _Refused(Exception):
    """A request that is not made, or an answer that is not used. The text says why."""


def fetch(url: str, most: int, room: Callable[[int], bool], private: frozenset[str], retry_s: float) -> Got:
    """The bytes at a URL, up to `most`, with errors that may pass tried again for `retry_s` seconds.

    Only hosts in `private` (`host:port`) may have an address that is not public. Raises StoreUnavailable.
    """
    return _tried(url, retry_s, lambda: _in_loop(lambda: _get(url, most, room, private)))


def etag(url: str, private: frozenset[str], retry_s: float) -> str | None:
    """The etag that a server gives, or another mark that changes with the content; None where there is nothing at a URL."""
    answer = _tried(url, retry_s, lambda: _in_loop(lambda: _head(url, private)))
    return None if answer.missing else answer.etag


def _tried(url: str, retry_s: float, ask: Callable[[], Got]) -> Got:
    try:
        with explained(url, {}):
            return retried(ask, url, retry_s)
    except _Refused as refused:
        return Got(missing=str(refused))


def _in_loop(coroutine: Callable[[], Awaitable[R]]) -> R:
    """The result of a coroutine in fsspec's own thread."""
    return asyncio.run_coroutine_threadsafe(_awaited(coroutine), fsspec.asyn.get_loop()).result()


async def _awaited(coroutine: Callable[[], Awaitable[R]]) -> R:
    return await coroutine()


async def _get(url: str, most: int, room: Callable[[int], bool], private: frozenset[str]) -> Got:
    async with await _answer("GET", url, private) as answer:
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            return Got(missing=f"is sent compressed, as {answer.headers['Content-Encoding'][:40]!r}, which is not unpacked")
        size = answer.content_length
        if (size or 0) > most:
            return Got(excess=size or 0)
        if not room(size or 0):
            return Got(waits=True)
        pieces, length, has_room = list[bytes](), 0, size is not None
        async for piece in answer.content.iter_chunked(2**16):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                return Got(excess=length)
            if not has_room and length > UNASKED:
                if not room(most):
                    return Got(waits=True)
                has_room = True
        return Got(data=b"".join(pieces))


async def _head(url: str, private: frozenset[str]) -> Got:
    async with await _answer("HEAD", url, private) as answer:
        marks = [answer.headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")]
        return Got(etag=next(filter(None, marks), ""))


async def _answer(method: str, url: str, private: frozenset[str]) -> aiohttp.ClientResponse:
    """The answer, of status 200, to a request. Redirects to other hosts are not followed."""
    place = _url_of(url)
    for _ in range(MOST_REDIRECTS):
        _refuse_private(place.host or "", place.port, private)
        answer = await _asked(method, place, private)
        if answer.status == 200:
            return answer
        answer.release()
        if answer.status in _REDIRECTS:
            target = place.join(_url_of(answer.headers.get("Location", "")))
            is_same_port = target.port == place.port or (target.is_default_port() and place.is_default_port())  # http → https
            if target.scheme not in ("http", "https") or target.host != place.host or not is_same_port:
                raise _Refused(
                    f"redirects to another host, {target.host}:{target.port}, which is not followed. List that address"
                )
            place = target
        elif answer.status in _NOT_YET or (answer.status >= 500 and answer.status not in _NEVER):
            raise _NotNow(f"HTTP {answer.status} {answer.reason}")
        else:
            raise _Refused(f"{_says(answer.status)}: HTTP {answer.status} {answer.reason}"[:200])
    raise _Refused(f"redirects more than {MOST_REDIRECTS} times")


def _says(status: int) -> str:
    """What a status of an answer without an object means."""
    return {401: "needs a login", 403: "may not be read", 404: "is not there", 410: "is not there"}.get(status, "is not sent")


async def _asked(method: str, place: URL, private: frozenset[str]) -> aiohttp.ClientResponse:
    try:
        return await _session(private).request(method, place, allow_redirects=False)
    except aiohttp.InvalidURL as error:
        raise _Refused(f"is no URL ({error})") from None
    except aiohttp.ClientSSLError as error:
        raise _Refused(f"is not fetched: the server's certificate is refused ({describe(error)})") from None
    except aiohttp.ClientResponseError as error:
        raise _Refused(f"cannot be fetched: the server does not answer in HTTP ({describe(error)})") from None


def _url_of(text: str) -> URL:
    try:
        return URL(text, encoded="%" in text)
    except ValueError as error:
        raise _Refused(f"is no URL ({error})") from None


@cache  # all lists of a job share one
def _session(private: frozenset[str]) -> aiohttp.ClientSession:
    """The session of this process, in fsspec's loop. It has no cookies, no proxies and no passwords of this machine."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=_PublicResolver(private), limit=AT_ONCE),
        timeout=aiohttp.ClientTimeout(total=WHOLE_S, sock_connect=SILENCE_S, sock_read=SILENCE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # a few bytes could unpack to any number
        headers={"Accept-Encoding": "identity", "User-Agent": "lora-embed"},
    )
    atexit.register(_in_loop, session.close)  # otherwise aiohttp complains while the process ends
    return session


class _PublicResolver(AbstractResolver):
    """Names → addresses, without those that are not public: another name for this machine, or for one in its network."""

    def __init__(self, private: frozenset[str]) -> None:
        self._resolver, self._private = ThreadedResolver(), private

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        try:
            addresses = await self._resolver.resolve(host, port, family)
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                raise _Refused(f"is not there: no host has the name {host}") from None
            raise
        for address in addresses:
            _refuse_private(address["host"], port, self._private, host)
        return addresses

    async def close(self) -> None:
        await self._resolver.close()


def _refuse_private(address: str, port: int | None, private: frozenset[str], name: str | None = None) -> None:
    """Raises for an address that is not public, unless its host is one of `private`. A name is no address: it passes."""
    host = name or address
    if f"{host}:{port}" in private:
        return
    try:
        number: Any = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return
    number = getattr(number, "ipv4_mapped", None) or getattr(number, "sixtofour", None) or number
    if not number.is_global or number.is_multicast or number in _TRANSLATED:
        raise _Refused(
            f"is not fetched: {host} has the address {number}, which is not public. To allow that, add to reference_roots "
            f"in the job: [http://{host}:{port}]"
        )


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses, private ones too, as some networks write them
