"""The description of an encoder in `encoder.json`. It is read without torch, which the driver of a run does not need."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from lora_embed.config.values import Pooling
from lora_embed.errors import ConfigError, EncoderError
from lora_embed.images.preprocess import Arithmetic, Preprocessing, check_geometry
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
_ABOUT = (
    DESCRIPTION, REPORT, "recipe.yaml", "README.md", *PROCESSOR_FILES,
    *(f"{golden.FOLDER}/{name}" for name in (golden.VECTORS, *golden.NAMES)),
)  # fmt: skip
_MEMBERS = ("", "adapter/", "member-*/")
# Patterns of all files that an encoder may have; these are copied from a remote encoder.
FILES = (
    *_ABOUT,
    *(
        f"{member}{name}"
        for member in _MEMBERS
        for name in ("config.json", "model.safetensors", "model-*.safetensors", MODEL_INDEX, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    ),
)
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
TokenCount = Annotated[int, Field(ge=0, le=2**20)]
Word = Annotated[str, Field(max_length=500)]


@dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base model that an encoder stored as an adapter is rebuilt from."""

    uri: Annotated[str, Field(min_length=1, max_length=4000)]
    revision: Word | None
    content_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class StateForm:
    """Where the patches are in a hidden state: tokens (n, tokens, d), or a map (n, d, h, w)."""

    prefix_tokens: int = 0  # class, distillation and register tokens before the patches
    suffix_tokens: int = 0  # other tokens behind the patches, such as YOLOS's detection tokens
    channels_last: bool = False  # the map is (n, h, w, d)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `encoder.json`: everything about an encoder except its weights and model configuration."""

    space_id: Id
    recipe_id: Id
    dimension: Annotated[int, Field(ge=1, le=2**20)]
    pooling: Pooling
    normalize: bool
    tap: Word  # name of the module whose output is the hidden state; "" for the final output
    prefix_tokens: TokenCount  # before the patches
    preprocessing: Preprocessing
    # Folders of the encoder's models, or of its adapters; several if vectors are concatenated.
    members: Annotated[tuple[Annotated[str, Field(pattern=r"^(\.|adapter|member-[0-9]{1,4})$")], ...], Field(min_length=1)] = (
        ".",
    )
    base: BaseReference | None = None  # set if the members are adapters
    space_version: Annotated[int, Field(ge=1, le=100)] = 1  # the version of the space id's hash: see `space`
    suffix_tokens: TokenCount = 0  # behind the patches
    channels_last: bool = False  # the hidden state is a map (n, h, w, d)

    @property
    def form(self) -> StateForm:
        """Where the patches are in the hidden state."""
        return StateForm(prefix_tokens=self.prefix_tokens, suffix_tokens=self.suffix_tokens, channels_last=self.channels_last)


_CHECKED: TypeAdapter[Description] = TypeAdapter(Description)


def read_description(folder: Path) -> Description:
    """Read `encoder.json` and check every value. Raises EncoderError if it is missing, damaged or of another format."""
    path = own_file(folder, DESCRIPTION)
    if path is None:
        raise EncoderError(f"{folder}: is not an encoder: it has no {DESCRIPTION}. Make one with `lora-embed build`.")
    try:
        data = read_json(path)
    except ValueError as error:
        raise EncoderError(f"{path}: is damaged ({error}). Build the encoder again.") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise EncoderError(f"{path}: is not of format {FORMAT}, which this release reads. Build the encoder again.")
    geometry, arithmetic = data.get("preprocessing"), data.pop("arithmetic", {})
    base = data.get("base")
    kinds = ((data, Description), (geometry, Preprocessing), (arithmetic, Arithmetic), (base, BaseReference))
    records = [(record, kind) for record, kind in kinds if isinstance(record, dict)]
    newer = {key for record, kind in records for key in set(record) - {field.name for field in fields(kind)}}
    if newer:  # an unknown setting may change vectors
        raise EncoderError(
            f"{path}: a newer release of lora-embed wrote it, with the key {min(newer)[:100]!r}, which this release does not "
            "know. Use the newer release."
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
    raise EncoderError(f"{path}: {problem}. The file was changed. Restore it, or build the encoder again.")


def _check(description: Description) -> None:
    """Raises ValueError for values that have the right type, but that no encoder can have."""
    geometry = description.preprocessing
    check_geometry(geometry)
    if geometry.resample not in range(6):
        raise ValueError(f"preprocessing.resample is {geometry.resample}, expected one of Pillow's filters, 0 to 5")
    if not all(math.isfinite(number) for number in (*geometry.multiply, *geometry.add)):
        raise ValueError("preprocessing.multiply and add are not all finite numbers")
    if len(set(description.members)) != len(description.members):
        raise ValueError("members names a folder twice")


def files_of(folder: Path, description: Description, where: str) -> list[Path]:
    """The files of an encoder, without other files in its folder.

    Raises StorageError for a link among them, and EncoderError for missing weights.
    """
    files = own_files(folder, _ABOUT)
    for member in description.members:
        if description.base is None:
            files += [*model_files(folder / member, where), *own_files(folder / member, (MODEL_INDEX,))]
        else:
            files += own_files(folder, tuple(f"{member}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)))
    return list(dict.fromkeys(files))


def check_out(out: Path) -> None:
    """Raises ConfigError if an encoder cannot be written to a new folder `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; an encoder is never overwritten. Name another directory.")
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"{out}: cannot be written: {nearest} is not a directory that this user may write to. Name another directory."
        )


def write_description(folder: Path, description: Description) -> None:
    """Write `encoder.json`."""
    preprocessing = description.preprocessing
    arithmetic = asdict(preprocessing.arithmetic)
    arithmetic |= {key: dict(value) for key, value in arithmetic.items() if isinstance(value, tuple)}
    facts = {"format": FORMAT} | asdict(description) | {"preprocessing": preprocessing.settings(), "arithmetic": arithmetic}
    for field in ("suffix_tokens", "channels_last"):  # not written at their defaults, which releases that lack them know
        if not facts[field]:
            del facts[field]
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n")


def check_files(folder: Path, description: Description, where: str) -> None:
    """Raises EncoderError, naming `where`, if an adapter file of an encoder has changed since the build.

    It compares the files' hashes in the merge report, not the space id: the space id's hash, and the names of weights in
    transformers, may change with a release, while the files stay the same encoder. The golden vectors check that.
    """
    path = own_file(folder, REPORT)
    if path is None:
        raise EncoderError(
            f"{where}: has no {REPORT}, so its files cannot be compared with those of the build. Copy it or build it again."
        )
    expected = {f"{member}/{name}" for member in description.members for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    try:
        files = {str(name): str(file["sha256"]) for name, file in read_json(path)["files"].items()}
        for member in description.members:
            files[f"{member}/{ADAPTER_WEIGHTS}"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{path}: is damaged ({str(error)[:200]}). Build the encoder again.") from None
    if unexpected := sorted(set(files) - expected):
        raise EncoderError(
            f"{path}: is damaged: it names {unexpected[0][:200]!r}, which is no file of its adapters. Build the encoder again."
        )
    for name, built_hash in files.items():
        file = own_file(folder, name)
        present_hash = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None else None
        if present_hash != built_hash:
            state = f"has the SHA-256 {present_hash[:12]}…" if present_hash else "does not exist"
            raise EncoderError(
                f"{where}: {name} {state}, but the encoder was built with {built_hash[:12]}…. The file was changed. Restore "
                "it, or build the encoder again."
            )
