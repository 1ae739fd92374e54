"""Repositories of the Hugging Face hub: how a recipe names one, `hf://owner/name`, and its files on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from lora_embed.errors import StorageError
from lora_embed.text import in_one_line

SCHEME = "hf://"
_OTHER_KINDS = ("hf://datasets/", "hf://spaces/", "hf://buckets/")  # which fsspec reads
_PART = r"(?!\.)[A-Za-z0-9_.-]+"
_NAME = re.compile(rf"{_PART}(/{_PART})?")
_URI = re.compile(rf"hf://(?P<name>{_NAME.pattern})(@(?P<revision>[^/]+))?(/(?P<folder>.+?))?/?")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A model's repository, or a folder in it, at a revision; None is the newest."""

    name: str  # owner/name
    revision: str | None
    folder: str


def is_repository(uri: str) -> bool:
    """Does a place begin as that of a model's repository does?"""
    return uri.startswith(SCHEME) and not uri.startswith(_OTHER_KINDS)


def may_be_repository(name: str) -> bool:
    """Could a name without `hf://` be meant for a repository: `owner/name`, or one of the first ones, which have no owner?"""
    return _NAME.fullmatch(name) is not None


def parse(uri: str, revision: str | None = None) -> Repository:
    """`hf://owner/name`, where wanted with `@revision` and a folder. Raises StorageError for what is not that."""
    found = _URI.fullmatch(uri)
    if found is None or ".." in (found["folder"] or "").split("/"):
        raise StorageError(f"{uri}: names no repository of the hub; expected hf://owner/name or hf://owner/name@revision")
    named = unquote(found["revision"]) if found["revision"] else None
    if named and revision and named != revision:
        raise StorageError(f"{uri}: names revision {named}, and revision beside it is {revision}. Name one of them.")
    return Repository(name=found["name"], revision=named or revision, folder=found["folder"] or "")


def plain_name(uri: str) -> str:
    """A repository's `owner/name`, as the hub's own libraries take it; any other place as it is."""
    return parse(uri).name if is_repository(uri) else uri


def no_directory(name: str, folder: Path) -> str:
    """What a message says of a name that is no directory below `folder` and could be meant for a repository."""
    return (
        f"there is no directory {folder / name}. Correct the path, or write {SCHEME}{name} if that repository of the "
        "Hugging Face hub is meant."
    )


def download(repository: Repository, patterns: tuple[str, ...], refusal: str, *, asks_hub: bool = True) -> Path:
    """The files of a repository, from the hub or from the cache that its library keeps; unless it `asks_hub`, from that alone.

    Raises StorageError when they cannot be read: `refusal`, and in brackets the library's own words.
    """
    import huggingface_hub  # slow to import, and only a name of the hub needs it

    within = [f"{repository.folder}/{pattern}" if repository.folder else pattern for pattern in patterns]
    try:
        copied = huggingface_hub.snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=within, local_files_only=not asks_hub
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = in_one_line(error)
        raise StorageError(f"{refusal} ({reason}). Check the name, log in, or give a directory or URI.") from None
    return Path(copied, repository.folder)
