"""Connect to, list and write remote stores, where fsspec's file systems differ from each other or lack something.

Also all private parts of fsspec and s3fs that are used; `tests/model/test_private.py` tests what happens without each.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, cast

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from lora_embed.entries import Entry
from lora_embed.errors import StorageError
from lora_embed.libraries import part
from lora_embed.store.retry import learn

SILENCE_S = 15.0  # how long a store may send no byte, unless `read_timeout` is set; s3fs's own limit for reading
MOST_PAGES_IN_VAIN = 10  # pages of a listing, in a row, without a new key
_LAID_OVER = ("zip", "tar", "libarchive", "dir", "reference", "simplecache", "filecache", "blockcache", "cached")
SLOWEST = 2**18  # bytes per second; a slower upload counts as broken
_WALKS = "tell whether a file system's listing leaves out the folders that it may not list"
_find_of_fsspec = part("fsspec", "fsspec.asyn:AsyncFileSystem._find", _WALKS)
part("fsspec", "fsspec.asyn:sync", "end an upload that the store no longer receives", takes=("timeout",))


def is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def connect(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    """The file system and the root in it. Raises StorageError for unknown options or an unknown kind of storage."""
    try:
        fs, root = _connect_cached(uri, options) if _is_hashable(options) else _connect_anew(uri, options)
    except ImportError as error:
        raise StorageError(f"{uri}: this kind of storage needs another package: {error}") from None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{uri}: unknown kind of storage, or unknown storage options: {error}. Correct them.") from None
    if not root and is_s3(uri):
        raise StorageError(f"{uri}: the bucket is missing; expected s3://bucket/path")
    return fs, root


def _connect_anew(uri: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, str]:
    all_options = dict(options)
    if "http://" in uri or "https://" in uri:
        _keep_to_host(uri, all_options)
    if is_s3(uri):
        # Only `retry` repeats requests: botocore and s3fs would try five times each, and a stalled read 25 times.
        all_options["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | all_options.get("config_kwargs", {})
        all_options.setdefault("max_concurrency", 1)  # otherwise each read first asks for the size
    after_folder = "" if _is_chain(uri) else _after_folder(uri)
    fs, root = fsspec.core.url_to_fs(uri.removesuffix(after_folder) or "/", **all_options)
    root = f"{root.rstrip('/')}{after_folder}" if after_folder else root
    if is_s3(uri):
        _check_s3fs()
        fs.retries = 1
    if "hf://" in uri:
        _learn_errors_of_hub()
    return fs, root


def _learn_errors_of_hub() -> None:
    """The hub's library lets errors of its HTTP library through, which are no OSError. Which library that is has changed."""
    from huggingface_hub.errors import HfHubHTTPError  # imported by fsspec for this kind of storage

    learn(next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"))


def _is_chain(uri: str) -> bool:
    """Is this one file system over another, such as `zip://*.jpg::s3://bucket/a.zip`? Other names may hold `::` as well."""
    first, mark, _ = uri.partition("::")
    return bool(mark) and (first.isalnum() or first.partition("://")[0] in _LAID_OVER)


def _after_folder(uri: str) -> str:
    """The part of a URI from the last `/` before `::` on, since fsspec would take that for a chain; empty without `::`."""
    mark = uri.find("::")
    return uri[uri.rindex("/", 0, mark) :] if mark >= 0 else ""


def _keep_to_host(uri: str, all_options: dict[str, Any]) -> None:
    """Follow no redirect to another host: otherwise a server could choose which host this machine contacts next."""
    chain = [part.partition("://")[0] for part in uri.split("::")]
    for scheme in {"http", "https"} & set(chain):
        options = all_options if chain[0] == scheme else all_options.setdefault(scheme, {})
        client = options.get("client_kwargs", {})
        options["client_kwargs"] = client | {"trace_configs": [*client.get("trace_configs", ()), _SAME_HOST]}


async def _refuse_other_host(_session: Any, _context: Any, request: aiohttp.TraceRequestRedirectParams) -> None:
    url, headers = request.url, request.response.headers
    target = url.join(type(url)(headers.get("Location") or headers.get("URI") or ""))
    is_same_port = target.port == url.port or (target.is_default_port() and url.is_default_port())  # http → https
    if target.host != url.host or not is_same_port:
        raise StorageError(
            f"{url}: the server redirects to another host, {target.host}:{target.port}, which is not followed. If you trust "
            "that host, use a URI there."
        )


_SAME_HOST = aiohttp.TraceConfig()
_SAME_HOST.on_request_redirect.append(_refuse_other_host)


def _check_s3fs() -> None:
    """An s3fs without `mode` would ignore it as an unknown request option, and overwrite an existing object."""
    part("s3fs", "s3fs:S3FileSystem._pipe_file", "create an object only where there is none", takes=("mode",))
    part("s3fs", "s3fs:S3FileSystem.retries", "keep s3fs from trying again what is tried again here")


_connect_cached = lru_cache(maxsize=64)(_connect_anew)


def _is_hashable(options: tuple[tuple[str, Any], ...]) -> bool:
    """False for nested options, which cannot be a cache key; fsspec then caches the connection itself."""
    try:
        hash(options)
    except TypeError:
        return False
    return True


def date_of(answer: Mapping[str, Any]) -> float:
    """Seconds since 1970 by the clock of the S3 store that sent this answer; this machine's time if it has no date."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()


def put(fs: Any, path: str, data: bytes, silence_s: float, **options: Any) -> None:
    """Write an object. Raises TimeoutError when the upload takes longer than any working store needs.

    The libraries limit how long an answer may take, but not how long they wait for permission to send (`100 Continue`), or
    for a server that does not receive.
    """
    if isinstance(fs, AsyncFileSystem):  # no other file system takes a limit
        options["timeout"] = silence_s + len(data) / SLOWEST
    fs.pipe_file(path, data, **options)


def find(fs: Any, folder: str, uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Full paths of the files below a folder, with their properties; none where the folder does not exist.

    Raises StorageError where a listing of S3 never ends.
    """
    fs.invalidate_cache()
    is_async, kind = isinstance(fs, AsyncFileSystem), type(fs)
    walks = kind._find is _find_of_fsspec if is_async else kind.find is AbstractFileSystem.find
    try:
        # fsspec's own walk silently leaves out every folder that it cannot list; file systems with their own `find` raise.
        if is_s3(uri):
            files = _find_in_pages(fs, folder, uri)
        else:
            files = _walk(fs, folder) if walks else iter(fs.find(folder, detail=True).items())
        yield from ((name, info) for name, info in files if info["type"] == "file")
    except FileNotFoundError:
        if fs.exists(folder):
            raise StorageError(f"{uri}: changed while it was listed. Run the same command again.") from None


def _find_in_pages(fs: Any, folder: str, uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """List S3 page by page; each page has the token for the next. s3fs would ask a faulty store for pages for ever.

    A faulty store may list a key again on another page.
    """
    bucket, _, prefix = folder.partition("/")
    request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""} | getattr(fs, "req_kw", {})
    tokens, first_keys, in_vain = set[str](), set[str](), 0
    while True:
        page = _page(fs, request)
        listed = page.get("Contents", [])
        for described in listed:
            yield f"{bucket}/{described['Key']}", described | {"size": described["Size"], "type": "file"}
        if not page.get("IsTruncated"):
            return
        token = page.get("NextContinuationToken")
        in_vain = 0 if listed and listed[0]["Key"] not in first_keys else in_vain + 1
        first_keys.update(described["Key"] for described in listed[:1])
        if not token or token in tokens or in_vain >= MOST_PAGES_IN_VAIN:
            raise StorageError(
                f"{uri}: its listing never ends: after {len(tokens) + 1} pages the store says that there are more objects, but "
                "sends no new ones. Check the store, and any proxy in front of it."
            )
        tokens.add(token)
        request["ContinuationToken"] = token


def _page(fs: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One page of a listing of S3. Two thirds of its time would go into its dates, which botocore takes in any form."""
    if fs.session is not None:  # it is None before the first request
        fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_date)
    return cast(dict[str, Any], fs.call_s3("list_objects_v2", **request))


def _parse_date(text: Any) -> Any:
    """The same as botocore, in a hundredth of the time where the text is as S3 writes it in listings."""
    if isinstance(text, str) and text.endswith("Z"):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(text)
    from botocore.utils import parse_timestamp  # type: ignore[import-untyped]  # takes 80 ms, also where there is no S3

    return parse_timestamp(text)


def has_folder(fs: Any, path: str) -> bool:
    """Is there an object below this path of S3? s3fs would list, and keep, all that lies there, be it a million objects."""
    bucket, _, key = path.strip("/").partition("/")
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": 1} | getattr(fs, "req_kw", {})
    return bool(fs.call_s3("list_objects_v2", **request).get("Contents")) or not key


def page_behind(fs: Any, path: str, folder: str) -> list[tuple[str, dict[str, Any]]]:
    """Full paths and properties of the next objects of a folder behind this path, as many as S3 lists at once."""
    bucket, _, key = path.partition("/")
    prefix = folder.partition("/")[2]
    request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "StartAfter": key} | getattr(fs, "req_kw", {})
    listed = _page(fs, request).get("Contents", [])
    return [(f"{bucket}/{described['Key']}", described | {"size": described["Size"]}) for described in listed]


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for info in fs.ls(folder, detail=True):
        name = info["name"].rstrip("/")
        if info["type"] != "directory":
            yield name, info
        elif name != folder.rstrip("/"):  # some file systems list the folder itself too
            yield from _walk(fs, name)


def entry(path: str, info: dict[str, Any]) -> Entry:
    """An object's `Entry`, from a listing or from an answer about this object."""
    etag = (
        info.get("ETag")
        or info.get("etag")
        or info.get("blob_id")
        or info.get("mtime")
        or info.get("LastModified")
        or info.get("created")
    )
    if isinstance(etag, datetime):  # some file systems give a number in a listing, and a date for a single object
        etag = etag.timestamp()
    modified = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    return Entry(path=path, size=int(info["size"] or 0), etag=str(etag).strip('"'), modified=float(modified))


def delete_at_once(fs: Any, paths: list[str]) -> None:
    """Delete up to 1,000 objects of one bucket in one request. Not by `fs.rm`, which hides objects that it could not remove."""
    objects = {"Objects": [{"Key": path.partition("/")[2]} for path in paths], "Quiet": True}
    answer = fs.call_s3("delete_objects", Bucket=paths[0].partition("/")[0], Delete=objects)
    for error in answer.get("Errors", []):
        kind = PermissionError if error.get("Code") == "AccessDenied" else ConnectionError
        raise kind(f"{error.get('Key')} could not be removed: {error.get('Message') or error.get('Code')}")


class RetriedFile(io.RawIOBase):
    """A remote file whose failed reads are repeated. Its position moves only when a read succeeds."""

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
