"""Keep the space id of a table's older encoder, if a newer release builds the same encoder but computes another id for it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_embed.errors import EncoderError, StorageError
from lora_embed.model.description import FILES, files_of, read_description, write_description
from lora_embed.store.fetch import fetch_directory


def keep_id(folder: Path, kept: Path, older_uri: str, options: dict[str, Any], base: str | None) -> Path:
    """The directory of the encoder just built in `folder`, or a copy at `kept` with the id of the same encoder at `older_uri`.

    Without this, a release with another space hash would embed such a table again when its recipe is built again. The older
    encoder is loaded and hashed as today; if the hashes are equal, the older id is kept. `base` is the new encoder's base,
    for an older encoder that is stored as an adapter.
    """
    from lora_embed.model.encoder import load_members  # imports torch, which takes seconds
    from lora_embed.model.space import space_id_of

    built = read_description(folder)
    try:
        place = fetch_directory(older_uri, None, FILES, options)
        older = read_description(place)
        if older.space_version >= built.space_version:
            return folder
        models = load_members(place, older, older_uri, base)
    except (EncoderError, StorageError):  # the older encoder or its base is gone, so it cannot be compared
        return folder
    if space_id_of(models, older.preprocessing, older.pooling, older.normalize, older.form) != built.space_id:
        return folder
    for file in files_of(folder, built, str(folder)):
        copy = kept / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    write_description(kept, replace(built, space_id=older.space_id, space_version=older.space_version))
    return kept
