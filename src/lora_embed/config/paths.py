"""Paths in recipes and jobs: relative ones count from the folder of their file."""

import os
from pathlib import Path
from typing import Any

from lora_embed.errors import ConfigError
from lora_embed.store import hub
from lora_embed.store.place import check_uri


def with_absolute_paths(data: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """What a job file says, with absolute paths. `where` names the file, or the option, in messages."""
    data = dict(data)
    for key in ("recipe", "table", "input", "reference_roots", "leave_out"):
        if isinstance(data.get(key), str):
            data[key] = absolute(folder, data[key], f"{where}: {key}: ")
        elif isinstance(data.get(key), list):
            data[key] = [
                absolute(folder, value, f"{where}: {key}[{number}]: ") if isinstance(value, str) else value
                for number, value in enumerate(data[key])
            ]
    return data


def absolute(folder: Path, value: str, where: str = "") -> str:
    """A URI as it is, or a path from `folder` on. Raises ConfigError for what looks like a URI and is none."""
    try:
        check_uri(value)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    return value if "://" in value or not value else os.path.normpath(folder / os.path.expanduser(value))


def base_place(folder: Path, value: str, where: str) -> str:
    """A base's `owner/name` is a repository of the hub, unless a folder `owner` lies beside the recipe: then it is a path."""
    if hub.may_be_repository(value) and not (folder / value.partition("/")[0]).exists():
        return value
    return local_place(folder, value, where)


def local_place(folder: Path, value: str, where: str) -> str:
    """An absolute path or a URI. A path that does not exist and could also name a repository of the hub is refused."""
    path = absolute(folder, value, f"{where}: ")
    if "/" in value and hub.may_be_repository(value) and not os.path.exists(path):
        raise ConfigError(f"{where} is {value}, but {hub.no_directory(value, folder)}")
    return path
