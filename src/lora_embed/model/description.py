"""What an encoder says of itself in `encoder.json`; read without torch, which drivers of a run can do without."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from lora_embed.errors import EncoderError
from lora_embed.images.preprocess import Arithmetic, Preprocessing
from lora_embed.model import golden
from lora_embed.model.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_INDEX,
    PROCESSOR_FILES,
    model_files,
    own_file,
    own_files,
    read_json,
)

DESCRIPTION = "encoder.json"
REPORT = "merge_report.json"
FORMAT = 1
MOST_PIXELS = 16_384  # along an edge of a prepared image
_ABOUT = (
    DESCRIPTION, REPORT, "recipe.yaml", "README.md", *PROCESSOR_FILES,
    *(f"{golden.FOLDER}/{name}" for name in (golden.VECTORS, *golden.NAMES)),
)  # fmt: skip
_MEMBERS = ("", "adapter/", "member-*/")
# Patterns of all that an encoder may consist of: what is copied of one that lies elsewhere.
FILES = (
    *_ABOUT,
    *(
        f"{member}{name}"
        for member in _MEMBERS
        for name in ("config.json", "model.safetensors", "model-*.safetensors", MODEL_INDEX, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    ),
)
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Word = Annotated[str, Field(max_length=500)]


@dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base model that an encoder stored as an adapter is rebuilt from."""

    uri: Annotated[str, Field(min_length=1, max_length=4000)]
    revision: Word | None
    content_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `encoder.json` says: all that an encoder is beside its weights and model configuration."""

    space_id: Id
    recipe_id: Id
    dimension: Annotated[int, Field(ge=1, le=2**20)]
    pooling: Literal["mean", "patch_mean", "cls", "last_mean", "last_patch_mean", "last_cls"]
    normalize: bool
    tap: Word  # module whose output is the hidden state; "" for the final output
    prefix_tokens: Annotated[int, Field(ge=0, le=2**20)]
    preprocessing: Preprocessing
    # Folders of its models, or of its adapters; several when vectors are concatenated.
    members: Annotated[tuple[Annotated[str, Field(pattern=r"^(\.|adapter|member-[0-9]{1,4})$")], ...], Field(min_length=1)] = (
        ".",
    )
    base: BaseReference | None = None  # where the members are adapters
    space_version: Annotated[int, Field(ge=1, le=100)] = 1  # of what the space id hashes, see `space`


_CHECKED: TypeAdapter[Description] = TypeAdapter(Description)


def read_description(folder: Path) -> Description:
    """Read `encoder.json`, every value of which is checked. Raises EncoderError when there is none of this format."""
    path = own_file(folder, DESCRIPTION)
    if path is None:
        raise EncoderError(f"{folder}: is not an encoder: it has no {DESCRIPTION}. Make one with `lora-embed build`.")
    try:
        data = read_json(path)
    except ValueError as error:
        raise EncoderError(f"{path}: is damaged ({error}); build the encoder again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise EncoderError(f"{path}: was written in another format than {FORMAT}; build the encoder again")
    geometry, arithmetic = data.get("preprocessing"), data.pop("arithmetic", {})
    base = data.get("base")
    kinds = ((data, Description), (geometry, Preprocessing), (arithmetic, Arithmetic), (base, BaseReference))
    newer = {key for found, kind in kinds if isinstance(found, dict) for key in set(found) - {one.name for one in fields(kind)}}
    if newer:  # each of them changes what a vector is
        raise EncoderError(
            f"{path}: a newer release of lora-embed wrote it, with {min(newer)[:100]!r}, which this one does not know. Use "
            "that release."
        )
    if isinstance(arithmetic, dict):
        arithmetic = {key: [*value.items()] if isinstance(value, dict) else value for key, value in arithmetic.items()}
    if isinstance(geometry, dict):
        data["preprocessing"] = geometry | {"arithmetic": arithmetic}
    try:
        description = _CHECKED.validate_json(json.dumps(data), strict=True)
        _check(description)
        return description
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place[:100]} is {str(first.get('input'))[:100]!r}: {first['msg'][:200]}"
    except ValueError as error:
        problem = str(error)
    raise EncoderError(f"{path}: {problem}. It was changed since: bring the file back, or build the encoder again.")


def _check(description: Description) -> None:
    """Raises ValueError for values that are of the right kind and no encoder's."""
    geometry = description.preprocessing
    lengths = [*(geometry.crop or ()), *(geometry.resize if isinstance(geometry.resize, tuple) else [geometry.resize or 1])]
    if not all(1 <= length <= MOST_PIXELS for length in lengths):
        raise ValueError(f"preprocessing makes images of {max(lengths)} pixels, expected 1 to {MOST_PIXELS:,} along an edge")
    if geometry.crop is None and not isinstance(geometry.resize, tuple):
        raise ValueError("preprocessing makes images of different sizes: resize is no height and width, and crop is null")
    if geometry.resample not in range(6):
        raise ValueError(f"preprocessing.resample is {geometry.resample}, expected one of Pillow's filters, 0 to 5")
    if not all(math.isfinite(number) for number in (*geometry.multiply, *geometry.add)):
        raise ValueError("preprocessing.multiply and add are not all finite numbers")
    if len(set(description.members)) != len(description.members):
        raise ValueError("members names a folder twice")


def files_of(folder: Path, description: Description, where: str) -> list[Path]:
    """The files that an encoder consists of, whatever else lies in its folder.

    Raises StorageError for a link among them, EncoderError for weights that are not there.
    """
    found = own_files(folder, _ABOUT)
    for member in description.members:
        if description.base is None:
            found += [*model_files(folder / member, where), *own_files(folder / member, (MODEL_INDEX,))]
        else:
            found += own_files(folder, tuple(f"{member}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)))
    return list(dict.fromkeys(found))


def write_description(folder: Path, description: Description) -> None:
    """Write `encoder.json`."""
    preprocessing = description.preprocessing
    arithmetic = asdict(preprocessing.arithmetic)
    arithmetic |= {key: dict(value) for key, value in arithmetic.items() if isinstance(value, tuple)}
    facts = {"format": FORMAT} | asdict(description) | {"preprocessing": preprocessing.settings(), "arithmetic": arithmetic}
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n")


def check_files(folder: Path, description: Description, where: str) -> None:
    """Raises EncoderError, naming `where`, when an adapter of an encoder is another file than the one that was built.

    By the files' hashes in the merge report, not by the space id: what that hashes and how a release of transformers names
    weights may change, while the same files stay the same encoder, as the golden vectors then show.
    """
    path = own_file(folder, REPORT)
    if path is None:
        raise EncoderError(f"{where}: has no {REPORT}, so nothing says which files it was built with. Build it again.")
    own = {f"{member}/{name}" for member in description.members for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    try:
        files = {str(name): str(file["sha256"]) for name, file in read_json(path)["files"].items()}
        for member in description.members:
            files[f"{member}/{ADAPTER_WEIGHTS}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{path}: is damaged ({str(error)[:200]}); build the encoder again") from None
    if strange := sorted(set(files) - own):
        raise EncoderError(
            f"{path}: is damaged: it names {strange[0][:200]!r}, no file of its adapters; build the encoder again"
        )
    for name, built in files.items():
        file = own_file(folder, name)
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None else None
        if found != built:
            here = f"has the SHA-256 {found[:12]}…" if found else "is not there"
            raise EncoderError(
                f"{where}: {name} {here}, the encoder was built with {built[:12]}…. Its files were changed since: bring them "
                "back, or build the encoder again."
            )
