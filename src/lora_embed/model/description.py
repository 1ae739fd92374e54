"""What an encoder says of itself in `encoder.json`; read without torch, which drivers of a run can do without."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_embed.errors import EncoderError
from lora_embed.model.preprocess import Arithmetic, Preprocessing

DESCRIPTION = "encoder.json"
REPORT = "merge_report.json"
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
    space_version: int = 1  # of what the space id hashes, see `space`


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
    tuples: dict[str, Any] = {key: tuple(value) for key, value in geometry.items() if isinstance(value, list)}
    arithmetic: dict[str, Any] = data.pop("arithmetic", {})
    members = tuple(data.pop("members", (".",)))
    base = data.pop("base", None)
    reference = BaseReference(**base) if base else None
    kinds = ((data, Description), (geometry, Preprocessing), (arithmetic, Arithmetic))
    newer = {key for found, kind in kinds for key in set(found) - {one.name for one in fields(kind)}}
    if newer:  # each of them changes what a vector is
        raise EncoderError(
            f"{path}: a newer release of lora-embed wrote it, with {min(newer)!r}, which this one does not know. Use that "
            "release."
        )
    pairs = {key: tuple(value.items()) for key, value in arithmetic.items() if isinstance(value, dict)}
    tuples["arithmetic"] = Arithmetic(**arithmetic | pairs)
    return Description(**data, members=members, base=reference, preprocessing=Preprocessing(**geometry | tuples))


def write_description(folder: Path, description: Description) -> None:
    """Write `encoder.json`."""
    preprocessing = description.preprocessing
    arithmetic = asdict(preprocessing.arithmetic)
    arithmetic |= {key: dict(value) for key, value in arithmetic.items() if isinstance(value, tuple)}
    facts = {"format": FORMAT} | asdict(description) | {"preprocessing": preprocessing.settings(), "arithmetic": arithmetic}
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n")


def check_files(folder: Path, where: str) -> None:
    """Raises EncoderError, naming `where`, when an adapter of an encoder is another file than the one that was built.

    By the files' hashes in the merge report, not by the space id: what that hashes and how a release of transformers names
    weights may change, while the same files stay the same encoder, as the golden vectors then show.
    """
    path = folder / REPORT
    if not path.is_file():
        raise EncoderError(f"{where}: has no {REPORT}, so nothing says which files it was built with. Build it again.")
    try:
        files = {name: file["sha256"] for name, file in json.loads(path.read_bytes())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{path}: is damaged ({error!r}); build the encoder again") from None
    for name, built in files.items():
        file = folder / name
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        if found != built:
            here = f"has the SHA-256 {found[:12]}…" if found else "is not there"
            raise EncoderError(
                f"{where}: {name} {here}, the encoder was built with {built[:12]}…. Its files were changed since: bring them "
                "back, or build the encoder again."
            )
