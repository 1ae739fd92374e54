"""Look at the first samples of a few shards, without their images, for fields that a job carries."""

import difflib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_embed.errors import ColumnError, ShardError, StorageError, StoreUnavailable
from lora_embed.schema import Layout, Shard
from lora_embed.shards.fields import typed
from lora_embed.shards.known_fields import known_fields
from lora_embed.shards.places import FOLDER
from lora_embed.shards.read import read_samples
from lora_embed.text import in_one_line, number_of

SHARDS, SAMPLES, SECONDS = 16, 200, 20.0  # at most; mostly the first sample has all fields
FEW = 20  # samples of a shard that show whether it is usable
NAMED = 20  # fields that a message names
EXAMPLES = 3  # values of another type that a message shows


@dataclass(frozen=True, kw_only=True)
class Absence:
    """A carried field that none of the samples had in the type that was asked for."""

    name: str
    type: str
    looked_at: int  # samples
    shards: int
    first_shard: str
    others: list[str] = field(default_factory=list)  # values that are of another type
    known: list[str] = field(default_factory=list)  # fields that the first samples have

    def describe(self) -> str:
        """For a person: what was looked at, what was found, and what a field is."""
        of = f"the first {number_of(self.looked_at, 'sample')} of {number_of(self.shards, 'shard')}"
        if self.others:
            found = ", ".join(self.others)
            return f"{self.name}: of {of}, none has it as {self.type}, but as {found}. Carry it as text: {self.name}"
        if self.name in self.known:
            return f"{self.name}: of {of}, all that have this field have null there"
        near = difflib.get_close_matches(self.name, [*self.known, FOLDER], 1)
        has = f" {self.first_shard} has the fields {', '.join(self.known[:NAMED])}." if self.known else ""
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return (
            f"{self.name}: of {of}, none has that field.{has}{hint} A field is a column of Parquet; a key of x.json beside "
            "x.jpg, in a tar or a folder; the text of a file with that ending, such as x.cls; a column of metadata.csv, "
            "metadata.jsonl or metadata.parquet; name=… of a folder; or `folder`, the folder's own name"
        )


def unusable(shards: Sequence[Shard], layout: Layout, options: dict[str, Any]) -> str | None:
    """Why no image can be read from some of the shards: their columns, or that no sample has the members `image_member`.

    None as soon as one shard is usable; a shard that cannot be read for another reason says nothing of the job.
    """
    without_images, problems = replace(layout, max_bytes=0), list[str]()
    until = time.monotonic() + SECONDS
    for shard in _some(shards):
        try:
            samples = list(itertools.islice(read_samples(shard, without_images, options, _first_of_all), FEW))
        except ColumnError as error:
            problems.append(str(error))
            continue
        except (ShardError, StorageError, StoreUnavailable, OSError):
            continue  # the run says so, and which shard it is
        if not layout.image_member or any(not sample.missing for sample in samples):
            return None
        problems += [f"{shard.root}/{shard.name}: sample {samples[0].key!r}: {samples[0].missing}"] if samples else []
        if time.monotonic() > until:
            break
    others = f" The same holds for {len(problems) - 1} of the other files that were looked at." if len(problems) > 1 else ""
    return f"{problems[0]}{others}" if problems else None


def _some(shards: Sequence[Shard]) -> Sequence[Shard]:
    return shards[:: max(1, len(shards) // SHARDS)][:SHARDS]


def absent_fields(shards: Sequence[Shard], layout: Layout, options: dict[str, Any]) -> list[Absence]:
    """The fields of `layout.carry` that none of some samples has in its type. Shards that cannot be read are left out."""
    left, others = dict(layout.carry), dict[str, list[str]]()
    until, seen, read = time.monotonic() + SECONDS, 0, 0
    without_images = replace(layout, max_bytes=0)
    for shard in _some(shards) if left else []:
        read += 1
        try:
            for sample in itertools.islice(read_samples(shard, without_images, options, _first_of_all), SAMPLES):
                seen += 1
                for name, kind in list(left.items()):
                    value = sample.fields.get(name)
                    if typed(value, kind) is not None:
                        del left[name]
                    elif value is not None and len(examples := others.setdefault(name, [])) < EXAMPLES:
                        examples.append(in_one_line(repr(value), 40))
                if not left or time.monotonic() > until:
                    break
        except (ShardError, StorageError, StoreUnavailable, OSError):
            continue  # the run says so, and which shard it is
        if not left or time.monotonic() > until:
            break
    known = known_fields(shards[0], options) if seen and left else []
    about: dict[str, Any] = {"looked_at": seen, "shards": read, "first_shard": shards[0].name if shards else "", "known": known}
    return [Absence(name=name, type=kind, others=others.get(name, []), **about) for name, kind in left.items() if seen]


def _first_of_all(number: int) -> bool:
    return number < SAMPLES
