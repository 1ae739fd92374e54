"""An encoder that a table holds under the id of an earlier version keeps that id when the same one is built again."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_embed.errors import EncoderError, StorageError
from lora_embed.model.description import FILES, files_of, read_description, write_description
from lora_embed.store.fetch import fetch_directory


def keep_id(folder: Path, kept: Path, older_uri: str, options: dict[str, Any], base: str | None) -> Path:
    """The directory of an encoder that was built now, with the id that the one at `older_uri` has if it is the same.

    Without that, a release that hashes otherwise would embed such a table anew where a recipe is built again. The older
    encoder is loaded, and what it is is hashed as it is done today. Its id is written into a copy at `kept`. `base` is the one
    of the encoder that was built, for an older one that is kept as an adapter.
    """
    from lora_embed.model.encoder import load_members  # with torch, which takes seconds
    from lora_embed.model.space import space_id_of

    built = read_description(folder)
    try:
        place = fetch_directory(older_uri, None, FILES, options)
        older = read_description(place)
        if older.space_version >= built.space_version:
            return folder
        models = load_members(place, older, older_uri, base)
    except (EncoderError, StorageError):  # it is gone, or its base is: nothing can be said of it
        return folder
    if space_id_of(models, older.preprocessing, older.pooling, older.normalize) != built.space_id:
        return folder
    for file in files_of(folder, built, str(folder)):
        copy = kept / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    write_description(kept, replace(built, space_id=older.space_id, space_version=older.space_version))
    return kept
