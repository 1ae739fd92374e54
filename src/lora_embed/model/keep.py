"""An encoder that a table holds under the id of an earlier version keeps that id when the same one is built again."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_embed.errors import EncoderError, StorageError
from lora_embed.fetch import fetch_directory
from lora_embed.model.description import read_description, write_description


def keep_id(folder: Path, kept: Path, older_uri: str, options: dict[str, Any]) -> Path:
    """The directory of an encoder that was built now, with the id that the one at `older_uri` has if it is the same.

    Without that, a release that hashes otherwise would embed such a table anew where a recipe is built again. The older
    encoder is loaded, and what it is is hashed as it is done today. Its id is written into a copy at `kept`.
    """
    from lora_embed.model.encoder import FILES, load_members  # with torch, which takes seconds
    from lora_embed.model.space import space_id_of

    built = read_description(folder)
    try:
        place = fetch_directory(older_uri, None, FILES, options)
        older = read_description(place)
        if older.space_version >= built.space_version:
            return folder
        models = load_members(place, older, older_uri)
    except (EncoderError, StorageError):  # it is gone, or its base is: nothing can be said of it
        return folder
    if space_id_of(models, older.preprocessing, older.pooling, older.normalize) != built.space_id:
        return folder
    shutil.copytree(folder, kept)
    write_description(kept, replace(built, space_id=older.space_id, space_version=older.space_version))
    return kept
