"""The encoder of a job: found on the table's storage, given, or built and stored there once."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_embed.config.foreign import RecipeRecord, read_record
from lora_embed.config.models import load_recipe
from lora_embed.errors import EncoderError, IncompleteRun
from lora_embed.model.description import DESCRIPTION, Description, files_of, read_description
from lora_embed.model.follow import refuse_elsewhere
from lora_embed.monitor.progress import say
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store
from lora_embed.table import retention

if TYPE_CHECKING:
    from lora_embed.model.build import Ingredients


def find_source(uri: str) -> "Ingredients | Path":
    """What a recipe file names, read and hashed, or the directory of an encoder built before."""
    if Path(uri).is_dir():
        read_description(Path(uri))
        return Path(uri)
    recipe = load_recipe(uri)
    from lora_embed.model.build import gather  # with torch and peft, which take seconds

    return gather(recipe)


def named_base(source: "Ingredients | Path") -> str | None:
    """Where the base lies, by the word of the user: of a recipe, or of an encoder in a directory that the user names.

    Raises EncoderError where such an encoder names a base that lies elsewhere.
    """
    if not isinstance(source, Path):
        return source.recipe.base_model
    base = read_description(source).base
    if base is not None:
        refuse_elsewhere(base.uri, str(source))
    return base.uri if base is not None else None


def prepare_encoder(source: "Ingredients | Path", out: Path) -> Path:
    """The directory of an encoder that the table has not: given, or built at `out`."""
    if isinstance(source, Path):
        return source
    from lora_embed.model.build import build_encoder

    build_encoder(source, out, say)
    return out


def find_encoder(source: "Ingredients | Path", store: Store) -> Description | None:
    """The encoder that this content was built into before, if it is whole on the table's storage."""
    if isinstance(source, Path):
        return stored_encoder(store, read_description(source).space_id)
    recorded = read_record(store, record_path(source.recipe_id), RecipeRecord)
    return stored_encoder(store, recorded.space_id) if recorded is not None else None


def stored_encoder(store: Store, space_id: str) -> Description | None:
    """The description of an encoder that is whole on the table's storage."""
    raw = store.read(f"{encoder_path(space_id)}/{DESCRIPTION}")
    if raw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / DESCRIPTION).write_bytes(raw)
        description = read_description(Path(folder))
    if description.space_id != space_id:
        raise EncoderError(
            f"{store.name(encoder_path(space_id))}: holds an encoder that says it is of space {description.space_id}. It was "
            "changed since: bring it back, or remove it."
        )
    return description


def record_path(recipe_id: str) -> str:
    return f"recipes/{recipe_id}.json"


def renew_encoder(encoder: Description, store: Store, grace_days: float) -> None:
    """Write an old encoder's description again: one that no version refers to is removed after the grace period.

    Raises IncompleteRun where that has just happened.
    """
    path = f"{encoder_path(encoder.space_id)}/{DESCRIPTION}"
    entry, data = store.info(path), store.read(path)
    if entry is None or data is None:
        raise IncompleteRun(f"{store.name(path)}: was removed while this run began. Run the same command again.")
    if store.now() - entry.modified > grace_days * retention.DAY_S / 2:
        store.replace(path, data)


def store_encoder(folder: Path, store: Store) -> Description:
    """Copy an encoder to the table, its description last, so that it is whole once that can be read.

    Returns the table's encoder of this recipe. That is another one where a run on another kind of processor, whose numbers
    differ in their last digits, has stored its own in the meantime: a recipe has one space in a table.
    """
    description = read_description(folder)
    target, record = encoder_path(description.space_id), record_path(description.recipe_id)
    own = json.dumps({"space_id": description.space_id}).encode() + b"\n"
    for file in sorted(files_of(folder, description, str(folder)), key=lambda file: (file.name == DESCRIPTION, file)):
        store.create(f"{target}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    if not store.create(record, own):
        recorded = read_record(store, record, RecipeRecord)
        settled = stored_encoder(store, recorded.space_id if recorded is not None else description.space_id)
        if settled is not None:
            return settled
        store.replace(record, own)  # its encoder was removed, since no version needed it
    return description
