"""Recognise what a file or folder of this machine is, for messages where a command or a key expected something else."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_embed.errors import ConfigError

MOST_BYTES = 2**16  # of a YAML file that is looked at
_RECIPE_KEYS = {"base_model", "adapters", "merge_method", "merge_options", "pooling"}
_JOB_KEYS = {"recipe", "input", "table"}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".tga")
_SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".parquet")
_OF_TABLE = {"table.json", "CURRENT", "versions", "encoders"}  # a folder with two of these is a table


@dataclass(frozen=True)
class Thing:
    """A kind of file or folder, and what takes it: a sentence with `{}` for its path."""

    name: str
    use: str

    def instead_of(self, where: str, path: str | Path, expected: str) -> str:
        """A message about a path that names this thing where something else was expected."""
        return f"{where}: is {self.name}, expected {expected}. {self.use.format(path)}"


RECIPE = Thing("a recipe", "A job names it with its key recipe; `lora-embed build {} --out DIR` builds its encoder.")
JOB = Thing("a job", "`lora-embed run {}` runs it.")
TABLE = Thing("a table", "A job names it with its key table; `lora-embed status {}` shows what it holds.")
ENCODER = Thing("an encoder", "A job names it with its key recipe, in place of a recipe.")
ADAPTER = Thing("an adapter", "A recipe names it under adapters.")
MODEL = Thing("a model", "A recipe names it with its key base_model.")
INDEX = Thing("an index", "`lora-embed search TABLE IMAGE --index {}` searches it.")
IMAGE = Thing("an image", "`lora-embed search TABLE {}` finds the images that are nearest to it.")
SHARD = Thing("a file of images", "A job names it with its key input.")
INPUT = Thing("a folder of images", "A job names it with its key input.")
_FOLDERS = {  # file that a folder of the kind holds → kind; the first that fits
    "encoder.json": ENCODER,
    "adapter_config.json": ADAPTER,
    "index.json": INDEX,
    "config.json": MODEL,
}


def recognise(path: str | Path) -> Thing | None:
    """What a path of this machine names, by its name, its files or its keys; None for anything else, and for a URI."""
    if "://" in str(path):
        return None
    try:
        return _folder(path) if os.path.isdir(path) else _file(str(path))
    except (OSError, ValueError):  # no permission, or no path at all
        return None


def by_keys(data: Any) -> Thing | None:
    """A recipe or a job, by the keys of a YAML file."""
    keys = set(data) if isinstance(data, dict) else set()
    of_recipe, of_job = len(keys & _RECIPE_KEYS), len(keys & _JOB_KEYS)
    if of_recipe == of_job:
        return None
    return RECIPE if of_recipe > of_job else JOB


def refuse_other(path: str | Path, wanted: Thing, expected: str, where: str = "") -> None:
    """Raises ConfigError if a path is recognised as something else than the wanted thing."""
    thing = recognise(path)
    if thing is not None and thing is not wanted:
        raise ConfigError(thing.instead_of(where or str(path), path, expected))


def _folder(path: str | Path) -> Thing | None:
    for name, kind in _FOLDERS.items():
        if os.path.isfile(os.path.join(path, name)):
            return kind
    names = os.listdir(path)
    if len(_OF_TABLE.intersection(names)) >= 2:
        return TABLE
    return INPUT if any(name.lower().endswith((*_IMAGES, *_SHARDS)) for name in names) else None


def _file(path: str) -> Thing | None:
    name = path.lower()
    if not os.path.isfile(path):
        return None
    if name.endswith(_IMAGES):
        return IMAGE
    if name.endswith(_SHARDS):
        return SHARD
    if name.endswith((".yaml", ".yml")) and os.path.getsize(path) <= MOST_BYTES:
        try:
            return by_keys(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError, RecursionError, AttributeError, IndexError, KeyError, TypeError):
            return None
    return None
