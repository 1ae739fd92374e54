"""Types of the values that users write, and of the sections that hold them: strict, finite, without passwords."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lora_embed.config.messages import meant
from lora_embed.text import holds_secret, redacted

Pooling = Literal["mean", "patch_mean", "cls", "last_mean", "last_patch_mean", "last_cls"]
Precision = Literal["float32", "bfloat16", "float16"]
PrecisionOrAuto = Literal["auto", Precision]
# The options of each merge method. `model.merge` has the methods themselves; it imports torch, which takes seconds.
MERGE_OPTIONS: dict[str, tuple[str, ...]] = {
    "weighted_sum": (),
    "linear": (),
    "svd": ("rank", "energy"),
    "ties": ("density", "majority_sign"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority_sign", "seed"),
    "magnitude_prune": ("density",),
    "iso_c": (),
    "concat": (),
    "none": (),
}
VectorType = Literal["float32", "float16"]


class Section(BaseModel):
    """A frozen piece of configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would take it as 0 or 1
        raise ValueError("expected a number")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def not_empty(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("expected at least one")
    return value


def as_members(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of members in a sample of a tar, in small letters and without a dot before them."""
    members = tuple(";".join(part.strip().lower().removeprefix(".") for part in name.split(";")) for name in names)
    if not all(part for member in members for part in member.split(";")) or len(set(members)) < len(members):
        raise ValueError("expected different endings of file names such as jpg, left.png or jpg;png")
    return members


def _without_password(uri: str) -> str:
    if holds_secret(uri):
        shown_uri = redacted("".join(uri.split()))
        raise ValueError(
            f"{shown_uri} holds a password or a signature, but URIs are written to tables, logs and reports. Give a "
            "password in the environment or, for input and table, in their storage options. Signed URLs of images may stand in "
            "a list: see reference_column."
        )
    return uri


# Not strict, since YAML reads 1e-3, which has no point, as text.
Number = Annotated[float, Field(strict=False), BeforeValidator(_not_bool), AfterValidator(_finite)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1)]
Uri = Annotated[Text, AfterValidator(_without_password)]  # or a path; it is written to tables and reports


def check_method(method: str, settings: dict[str, Any]) -> None:
    """Raises ValueError for a merge method that is not known, or an option that it does not have. Imports no torch."""
    if method not in MERGE_OPTIONS:
        *names, last = MERGE_OPTIONS
        of_peft = ". What PEFT calls cat is weighted_sum here" if method == "cat" else ""
        expected = f"{', '.join(names)} or {last}{of_peft or meant(method, [*names, last])}"
        raise ValueError(f"merge_method is {method!r}, expected {expected}.".replace("?.", "?"))
    known = MERGE_OPTIONS[method]
    if settings and not known:
        names = list(settings)
        raise ValueError(f"merge_options sets {', '.join(names)}, but merge_method {method!r} takes no options. Remove them.")
    if unknown := [name for name in settings if name not in known]:
        remedy = meant(unknown[0], list(known)) or f". Known keys: {', '.join(known)}."
        raise ValueError(f"merge_options of {method}: unknown key {unknown[0]!r}{remedy}")
