"""Decide whether a place that a table names is opened: the table may have been written by somebody else."""

import os
import posixpath
import shlex
from collections.abc import Iterable
from urllib.parse import unquote

from lora_embed.errors import TableError

_LOCAL = ("file", "local")


def refuse_elsewhere(uri: str, named_by: str, allowed: Iterable[str]) -> None:
    """Raises TableError for a path or URI that a table names, unless it lies in the table's store or an allowed place.

    Allowed places are those that the user has named. Otherwise, somebody who writes a table could make its readers send
    requests with their keys, or read their files.
    """
    if not any(lies_within(uri, place) for place in (named_by, *allowed)):
        raise TableError(
            f"{named_by}: says that its images lie in {uri}, outside of the table. A table that somebody else wrote could name "
            f"any place, so this one is opened only if you name it too: add --input {shlex.quote(uri)}, or give the job file "
            "in place of the table."
        )


def lies_within(uri: str, place: str) -> bool:
    """Is a path or URI the place itself, or inside it? False for a chain of URIs, and for a path with `..` in it."""
    if uri == place:
        return True
    inner, outer = _parts(uri), _parts(place)
    return inner is not None and outer is not None and inner[: len(outer)] == outer


def _parts(uri: str) -> list[str] | None:
    """Kind of storage, host or bucket, and folders; None for a path or URI that must never be followed."""
    scheme, mark, rest = uri.partition("://")
    if "::" in uri or "\0" in uri or "\\" in uri:
        return None
    if mark and scheme.lower() not in _LOCAL:
        names = rest.split("/")
        is_plain = not any(part in (".", "..") for part in unquote(rest).split("/")) and "%2f" not in rest.lower()
        return [scheme.lower(), names[0], *filter(None, names[1:])] if is_plain and names[0] else None
    path = rest if mark else uri
    if (
        path.startswith("~") or ":" in path.partition("/")[0] or ".." in path.split("/")
    ):  # other ways to write a scheme, a home or a folder above
        return None
    return ["", *filter(None, posixpath.normpath(os.path.realpath(path)).split("/"))]
