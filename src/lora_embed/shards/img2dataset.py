"""Folders that img2dataset wrote: tars or folders of images, and beside each the Parquet file of its metadata."""

import posixpath
from collections import Counter
from dataclasses import replace

from lora_embed.entries import Entries
from lora_embed.shards.patterns import Files

METADATA = "img2dataset's .parquet"  # a kind of files that are passed over
_STATISTICS = "_stats.json"


def without_metadata(files: Files, passed: Counter[str]) -> Files:
    """The files of an input, without 00000.parquet where 00000_stats.json and 00000.tar, or a folder 00000, lie beside it.

    The tar or folder holds the same of each image. A file that is named outright stays.
    """
    stems = {path.removesuffix(_STATISTICS) for path in files.entries.paths() if path.endswith(_STATISTICS)}
    if not stems:
        return files
    holding = {posixpath.dirname(path) for path in files.entries.paths()}
    holding |= {path[:-4] for path in files.entries.paths() if path.endswith(".tar")}
    metadata = {f"{stem}.parquet" for stem in stems & holding} - files.named
    kept = Entries()
    for state in files.entries.states():
        if state[0] in metadata:
            passed[METADATA] += 1
        else:
            kept.add(*state)
    return replace(files, entries=kept)
