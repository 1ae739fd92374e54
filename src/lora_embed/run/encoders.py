"""The encoder of a job: find it on the table's storage, or take it from a directory, or build it; then store it once."""

import json
import tempfile
from pathlib import Path

from lora_embed.config.foreign import RecipeRecord, read_record
from lora_embed.config.models import load_recipe
from lora_embed.config.recognise import ENCODER, recognise
from lora_embed.errors import EncoderError, IncompleteRun
from lora_embed.model.description import DESCRIPTION, Description, files_of, read_description
from lora_embed.model.follow import refuse_elsewhere
from lora_embed.model.ingredients import Ingredients, find_ingredients
from lora_embed.monitor.progress import say
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store
from lora_embed.table import retention


def find_source(uri: str) -> Ingredients | Path:
    """The files that a recipe names, found and hashed, or the directory of an encoder built before."""
    if Path(uri).is_dir():
        thing = recognise(uri)
        if thing not in (None, ENCODER):
            raise EncoderError(
                f"{uri}: is {thing.name}, expected a recipe or an encoder, but it has no encoder.json. {thing.use.format(uri)} "
                "`lora-embed build` makes encoders from recipes."
            )
        read_description(Path(uri))
        return Path(uri)
    return find_ingredients(load_recipe(uri))


def named_base(source: Ingredients | Path) -> str | None:
    """The place of the base that the user named, in a recipe or by naming an encoder's directory.

    Raises EncoderError if such an encoder names a base that lies elsewhere.
    """
    if not isinstance(source, Path):
        return source.recipe.base_model
    base = read_description(source).base
    if base is not None:
        refuse_elsewhere(base.uri, str(source))
    return base.uri if base is not None else None


def prepare_encoder(source: Ingredients | Path, out: Path) -> Path:
    """The directory of an encoder that the table does not have: the user's, or else built at `out`."""
    if isinstance(source, Path):
        return source
    from lora_embed.model.build import build_encoder  # imports torch and peft, which takes seconds

    build_encoder(source, out, say)
    return out


def find_encoder(source: Ingredients | Path, store: Store) -> Description | None:
    """The encoder that was built from this source before, if the table's storage holds it completely."""
    if isinstance(source, Path):
        return stored_encoder(store, read_description(source).space_id)
    for recipe_id in source.possible_ids():
        recorded = read_record(store, record_path(recipe_id), RecipeRecord)
        if recorded is not None:
            return stored_encoder(store, recorded.space_id)
    return None


def stored_encoder(store: Store, space_id: str) -> Description | None:
    """The description of an encoder on the table's storage; None if it is not there, or not completely."""
    raw = store.read(f"{encoder_path(space_id)}/{DESCRIPTION}")
    if raw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / DESCRIPTION).write_bytes(raw)
        description = read_description(Path(folder))
    if description.space_id != space_id:
        raise EncoderError(
            f"{store.name(encoder_path(space_id))}: holds an encoder of space {description.space_id}, expected {space_id}. Its "
            "files were changed: restore them from a copy, or remove the directory."
        )
    return description


def has_encoders(store: Store) -> bool:
    """Does the table's storage hold any encoder? If not, no recipe has to be read to know that it lacks the recipe's."""
    store.check_reachable()
    return bool(store.list_files("recipes"))


def record_path(recipe_id: str) -> str:
    return f"recipes/{recipe_id}.json"


def renew_encoder(encoder: Description, store: Store, grace_days: float) -> None:
    """Write an old encoder's description again, so that retention does not remove the encoder while no version uses it.

    Raises IncompleteRun if it has just been removed.
    """
    path = f"{encoder_path(encoder.space_id)}/{DESCRIPTION}"
    entry, data = store.info(path), store.read(path)
    if entry is None or data is None:
        raise IncompleteRun(f"{store.name(path)}: was removed while this run began. Run the same command again.")
    if store.now() - entry.modified > grace_days * retention.DAY_S / 2:
        store.replace(path, data)


def store_encoder(folder: Path, store: Store) -> Description:
    """Copy an encoder to the table. Its description is copied last: once it can be read, the encoder is complete.

    Returns the table's encoder of this recipe, because a recipe has one space in a table. It may be another encoder: a run
    on another kind of processor, whose numbers differ in their last digits, may have stored one in the meantime.
    """
    description = read_description(folder)
    target, record = encoder_path(description.space_id), record_path(description.recipe_id)
    recipe_record = json.dumps({"space_id": description.space_id}).encode() + b"\n"
    for file in sorted(files_of(folder, description, str(folder)), key=lambda file: (file.name == DESCRIPTION, file)):
        store.create(f"{target}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    if not store.create(record, recipe_record):
        recorded = read_record(store, record, RecipeRecord)
        settled = stored_encoder(store, recorded.space_id if recorded is not None else description.space_id)
        if settled is not None:
            return settled
        store.replace(record, recipe_record)  # the recorded encoder was removed, since no version needed it
    return description
