"""Recipes and jobs: what users write, checked when it is read."""

import difflib
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_embed.errors import ConfigError

Pooling = Literal["mean", "patch_mean", "cls", "last_mean", "last_patch_mean", "last_cls"]
MergeMethod = Literal["weighted_sum", "linear", "none"]
Precision = Literal["float32", "bfloat16", "float16"]
VectorType = Literal["float32", "float16"]
CARRY_TYPES = ("string", "int64", "float64", "bool")


class Section(BaseModel):
    """A frozen piece of configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, found {value}")
    return value


Weight = Annotated[float, Field(strict=False), AfterValidator(_finite)]
Share = Annotated[float, Field(ge=0.0, le=1.0, strict=False)]


class AdapterSpec(Section):
    """One adapter of a recipe and its weight in the merge."""

    path: str
    weight: Weight = 1.0
    revision: str | None = None


class Recipe(Section):
    """What an encoder is built from."""

    base_model: str
    revision: str | None = None
    adapters: tuple[AdapterSpec, ...] = Field(default=(), strict=False)
    merge_method: MergeMethod = "weighted_sum"
    pooling: Pooling = "mean"
    normalize: bool = False
    image_size: int | None = Field(default=None, ge=8, le=4096)

    @model_validator(mode="after")
    def _method_fits_adapters(self) -> "Recipe":
        if self.merge_method == "none" and self.adapters:
            raise ValueError("merge_method 'none' takes the base alone: remove the adapters, or name a method")
        if self.merge_method != "none" and not self.adapters:
            raise ValueError("adapters is empty: name at least one, or set merge_method to 'none' for the base alone")
        return self


class Actors(Section):
    """Bounds of the actor pool; a pool without GPUs is sized by the cluster's CPUs unless they are set."""

    min: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)


class Resources(Section):
    """What the job asks the cluster for."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    actors: Actors = Actors()
    cpus_per_decode: Annotated[float, Field(gt=0, strict=False)] = 1.0
    wait_s: Annotated[float, Field(ge=0, strict=False)] = 60.0


class CarryField(Section):
    """A sample field kept as a column of the table."""

    name: str
    type: Literal["string", "int64", "float64", "bool"] = "string"


def _carry_field(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name, _, kind = value.partition(":")
    return {"name": name, "type": kind or "string"}


class JobConfig(Section):
    """One run: which encoder, which images, which table, and how."""

    recipe: str
    input: tuple[str, ...] = Field(strict=False, min_length=1)
    table: str
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    chunk_size: int = Field(default=512, ge=1, le=65536)
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    max_rejects: Share = 0.01
    max_removed: Share = 0.05
    max_pixels: int = Field(default=100_000_000, ge=1)
    carry: tuple[CarryField, ...] = Field(default=(), strict=False)
    image_column: str | None = None
    key_column: str | None = None
    limit: int | None = Field(default=None, ge=1)
    vector_type: VectorType = "float32"
    resources: Resources = Resources()
    input_storage_options: dict[str, Any] = Field(default_factory=dict)
    table_storage_options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _widen_shorthands(cls, data: dict[str, Any]) -> dict[str, Any]:
        data = dict(data)
        if isinstance(data.get("input"), str):
            data["input"] = [data["input"]]
        if isinstance(data.get("carry"), list):
            data["carry"] = [_carry_field(value) for value in data["carry"]]
        return data

    @model_validator(mode="after")
    def _columns_are_free(self) -> "JobConfig":
        names = [field.name for field in self.carry]
        taken = {"id", "embedding", "shard", "key", "width", "height", "sha256", "reason", "detail"} & set(names)
        if taken or len(set(names)) != len(names) or "" in names:
            raise ValueError(f"carry names must be distinct and none of the table's own columns, found {names}")
        return self


Config = TypeVar("Config", Recipe, JobConfig)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; relative paths in it are made absolute against its folder.

    Raises ConfigError naming the file, the key, what was found and what is allowed.
    """
    data = _read_yaml(Path(path))
    folder = Path(path).resolve().parent
    if isinstance(data.get("base_model"), str):
        data["base_model"] = _local_or_hub(folder, data["base_model"])
    for adapter in data.get("adapters") or []:
        if isinstance(adapter, dict) and isinstance(adapter.get("path"), str):
            adapter["path"] = _local_or_hub(folder, adapter["path"])
    return _checked(Recipe, data, str(path))


def load_job(path: str | Path, overrides: list[str] | None = None) -> JobConfig:
    """Read a job file and apply `key=value` overrides, whose relative paths count from the current folder.

    Raises ConfigError naming the file, the key, what was found and what is allowed.
    """
    data = _with_absolute_paths(_read_yaml(Path(path)), Path(path).resolve().parent)
    for text in overrides or []:
        keys, value = _parse_override(text)
        changed: dict[str, Any] = {keys[0]: value} if len(keys) == 1 else {}
        changed = _with_absolute_paths(changed, Path.cwd())
        target = data
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {text}: {key!r} is not a section of the job")
        target[keys[-1]] = changed.get(keys[0], value)
    return _checked(JobConfig, data, str(path))


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, separator, raw = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example --set chunk_size=256")
    try:
        return key.split("."), yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML ({error.__class__.__name__})") from error


def _with_absolute_paths(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    data = dict(data)
    for key in ("recipe", "table"):
        if isinstance(data.get(key), str):
            data[key] = _absolute(folder, data[key])
    if isinstance(data.get("input"), str):
        data["input"] = _absolute(folder, data["input"])
    elif isinstance(data.get("input"), list):
        data["input"] = [_absolute(folder, value) if isinstance(value, str) else value for value in data["input"]]
    return data


def _absolute(folder: Path, value: str) -> str:
    return value if "://" in value or not value else os.path.normpath(folder / Path(value).expanduser())


def _local_or_hub(folder: Path, value: str) -> str:
    """A name that exists below the folder, or looks like a path, is a path; anything else names a hub repository."""
    looks_local = value.startswith((".", "/", "~")) or (folder / value).exists() or value.count("/") > 1
    return _absolute(folder, value) if looks_local else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error.__class__.__name__})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    return data


def _checked(model: type[Config], data: dict[str, Any], where: str) -> Config:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(model, item) for item in error.errors())) from None


def _explain(model: type[BaseModel], item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"] if part != "constrained-int" and not str(part).startswith("lit"))
    if item["type"] == "extra_forbidden":
        allowed = list(_section_at(model, item["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(item["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}known keys: {', '.join(allowed)}"
    if item["type"] == "missing":
        return f"key {key!r} is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}, found {item['input']!r}" if key else message


def _section_at(model: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel]:
    """The section that a pydantic error's location lies in; list positions are passed over."""
    for name in loc:
        if name in model.model_fields:
            kind: Any = model.model_fields[name].annotation
            kind = next((arg for arg in getattr(kind, "__args__", ()) if isinstance(arg, type)), kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return model
