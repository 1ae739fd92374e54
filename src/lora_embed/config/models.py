"""Recipes and jobs, the two files that users write, checked while they are read."""

import posixpath
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, create_model, model_validator

from lora_embed.config.messages import Keys, checked, shown
from lora_embed.config.paths import base_place, local_place, with_absolute_paths
from lora_embed.config.recognise import JOB, RECIPE
from lora_embed.config.values import (
    Number,
    Pooling,
    PrecisionOrAuto,
    Section,
    Share,
    Text,
    Uri,
    VectorType,
    as_members,
    check_method,
    not_empty,
)
from lora_embed.config.yaml import load_yaml, read_yaml, yaml_problem
from lora_embed.errors import ConfigError

OWN_COLUMNS = ("id", "embedding", "shard", "key", "width", "height", "sha256", "reason", "detail", "lora_embed.taken")


class AdapterSpec(Section):
    """One adapter of a recipe and its weight in the merge."""

    path: Uri
    weight: Number = 1.0
    revision: Text | None = None


class Recipe(Section):
    """A recipe: the base model, the adapters and the settings that an encoder is built from."""

    base_model: Uri
    revision: Text | None = None
    adapters: tuple[AdapterSpec, ...] = Field(default=(), strict=False)
    merge_method: Text = "weighted_sum"  # `model.merge` has the methods and their options
    merge_options: dict[str, Any] = Field(default_factory=dict)
    pooling: Pooling = "mean"
    normalize: bool = False
    image_size: int | None = Field(default=None, ge=8, le=4096)
    decode: Literal["exact", "fast"] = "exact"

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters: the last part of each path, or more parts where the last ones are not distinct."""
        return distinct_names([spec.path.rstrip("/") for spec in self.adapters])

    @model_validator(mode="after")
    def _method_is_known(self) -> "Recipe":
        check_method(self.merge_method, self.merge_options)
        return self

    @model_validator(mode="after")
    def _method_fits_adapters(self) -> "Recipe":
        if self.merge_method == "none" and self.adapters:
            raise ValueError(
                f"merge_method is none, which uses the base model alone, but adapters lists {len(self.adapters)}. "
                "Remove the adapters, or name a merge method."
            )
        if self.merge_method != "none" and not self.adapters:
            raise ValueError("adapters is empty. Name at least one, or set merge_method to none for the base model alone.")
        if self.adapters and not any(adapter.weight for adapter in self.adapters):
            raise ValueError("the weight of every adapter is 0. To use the base model alone, set merge_method to none.")
        if self.merge_method == "concat" and any(adapter.weight != 1 for adapter in self.adapters):
            raise ValueError("merge_method concat uses every adapter at weight 1. Remove the weights of the adapters.")
        return self


def distinct_names(paths: list[str]) -> list[str]:
    """The last parts of each path, as few as make different paths distinct."""
    names = paths
    for parts in range(max((path.count("/") for path in paths), default=0) + 1, 0, -1):
        shorter = [posixpath.join(*path.split("/")[-parts:]) for path in paths]
        if len(set(shorter)) == len(set(paths)):
            names = shorter
    return names


class Actors(Section):
    """Bounds of the actor pool. Without them, a pool without GPUs gets its size from the cluster's CPUs."""

    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "Actors":
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min}, but max is {self.max}. Set min to max or less.")
        return self


