"""Folders that img2dataset wrote: tars or folders of images, and beside each the Parquet file of its metadata."""

import posixpath

from lora_embed.monitor.progress import say
from lora_embed.schema import Entry

_STATISTICS = "_stats.json"


def without_metadata(entries: list[Entry], named: frozenset[str], where: str) -> list[Entry]:
    """The files of an input, without 00000.parquet where 00000_stats.json and 00000.tar, or a folder 00000, lie beside it.

    The tar or folder holds the same of each image. A file that is named outright stays.
    """
    paths = {entry.path for entry in entries}
    holding = {posixpath.dirname(path) for path in paths} | {
        path.removesuffix(".tar") for path in paths if path.endswith(".tar")
    }
    metadata = {
        f"{stem}.parquet"
        for stem in (path.removesuffix(_STATISTICS) for path in paths if path.endswith(_STATISTICS))
        if stem in holding
    }
    metadata = (metadata & paths) - named
    if metadata:
        say(
            f"{where}: {len(metadata)} Parquet files, such as {min(metadata)}, are img2dataset's metadata of the images beside "
            "them, and are not read: the same lies with each image. To keep a field of it, name the field in carry."
        )
    return [entry for entry in entries if entry.path not in metadata]
