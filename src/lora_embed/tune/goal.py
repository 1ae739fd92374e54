"""The request for a search, and the objective that ranks its merges."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np

from lora_embed.config.models import Recipe
from lora_embed.errors import ConfigError
from lora_embed.evaluate.request import LabelledInput
from lora_embed.tune.propose import Rank


@dataclass(frozen=True, kw_only=True)
class TaskLabel:
    """A task: the field with its label, its adapter (None: the single adapter that is best at it), and its importance."""

    field: str
    adapter: str | None = None
    importance: float = 1.0


def read_label(text: str) -> TaskLabel:
    """Parse `[ADAPTER=]FIELD[:IMPORTANCE]`. Raises ConfigError."""
    rest, colon, weight = text.rpartition(":")
    adapter, equals, name = (rest if colon else text).rpartition("=")
    try:
        importance = float(weight) if colon else 1.0
    except ValueError:
        importance = math.nan
    if not name or not 0 < importance < math.inf or (equals and not adapter):
        raise ConfigError(
            f"--label {text}: expected FIELD, ADAPTER=FIELD or ADAPTER=FIELD:IMPORTANCE with a number above 0, for example "
            "--label shoes10=shoe_kind:2"
        )
    return TaskLabel(field=name, adapter=adapter or None, importance=importance)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a search ends: after a number of trials, or minutes of trials. References are always tried."""

    evaluations: int | None = None
    minutes: float | None = None

    def is_spent(self, trials: int, seconds: float) -> bool:
        has_tried = self.evaluations is not None and trials >= self.evaluations
        return has_tried or (self.minutes is not None and seconds >= 60 * self.minutes)


@dataclass(frozen=True, kw_only=True)
class Search(LabelledInput):
    """The user's request for a search."""

    recipe: Recipe
    tasks: tuple[TaskLabel, ...]
    out: Path
    budget: Budget
    objective: Literal["worst", "mean"] = "worst"
    methods: tuple[str, ...] = ()  # empty: all methods that the adapters allow
    takes_best: bool = False  # write the best trial even if its lead over equal weights is within noise
    group: str | None = None
    seed: int = 0
    most_images: int = 10_000
    work: Path | None = None

    @property
    def work_folder(self) -> Path:
        """The folder for trials and pixels: the named one, or else beside the recipe that is written."""
        return self.work or self.out.with_name(f"{self.out.stem}.work")

    @property
    def evidence(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.evidence.json")

    @property
    def report(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.evidence.html")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The objective: accuracy on each task minus that of the task's own adapter alone, on the same splits."""

    kind: Literal["worst", "mean"]
    importance: dict[str, float]  # task → weight of the task in the objective
    alone: dict[str, list[float]]  # task → accuracies of its own adapter alone, by split

    def rank(self, per_split: dict[str, list[float]]) -> Rank:
        """The objective from the means over splits; the other objective decides between equal ones.

        In `worst`, importance multiplies losses only: otherwise a gain on an important task would be multiplied, and other
        tasks would become the worst.
        """
        return self._rank({task: mean(per_split[task]) - mean(alone) for task, alone in self.alone.items()})

    def by_split(self, per_split: dict[str, list[float]]) -> list[float]:
        """The objective in each split."""
        gains = {task: np.subtract(per_split[task], alone) for task, alone in self.alone.items()}
        splits = len(next(iter(self.alone.values())))
        return [self._rank({task: float(gain[split]) for task, gain in gains.items()})[0] for split in range(splits)]

    def _rank(self, gains: dict[str, float]) -> Rank:
        worst = min(gain * (self.importance[task] if gain < 0 else 1) for task, gain in gains.items())
        average = sum(gain * self.importance[task] for task, gain in gains.items()) / sum(self.importance.values())
        return (worst, average) if self.kind == "worst" else (average, worst)
