"""What an encoder says of itself in `encoder.json`; read without torch, which drivers of a run can do without."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_embed.errors import EncoderError
from lora_embed.model.preprocess import Preprocessing

DESCRIPTION = "encoder.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base model that an encoder stored as an adapter is rebuilt from."""

    uri: str
    revision: str | None
    content_hash: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `encoder.json` says: all that an encoder is beside its weights and model configuration."""

    space_id: str
    recipe_id: str
    dimension: int
    pooling: str
    normalize: bool
    tap: str  # module whose output is the hidden state; "" for the final output
    prefix_tokens: int
    preprocessing: Preprocessing
    members: tuple[str, ...] = (".",)  # folders of its models, or of its adapters; several when vectors are concatenated
    base: BaseReference | None = None  # where the members are adapters


def read_description(folder: Path) -> Description:
    """Read `encoder.json`. Raises EncoderError when there is none of this format."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise EncoderError(f"{folder}: is not an encoder: it has no {DESCRIPTION}. Make one with `lora-embed build`.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: is damaged ({error}); build the encoder again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise EncoderError(f"{path}: was written in another format than {FORMAT}; build the encoder again")
    geometry: dict[str, Any] = data.pop("preprocessing")
    tuples = {key: tuple(value) for key, value in geometry.items() if isinstance(value, list)}
    members = tuple(data.pop("members", (".",)))
    base = data.pop("base", None)
    reference = BaseReference(**base) if base else None
    newer = set(data) - {one.name for one in fields(Description)} | set(geometry) - {one.name for one in fields(Preprocessing)}
    if newer:  # each of them changes what a vector is
        raise EncoderError(
            f"{path}: a newer release of lora-embed wrote it, with {min(newer)!r}, which this one does not know. Use that "
            "release."
        )
    return Description(**data, members=members, base=reference, preprocessing=Preprocessing(**geometry | tuples))


def write_description(folder: Path, description: Description) -> None:
    """Write `encoder.json`."""
    facts = {"format": FORMAT} | asdict(description) | {"preprocessing": description.preprocessing.settings()}
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n")
