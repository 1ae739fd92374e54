"""What fsspec's remote file systems do differently from each other, or not at all: connecting, listing and writing.

Also all of fsspec and s3fs that is used and is not public; `tests/model/test_private.py` takes each part away.
"""

import io
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from lora_embed.errors import StorageError
from lora_embed.libraries import part
from lora_embed.schema import Entry

SILENCE_S = 15.0  # without a byte, of a store that is told no `read_timeout`; s3fs's own for reading
MOST_PAGES_IN_VAIN = 10  # of a listing, in a row, that name no new key
SLOWEST = 2**18  # bytes per second of an upload that is still under way
_WALKS = "tell whether a file system's listing leaves out the folders that it may not list"
_find_of_fsspec = part("fsspec", "fsspec.asyn:AsyncFileSystem._find", _WALKS)
part("fsspec", "fsspec.asyn:sync", "end an upload that the store no longer receives", takes=("timeout",))


def is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def connect(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    """The file system and the root in it; StorageError for options or a kind of storage that it does not know."""
    try:
        fs, root = _connect_cached(uri, options) if _is_hashable(options) else _connect_anew(uri, options)
    except ImportError as error:
        raise StorageError(f"{uri}: this kind of storage needs another package: {error}") from None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{uri}: unknown kind of storage, or storage options that do not fit it: {error}") from None
    if not root and is_s3(uri):
        raise StorageError(f"{uri}: names no bucket; expected s3://bucket/path")
    return fs, root


def _connect_anew(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    given = dict(options)
    if "http://" in uri or "https://" in uri:
        _keep_to_host(uri, given)
    if is_s3(uri):
        # One patience, that of `retry`: botocore and s3fs would try five times each, and a stalled read 25 times.
        given["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | given.get("config_kwargs", {})
        given.setdefault("max_concurrency", 1)  # else each read asks for the size first
    fs, root = fsspec.core.url_to_fs(uri, **given)
    if is_s3(uri):
        _check_s3fs()
        fs.retries = 1
    return fs, root


def _keep_to_host(uri: str, given: dict[str, Any]) -> None:
    """Follow no redirect to another host: a server that the user named would choose whom this machine asks next."""
    chain = [part.partition("://")[0] for part in uri.split("::")]
    for scheme in {"http", "https"} & set(chain):
        options = given if chain[0] == scheme else given.setdefault(scheme, {})
        client = options.get("client_kwargs", {})
        options["client_kwargs"] = client | {"trace_configs": [*client.get("trace_configs", ()), _SAME_HOST]}


async def _refuse_other_host(_session: Any, _context: Any, request: aiohttp.TraceRequestRedirectParams) -> None:
    url, headers = request.url, request.response.headers
    target = url.join(type(url)(headers.get("Location") or headers.get("URI") or ""))
    is_same_port = target.port == url.port or (target.is_default_port() and url.is_default_port())  # http → https
    if target.host != url.host or not is_same_port:
        raise StorageError(
            f"{url}: is sent on to {target.host}:{target.port}, and redirects to another host are not followed. If that "
            "is right, name the place there."
        )


_SAME_HOST = aiohttp.TraceConfig()
_SAME_HOST.on_request_redirect.append(_refuse_other_host)


def _check_s3fs() -> None:
    """Without `mode`, s3fs would take it for an option of the request, drop it, and write over what is there."""
    part("s3fs", "s3fs:S3FileSystem._pipe_file", "create an object only where there is none", takes=("mode",))
    part("s3fs", "s3fs:S3FileSystem.retries", "keep s3fs from trying again what is tried again here")


_connect_cached = lru_cache(maxsize=64)(_connect_anew)


def _is_hashable(options: tuple[tuple[str, Any], ...]) -> bool:
    """Nested options cannot be a cache key; fsspec then keeps the connection by itself."""
    try:
        hash(options)
    except TypeError:
        return False
    return True


def date_of(answer: Mapping[str, Any]) -> float:
    """Seconds since 1970 by the clock of the S3 store that gave this answer; this machine's where the answer has no date."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()


def put(fs: Any, path: str, data: bytes, silence_s: float, **options: Any) -> None:
    """Write an object; TimeoutError once the store has been silent for too long to be still receiving it.

    The libraries limit how long an answer may take, but not how long they wait to be let send (`100 Continue`) or for
    a peer that receives nothing.
    """
    if isinstance(fs, AsyncFileSystem):  # of the others, none takes a limit
        options["timeout"] = silence_s + len(data) / SLOWEST
    fs.pipe_file(path, data, **options)


def find(fs: Any, folder: str, uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Full paths of the files below a folder and what is known of them; none where there is no such folder.

    Raises StorageError where a listing of S3 does not come to an end.
    """
    fs.invalidate_cache()
    is_async, kind = isinstance(fs, AsyncFileSystem), type(fs)
    walks = kind._find is _find_of_fsspec if is_async else kind.find is AbstractFileSystem.find
    try:
        # fsspec's own walk leaves out every folder that it cannot list; file systems with a `find` of theirs raise.
        if is_s3(uri):
            found = _find_in_pages(fs, folder, uri)
        else:
            found = dict(_walk(fs, folder)) if walks else fs.find(folder, detail=True)
    except FileNotFoundError:
        if fs.exists(folder):
            raise StorageError(f"{uri}: changed while it was listed. Run the same command again.") from None
        return
    yield from ((name, info) for name, info in found.items() if info["type"] == "file")


def _find_in_pages(fs: Any, folder: str, uri: str) -> dict[str, dict[str, Any]]:
    """By the pages of S3's listing, each of which says how the next is asked for; s3fs itself would ask for ever."""
    bucket, _, prefix = folder.partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""} | getattr(fs, "req_kw", {})
    found: dict[str, dict[str, Any]] = {}
    tokens, in_vain = set[str](), 0
    while True:
        page, before = fs.call_s3("list_objects_v2", **asked), len(found)
        for described in page.get("Contents", []):
            found[f"{bucket}/{described['Key']}"] = described | {"size": described["Size"], "type": "file"}
        if not page.get("IsTruncated"):
            return found
        token = page.get("NextContinuationToken")
        in_vain = 0 if len(found) > before else in_vain + 1
        if not token or token in tokens or in_vain >= MOST_PAGES_IN_VAIN:
            raise StorageError(
                f"{uri}: its listing does not come to an end: after {len(tokens) + 1} pages the store says that there is more, "
                "and gives nothing new. Look at the store, or at what answers in its place."
            )
        tokens.add(token)
        asked["ContinuationToken"] = token


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for info in fs.ls(folder, detail=True):
        name = info["name"].rstrip("/")
        if info["type"] != "directory":
            yield name, info
        elif name != folder.rstrip("/"):  # some list the folder itself too
            yield from _walk(fs, name)


def entry(path: str, info: dict[str, Any]) -> Entry:
    """What a listing, or an answer about one object, says of it."""
    etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    if isinstance(etag, datetime):  # some give a number when they list, and a date when they are asked for one object
        etag = etag.timestamp()
    modified = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    return Entry(path=path, size=int(info["size"] or 0), etag=str(etag).strip('"'), modified=float(modified))


def delete_at_once(fs: Any, paths: list[str]) -> None:
    """Up to a thousand objects of one bucket in one request. Not by `fs.rm`, which does not tell what it could not remove."""
    objects = {"Objects": [{"Key": path.partition("/")[2]} for path in paths], "Quiet": True}
    answer = fs.call_s3("delete_objects", Bucket=paths[0].partition("/")[0], Delete=objects)
    for error in answer.get("Errors", []):
        kind = PermissionError if error.get("Code") == "AccessDenied" else ConnectionError
        raise kind(f"{error.get('Key')} could not be removed: {error.get('Message') or error.get('Code')}")


class RetriedFile(io.RawIOBase):
    """A remote file whose reads are tried again; its position moves only when a read succeeds."""

    def __init__(self, file: Any, retried: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._file, self._retried = file, retried

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._retried(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
