"""Where a reference leads: the store and the path of the object that a path or a URI in a list names."""

import os
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from lora_embed.errors import ConfigError

WEB = ("http", "https")
MOST_KEY, MOST_PART, MOST_PATH = 1024, 255, 4095  # bytes: of an S3 key, of a name on a local disk, and of a path there
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ALMOST = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?::/?|//)(?=[^/])(.*)", re.DOTALL)  # s3//bucket, s3:/bucket, s3:bucket
_REMOTE = {
    *WEB,
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "adl",
    "wasb",
    "wasbs",
    "oss",
    "r2",
    "hf",
    "ftp",
    "sftp",
    "hdfs",
}
_BUCKET = re.compile(r"[A-Za-z0-9._-]{3,255}")


@dataclass(frozen=True)
class Place:
    """An object: a path below a store's root. The root of the local disk is `/`, that of a web server `http://host`."""

    store: str
    path: str

    @property
    def uri(self) -> str:
        return f"{self.store.rstrip('/')}/{self.path}"

    @property
    def is_local(self) -> bool:
        return self.store == "/"

    @property
    def is_web(self) -> bool:
        return self.store.partition("://")[0] in WEB

    @property
    def host(self) -> str:
        """`host:port` of a web server."""
        parts = urlsplit(self.store)
        return f"{parts.hostname}:{parts.port or {'http': 80, 'https': 443}.get(parts.scheme)}"

    def is_below(self, root: "Place") -> bool:
        return self.store == root.store and f"{self.path}/".startswith(f"{root.path}/" if root.path else "")


def is_local(reference: str, folder: str) -> bool:
    """True if a reference leads to a local disk, by its beginning alone."""
    scheme = _SCHEME.match(reference)
    if scheme is not None:
        return scheme[1].lower() in ("file", "local")
    return reference.startswith("/") or folder.startswith("/") or is_local(folder, "/")


def check_uri(text: str) -> None:
    """Raises ConfigError for what names nothing: a wrong URL, or a text with a NUL.

    Also for a text that looks like a URI and would be taken for a local path, unless such a path exists.
    """
    if "\0" in text:
        raise ConfigError(f"{text!r}: holds a NUL, which no path or URI does. Remove it.")
    scheme, almost = _SCHEME.match(text), _ALMOST.match(text)
    if scheme is not None and scheme[1].lower() in WEB:
        _check_url(text)
    meant = ""
    if scheme is not None and scheme[1].lower() in ("file", "local"):
        rest = text[scheme.end() :]
        meant = "" if rest.startswith("/") else f"{scheme[0]}/{rest.lstrip('./')}"
    elif scheme is None and almost is not None and not os.path.lexists(text):
        kind, is_here = almost[1].lower(), text.startswith(("file:", "local:", "memory:"))
        slash = "/" if is_here and kind != "memory" else ""
        meant = f"{almost[1]}://{slash}{almost[2]}" if kind in _REMOTE or is_here else ""
    if meant:
        advice = "an absolute path alone" if scheme else f"./{text} for a local path of that name"
        raise ConfigError(f"{text}: looks like a URI, but would be taken for a local path. Write {meant}, or {advice}.")


def _check_url(text: str) -> None:
    problem = "has no host"
    try:
        parts = urlsplit(text)
        if parts.hostname and parts.port != 0:
            return
    except ValueError as error:
        problem = str(error)
    raise ConfigError(f"{text}: is no URL ({problem}), expected https://host/path. Correct it.")


def locate(reference: str, folder: Place) -> Place:
    """The place of a reference; relative paths count from the list's folder.

    Raises ValueError with a detail for a reference that can name no object.
    """
    if "\0" in reference or not reference:
        raise ValueError("names no file")
    scheme = _SCHEME.match(reference)
    if scheme is None and not reference.startswith("/"):
        return _joined(folder, reference)
    place = place_of(reference)
    if not place.path:
        raise ValueError("names no file")
    return place


def place_of(uri: str) -> Place:
    """The place of a URI or of an absolute local path. Raises ValueError for one that can name no object."""
    scheme = _SCHEME.match(uri)
    if scheme is None or scheme[1].lower() in ("file", "local"):
        return _local(uri[scheme.end() :] if scheme else uri)
    kind = scheme[1].lower()
    if kind in WEB:
        return _web(uri)
    host, _, path = uri[scheme.end() :].partition("/")
    if kind == "hf":  # hf://datasets/owner/name/path
        owner, _, path = path.partition("/")
        name, _, path = path.partition("/")
        host = f"{host}/{owner}/{name}"
    if kind in ("s3", "s3a"):
        kind = "s3"
        if not _BUCKET.fullmatch(host) or len(path.encode("utf-8", "surrogatepass")) > MOST_KEY:
            raise ValueError(f"names no object that S3 can hold (a bucket's name, and a key of up to {MOST_KEY} bytes)")
    if ".." in path.split("/"):
        raise ValueError("has a part .. in its path")
    return Place(f"{kind}://{host}", path.rstrip("/"))


def _local(path: str) -> Place:
    normal = posixpath.normpath(f"/{path}").lstrip("/")
    if len(normal) > MOST_PART // 4:  # no character takes more than four bytes
        encoded = os.fsencode(normal)
        if len(encoded) > MOST_PATH or max(map(len, encoded.split(b"/"))) > MOST_PART:
            raise ValueError("is longer than a path on a local disk can be")
    return Place("/", normal)


def _web(uri: str) -> Place:
    try:
        parts = urlsplit(uri)
        port = f":{parts.port}" if parts.port else ""
        host = parts.hostname or ""
    except ValueError as error:
        raise ValueError(f"is no URL ({error})") from None
    if not host or any(character.isspace() or not character.isprintable() for character in uri):
        raise ValueError("is no URL: it has no host, or holds spaces, which must be written as %20")
    host = f"[{host}]" if ":" in host else host
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    query = f"?{parts.query}" if parts.query else ""
    return Place(f"{parts.scheme}://{user}{host}{port}", f"{parts.path.lstrip('/')}{query}")


def _joined(folder: Place, relative: str) -> Place:
    """A relative path from a folder on. Raises ValueError where it leads out of the folder's store."""
    if folder.is_local:
        return _local(f"{folder.path}/{relative}")
    path = posixpath.normpath(posixpath.join(folder.path, relative))
    if path.startswith("../") or path in ("..", "."):
        raise ValueError("leads out of the list's own store")
    return place_of(f"{folder.store.rstrip('/')}/{path}")
