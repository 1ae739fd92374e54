"""The request for an evaluation, the labelled input that it names, and the check of its options."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_embed.config.models import Resources
from lora_embed.errors import ConfigError
from lora_embed.installed import how_to_install
from lora_embed.schema import Layout
from lora_embed.shards.list_rows import References, carrying
from lora_embed.shards.listing import Listing, list_input

_OPTIONS = {"recipes": "recipe", "inputs": "data", "labels": "label"}  # as the command calls them


@dataclass(frozen=True, kw_only=True)
class LabelledInput:
    """Labelled images, and how they are read: as a job reads its `input`."""

    inputs: tuple[str, ...]
    input_options: dict[str, Any] = field(default_factory=dict, repr=False)  # storage options; they may hold keys
    image_column: str | None = None  # of Parquet input
    key_column: str | None = None
    references: References | None = None  # None: the input holds the images themselves
    image_member: tuple[str, ...] = ()  # of tars
    leave_out: tuple[str, ...] = ()  # files, folders or patterns of the inputs that are not read
    follow_folder_links: bool = False  # also read folders outside of the inputs that links in them lead to

    def listing(self, names: Iterable[str]) -> Listing:
        """List the inputs whose samples carry these fields, and say what is passed over."""
        fields = tuple(dict.fromkeys(names))
        references = carrying(self.references, fields)
        listing = list_input(
            self.inputs,
            self.input_options,
            fields=fields,
            references=references,
            leave_out=self.leave_out,
            follows=self.follow_folder_links,
        )
        listing.say_passed()
        return listing

    def layout(self, names: Iterable[str]) -> Layout:
        """How samples are read with these fields, each as text."""
        return Layout(
            precision="float32",
            batch_size=1,
            carry=tuple((name, "string") for name in dict.fromkeys(names)),
            image_column=self.image_column,
            key_column=self.key_column,
            image_member=self.image_member,
        )


@dataclass(frozen=True, kw_only=True)
class Request(LabelledInput):
    """The candidates, data and settings of an evaluation."""

    recipes: tuple[str, ...]  # recipe files, or directories of encoders
    labels: tuple[str, ...]  # fields, one per task
    group: str | None = None  # field: images with the same value are on the same side of a split
    split: str | None = None  # field of the user's own split
    splits: int = 5
    seed: int = 0
    reference: str | None = None  # name of a candidate; None: the base alone if it is one, else the first
    alone: bool = False  # also judge the base and each single adapter
    judges_heads: bool = True
    heads: dict[str, str] = field(default_factory=dict)  # adapter → task, if its classes fit several tasks
    head_classes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # task → names in the order of a head's outputs
    precision: str = "auto"
    work: str | None = None  # folder that keeps encoders and vectors
    shared_filesystem: bool = False
    resources: Resources = field(default_factory=Resources)
    work_options: dict[str, Any] = field(default_factory=dict, repr=False)


def check_request(request: Request) -> None:
    """Raises ConfigError for options that are missing, wrong or contradict each other."""
    for option, values in (("--recipe", request.recipes), ("--data", request.inputs), ("--label", request.labels)):
        if not values:
            raise ConfigError(f"{option} is missing. Name at least one.")
    for option in ("recipes", "inputs", "labels", "group", "split", "reference", "work"):
        value = getattr(request, option)
        if "" in (value if isinstance(value, tuple) else (value,)):
            raise ConfigError(f"--{_OPTIONS.get(option, option)} is empty. Give a value, or leave the option out.")
    if request.seed < 0:
        raise ConfigError(f"--seed is {request.seed}, expected 0 or more")
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"scikit-learn is not installed. Install it on every node: {how_to_install('evaluation')}")
    for label in request.labels:
        if request.labels.count(label) > 1:
            raise ConfigError(f"--label {label} is given {request.labels.count(label)} times. Name it once.")
    if request.split is None and request.splits < 2:
        raise ConfigError(f"--splits is {request.splits}, expected 2 or more, since noise cannot be estimated from one")
    for task in [*request.heads.values(), *request.head_classes]:
        if task not in request.labels:
            raise ConfigError(f"{task!r} is named for a head, but is not a --label. Choose from {', '.join(request.labels)}.")