class Resources(Section):
    """The resources that the job asks the cluster for."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    actors: Actors = Actors()
    cpus_per_decode: Annotated[Number, Field(gt=0)] = 1.0
    wait_s: Annotated[Number, Field(ge=0)] | None = None


class Retain(Section):
    """How long a table keeps old versions, and files that its current version does not use."""

    versions: int = Field(default=10, ge=2)
    grace_days: Annotated[Number, Field(ge=0)] = 7.0
    runs: int = Field(default=100, ge=1)  # the newest runs, whose states, records and reports are kept


class Reembed(Section):
    """Images that are embedded again as a check: by a new encoder before a full pass, and by the same encoder each night."""

    sample: int = Field(default=2000, ge=0)  # images that a new encoder embeds first; 0 checks none
    skip_overlap: Share | None = 0.98
    skip_gain: Share = 0.0
    drift: int = Field(default=64, ge=0)  # unchanged images embedded again beside new ones; 0 embeds none


class Prices(Section):
    """What an hour costs, in any currency, for the forecast of `plan`. A price that is not given is not counted."""

    gpu_hour: Annotated[Number, Field(ge=0)] | None = None
    cpu_hour: Annotated[Number, Field(ge=0)] | None = None


class CarryField(Section):
    """A field of the samples that is kept as a column of the table."""

    name: Text
    type: Literal["string", "int64", "float64", "bool"] = "string"
    optional: bool = False  # true: a run begins also if no sample seems to have the field


def _carry_field(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name, colon, kind = value.partition(":")
    return {"name": name, "type": kind if colon else "string"}


class JobConfig(Section):
    """One run: which encoder, which images, which table, and how."""

    recipe: Uri
    input: Annotated[tuple[Uri, ...], Field(strict=False), AfterValidator(not_empty)]
    table: Uri
    precision: PrecisionOrAuto = "auto"
    chunk_size: int = Field(default=512, ge=1, le=65536)
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    max_rejects: Share = 0.01
    max_removed: Share = 0.05
    max_pixels: int = Field(default=100_000_000, ge=1)
    max_bytes: int = Field(default=2**30, ge=1)
    carry: tuple[CarryField, ...] = Field(default=(), strict=False)
    image_column: Text | None = None
    key_column: Text | None = None
    reference_column: Text | None = None  # the input's tables are lists of references to images
    reference_roots: tuple[Uri, ...] = Field(default=(), strict=False)
    check_references: bool = False
    reject_unreachable: bool = False  # web servers that do not answer make rejects, not an incomplete run
    image_member: Annotated[tuple[Text, ...], Field(strict=False), AfterValidator(as_members)] = ()
    leave_out: tuple[Uri, ...] = Field(default=(), strict=False)  # files, folders or patterns of the input
    limit: int | None = Field(default=None, ge=1)
    vector_type: VectorType = "float32"
    resources: Resources = Resources()
    reembed: Reembed = Reembed()
    retain: Retain = Retain()
    gates: dict[str, Number] = Field(default_factory=dict)  # limits by name; `gates.Limits` has the names and defaults
    prices: Prices = Prices()
    shared_filesystem: bool = False
    follow_folder_links: bool = False  # also read folders outside of a local input that links in it lead to
    input_storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)
    table_storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _widen_shorthands(cls, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        shorthands = ("input", "image_member", "reference_roots", "leave_out", "carry")
        data |= {key: [data[key]] for key in shorthands if isinstance(data.get(key), str)}
        if isinstance(data.get("carry"), list):
            data["carry"] = [_carry_field(value) for value in data["carry"]]
        return data

    @model_validator(mode="after")
    def _columns_are_free(self) -> "JobConfig":
        names = [field.name for field in self.carry]
        for name in names:
            if name in OWN_COLUMNS:
                raise ValueError(f"carry names {name!r}, but the table has its own column of that name. Rename the field.")
            if names.count(name) > 1:
                raise ValueError(f"carry names {name!r} {names.count(name)} times. Name it once.")
        return self

    @model_validator(mode="after")
    def _references_have_a_column(self) -> "JobConfig":
        keys_set = [name for name in ("reference_roots", "check_references", "reject_unreachable") if getattr(self, name)]
        if keys_set and self.reference_column is None:
            raise ValueError(
                f"{keys_set[0]} has no effect without reference_column. Set that to the lists' column of paths or URIs."
            )
        return self

    @model_validator(mode="after")
    def _table_is_no_input(self) -> "JobConfig":
        """An input directory is searched to any depth, so the next run would embed the table's own Parquet files."""
        table = f"{self.table.removeprefix('file://').rstrip('/')}/"
        for source in self.input:
            if table.startswith(f"{source.removeprefix('file://').rstrip('/')}/"):
                raise ValueError(
                    f"table {self.table} lies in the input {source}, so the next run would read the table's own files as "
                    "images. Move one of them."
                )
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; relative paths in it are made absolute against its folder.

    Raises ConfigError naming the file, the key, what was found and what is allowed.
    """
    data = read_yaml(Path(path), "a recipe (YAML)", RECIPE)
    folder = Path(path).resolve().parent
    if isinstance(data.get("base_model"), str):
        data["base_model"] = base_place(folder, data["base_model"], f"{path}: base_model")
    adapters = data.get("adapters")
    for number, adapter in enumerate(adapters if isinstance(adapters, list) else []):
        if isinstance(adapter, dict) and isinstance(adapter.get("path"), str):
            adapter["path"] = local_place(folder, adapter["path"], f"{path}: adapters[{number}].path")
    return checked(Recipe, data, str(path), {})


def recorded_recipe(encoder: Path) -> Recipe:
    """The recipe in an encoder's directory. Its paths are absolute, and may not exist any more. Raises ConfigError."""
    path = encoder / "recipe.yaml"
    return checked(Recipe, read_yaml(path, "a recipe (YAML)"), str(path), {})


def check_options(where: str, types_and_defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The options that a user sets for `where`, checked; `types_and_defaults` has those of each option, by its name.

    Raises ConfigError for an unknown option, or a value of another type.
    """
    options = create_model("Options", __base__=Section, **types_and_defaults)
    return checked(options, values, where, {}).model_dump()


def load_job(path: str | Path, overrides: list[str] | None = None) -> JobConfig:
    """Read a job file and apply `key=value` overrides, whose relative paths count from the current folder.

    Raises ConfigError naming the file or the override, the key, what was found and what is allowed.
    """
    data = with_absolute_paths(read_yaml(Path(path), "a job file (YAML)", JOB), Path(path).resolve().parent, str(path))
    overridden: dict[Keys, str] = {}
    for text in overrides or []:
        keys, value = _parse_override(text)
        if len(keys) == 1:
            value = with_absolute_paths({keys[0]: value}, Path.cwd(), "--set")[keys[0]]
        _section_for(data, keys, text)[keys[-1]] = value
        overridden[tuple(keys)] = _without_secret(text)
    return checked(JobConfig, data, str(path), overridden)


def _without_secret(override: str) -> str:
    """An override as messages show it: without the value of a storage option, which may be a secret."""
    key = override.partition("=")[0]
    return f"{key}=…" if key.partition(".")[0].endswith("_storage_options") else override


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, separator, raw = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example --set chunk_size=256")
    try:
        return key.split("."), load_yaml(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = f"--set {_without_secret(text)}"
        raise ConfigError(f"{where}: the value is not valid YAML: {yaml_problem(error)}. Put quotes around it.") from None


def _section_for(data: dict[str, Any], keys: list[str], text: str) -> dict[str, Any]:
    """The section that holds an override's last key. It is created where it does not exist."""
    for key in keys[:-1]:
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            safe_text = _without_secret(text)
            value = shown(data) if safe_text == text else type(data).__name__
            raise ConfigError(f"--set {safe_text}: {key!r} is {value}, expected keys with values, one of them {keys[-1]!r}")
    return data
