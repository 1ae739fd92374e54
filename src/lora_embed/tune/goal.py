"""What a user asks of a search, and what makes one merge better than another."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np

from lora_embed.config.models import Recipe
from lora_embed.errors import ConfigError
from lora_embed.tune.propose import Rank


@dataclass(frozen=True, kw_only=True)
class TaskLabel:
    """A task: the field with its label, the adapter trained for it (None: the best on it alone), how much it counts."""

    field: str
    adapter: str | None = None
    importance: float = 1.0


def read_label(text: str) -> TaskLabel:
    """`[ADAPTER=]FIELD[:IMPORTANCE]` as a user writes it. Raises ConfigError."""
    rest, colon, weight = text.rpartition(":")
    named, equals, name = (rest if colon else text).rpartition("=")
    try:
        importance = float(weight) if colon else 1.0
    except ValueError:
        importance = math.nan
    if not name or not 0 < importance < math.inf or (equals and not named):
        raise ConfigError(
            f"--label {text}: expected FIELD, ADAPTER=FIELD or ADAPTER=FIELD:IMPORTANCE with a number above 0, for example "
            "--label shoes10=shoe_kind:2"
        )
    return TaskLabel(field=name, adapter=named or None, importance=importance)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a search goes on: so many trials, or minutes of trials; references are always tried."""

    evaluations: int | None = None
    minutes: float | None = None

    def is_spent(self, trials: int, seconds: float) -> bool:
        has_tried = self.evaluations is not None and trials >= self.evaluations
        return has_tried or (self.minutes is not None and seconds >= 60 * self.minutes)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a user asks for."""

    recipe: Recipe
    inputs: tuple[str, ...]
    tasks: tuple[TaskLabel, ...]
    out: Path
    budget: Budget
    objective: Literal["worst", "mean"] = "worst"
    methods: tuple[str, ...] = ()  # all that the adapters allow
    takes_best: bool = False  # also where its lead on equal weights is within noise
    group: str | None = None
    seed: int = 0
    most_images: int = 10_000
    work: Path | None = None
    input_options: dict[str, Any] = field(default_factory=dict, repr=False)  # storage options; they may hold keys
    image_column: str | None = None  # of Parquet input
    key_column: str | None = None

    @property
    def work_folder(self) -> Path:
        """Beside the recipe that is written, unless named."""
        return self.work or self.out.with_name(f"{self.out.stem}.work")

    @property
    def evidence(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.evidence.json")

    @property
    def report(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.evidence.html")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a trial is ranked by: accuracy on each task less that of the task's own adapter alone, on the same splits."""

    kind: Literal["worst", "mean"]
    importance: dict[str, float]  # task → how much it counts
    own: dict[str, list[float]]  # task → accuracies of its own adapter alone, by split

    def rank(self, per_split: dict[str, list[float]]) -> Rank:
        """The objective of the means over splits, then the other for equals. In `worst`, importance multiplies losses alone.

        Else a gain on an important task would count for more, and so make other tasks the worst.
        """
        return self._rank({task: mean(per_split[task]) - mean(own) for task, own in self.own.items()})

    def by_split(self, per_split: dict[str, list[float]]) -> list[float]:
        """The objective in each split by itself."""
        gains = {task: np.subtract(per_split[task], own) for task, own in self.own.items()}
        splits = len(next(iter(self.own.values())))
        return [self._rank({task: float(gain[split]) for task, gain in gains.items()})[0] for split in range(splits)]

    def _rank(self, gains: dict[str, float]) -> Rank:
        worst = min(gain * (self.importance[task] if gain < 0 else 1) for task, gain in gains.items())
        average = sum(gain * self.importance[task] for task, gain in gains.items()) / sum(self.importance.values())
        return (worst, average) if self.kind == "worst" else (average, worst)
