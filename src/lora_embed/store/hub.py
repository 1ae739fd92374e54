"""Repositories of the Hugging Face hub, which recipes name as `hf://owner/name`, and their files on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from lora_embed.errors import StorageError
from lora_embed.text import whole_sentences

SCHEME = "hf://"
_OTHER_KINDS = ("hf://datasets/", "hf://spaces/", "hf://buckets/")  # fsspec reads these
_PART = r"(?!\.)[A-Za-z0-9_.-]+"
_NAME = re.compile(rf"{_PART}(/{_PART})?")
_URI = re.compile(rf"hf://(?P<name>{_NAME.pattern})(@(?P<revision>[^/]+))?(/(?P<folder>.+?))?/?")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A model's repository, or a folder in it, at a revision; None stands for the newest."""

    name: str  # owner/name
    revision: str | None
    folder: str


def is_repository(uri: str) -> bool:
    """True if a URI begins like that of a model's repository."""
    return uri.startswith(SCHEME) and not uri.startswith(_OTHER_KINDS)


def may_be_repository(name: str) -> bool:
    """True if a name without `hf://` could mean a repository: `owner/name`, or the name of an old one without an owner."""
    return _NAME.fullmatch(name) is not None


def parse(uri: str, revision: str | None = None) -> Repository:
    """Parse `hf://owner/name`, which may have `@revision` and a folder. Raises StorageError for any other text."""
    match = _URI.fullmatch(uri)
    if match is None or ".." in (match["folder"] or "").split("/"):
        raise StorageError(
            f"{uri}: is not a repository of the hub; expected hf://owner/name, also with @revision or /folder. Correct it."
        )
    uri_revision = unquote(match["revision"]) if match["revision"] else None
    if uri_revision and revision and uri_revision != revision:
        raise StorageError(f"{uri}: names revision {uri_revision}, but the key revision is {revision}. Remove one of them.")
    return Repository(name=match["name"], revision=uri_revision or revision, folder=match["folder"] or "")


def plain_name(uri: str) -> str:
    """A repository's `owner/name`, as the hub's own libraries take it; any other URI or path as it is."""
    return parse(uri).name if is_repository(uri) else uri


def no_directory(name: str, folder: Path) -> str:
    """A message about a name that is not a directory below `folder`, and could mean a repository."""
    return (
        f"there is no directory {folder / name}. Correct the path, or write {SCHEME}{name} if you mean that repository of "
        "the Hugging Face hub."
    )


def download(repository: Repository, patterns: tuple[str, ...], refusal: str, *, asks_hub: bool = True) -> Path:
    """A folder with the files of a repository, from the hub's library and its cache; without `asks_hub`, from the cache only.

    Raises StorageError where they cannot be read, with the text `refusal` and the library's own message in brackets.
    """
    import huggingface_hub  # here, since it is slow to import and only repositories need it

    within = [f"{repository.folder}/{pattern}" if repository.folder else pattern for pattern in patterns]
    try:
        copied = huggingface_hub.snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=within, local_files_only=not asks_hub
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = whole_sentences(error).rstrip(".")
        raise StorageError(f"{refusal} ({reason}). Check the name, log in, or name a directory or URI.") from None
    return Path(copied, repository.folder)
