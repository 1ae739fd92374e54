"""`lora-embed tune`: search weights and method of a merge on one half of the labelled images, judge it on the other."""

import importlib.util
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import yaml

from lora_embed.config.models import Recipe
from lora_embed.errors import ConfigError
from lora_embed.evaluate.page.evaluation import OfSearch, write_report
from lora_embed.evaluate.records import Candidate, Difference, Evaluation
from lora_embed.evaluate.verdict import in_points, in_short, warnings_of
from lora_embed.installed import how_to_install
from lora_embed.model.ingredients import gather
from lora_embed.model.merge import METHODS
from lora_embed.model.refold import BATCH, Refolder
from lora_embed.monitor.progress import say
from lora_embed.store import local
from lora_embed.store.aside import file_aside
from lora_embed.text import in_lines, number_of
from lora_embed.tune.goal import Search
from lora_embed.tune.held import BEST, EQUAL, TUNED, Held, Rows
from lora_embed.tune.labelled import LabelledImages, Wanted, read_labelled
from lora_embed.tune.scoring import Scorer, shown_options
from lora_embed.tune.trials import alone_in
from lora_embed.vectors.metrics import split_by_name

LEAST_ADAPTERS, MOST_ADAPTERS = 2, 5
TUNING_SHARE = 0.5  # share of the groups for the search; the others are held back
LEAST_TRIALS, LEAST_IMAGES = 24, 200  # trials that a budget in minutes must allow; images are reduced for it, but no further


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The winner and its evidence."""

    out: str
    recipe: Recipe
    evaluation: Evaluation
    tuning: dict[str, Any]  # settings and results of the search that an Evaluation has no field for
    own: dict[str, str]  # task → its adapter's name

    def as_json(self) -> dict[str, Any]:
        """The Evaluation's fields, and `tuning`."""
        return asdict(self.evaluation) | {"tuning": self.tuning | {"recipe": self.out}}

    def describe(self) -> str:
        """For a person: what was found, in lines."""
        return in_lines(self.says)

    @property
    def says(self) -> tuple[str, ...]:
        """The winner, and its figures on images that the search did not use, in percentage points: one line each.

        A line that begins with spaces belongs to the one above it.
        """
        winner, trials, splits = self._candidate(TUNED), len(self.evaluation.trials), self.evaluation.splits
        weights = ", ".join(f"{name} {weight:g}" for name, weight in winner.weights.items())
        lead = _points(*(self.tuning["lead"][name] for name in ("mean", "low", "high")))
        is_best = winner.space_id == self._candidate(BEST).space_id
        tried = number_of(trials, "trial")
        choice = f"the best of {tried}" if is_best else f"chosen because none of {tried} is better beyond noise"
        lines = [
            f"{self.out}: {winner.method} of {weights}{shown_options(winner.options)}, {choice}",
            f"Lead of the best trial over equal weights in the {self.tuning['objective']} gain, on {self.tuning['images']:,} "
            f"images: {lead}",
            f"On {self.tuning['held_back_images']:,} images that the search did not use, kNN accuracy in percent, mean and "
            f"95 % interval of {number_of(splits, 'split')}:",
        ]
        for task, adapter_name in self.own.items():
            figures = [figure for figure in self.evaluation.figures if figure.task == task]
            lines.append(f"  task {task}: " + " · ".join(f"{figure.candidate} {100 * figure.mean:.1f}" for figure in figures))
            for reference in (EQUAL, adapter_name):
                (difference,) = (
                    row for row in self.evaluation.differences
                    if (row.task, row.candidate, row.reference) == (task, TUNED, reference)
                )  # fmt: skip
                lines.append(f"    on task {task}, tuned minus {reference}: {_verdict(difference)}")
        notes = [*in_short(self.evaluation, self.own), *(f"Warning: {warning}" for warning in warnings_of(self.evaluation))]
        return (*lines, *map(str, notes))

    def _candidate(self, name: str) -> Candidate:
        return next(candidate for candidate in self.evaluation.candidates if candidate.name == name)


def tune(search: Search) -> Tuned:
    """Search, judge the winner, write `out` and the evidence beside it. The same search continues where it was stopped.

    Raises ConfigError, and the errors of reading shards and building encoders.
    """
    names = _checked(search)
    refolder = Refolder(gather(search.recipe), "cuda" if torch.cuda.is_available() else "cpu")
    with alone_in(search.work_folder):
        started = time.perf_counter()
        selection = Wanted(
            fields=tuple(task.field for task in search.tasks), group=search.group, most=search.most_images, seed=search.seed
        )
        preprocessing = refolder.encoder.description.preprocessing
        images = read_labelled(search, selection, preprocessing, search.work_folder)
        decoded = time.perf_counter()
        in_tuning = split_by_name(images.names, TUNING_SHARE, search.seed)
        holdout = Held(search, refolder, images, np.flatnonzero(~in_tuning))
        scorer = Scorer(search, names, refolder, images, _chosen(search, refolder, images, np.flatnonzero(in_tuning)))
        trials = scorer.search()
        searched = time.perf_counter()
        recipe = scorer.winner()
        for name, candidate in (scorer.references() | {TUNED: recipe}).items():
            holdout.add(name, candidate)
        holdout.prove(recipe)
        seconds = {"decode": decoded - started, "search": searched - decoded, "compare": time.perf_counter() - searched}
        own = scorer.own()
        tuned = Tuned(
            out=str(search.out),
            recipe=recipe,
            evaluation=holdout.evaluation(trials, own, seconds),
            tuning=scorer.about() | {"held_back_images": holdout.count},
            own=own,
        )
        _write(search, tuned)
    return tuned


def _points(mean: float, low: float, high: float) -> str:
    return f"{in_points(mean)} ({in_points(low)} … {in_points(high)})"


def _verdict(difference: Difference) -> str:
    """A difference with its verdict, unless it has no interval to judge it by."""
    if difference.has_interval:
        return f"{_points(difference.mean, difference.low, difference.high)}, {difference.verdict}"
    return f"{in_points(difference.mean)}, no interval" if difference.mean else "no difference"


def _checked(search: Search) -> tuple[str, ...]:
    """Names of the adapters. Raises ConfigError for what is wrong in the request itself."""
    names = tuple(search.recipe.adapter_names)
    if not LEAST_ADAPTERS <= len(names) <= MOST_ADAPTERS:
        raise ConfigError(
            f"the recipe names {number_of(len(names), 'adapter')}, but tune needs {LEAST_ADAPTERS} to {MOST_ADAPTERS}. Change "
            "the recipe."
        )
    if not search.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {search.out}: the folder {search.out.absolute().parent} does not exist. Make it first.")
    for task in search.tasks:
        if task.adapter is not None and task.adapter not in names:
            raise ConfigError(
                f"--label {task.adapter}={task.field}: the recipe's adapters are {', '.join(names)}. Name one of them."
            )
    if search.group == "":
        raise ConfigError("--group is empty, expected a field of the samples. Name it, or leave the option out.")
    if search.budget.minutes is not None and not 0 <= search.budget.minutes < math.inf:
        raise ConfigError(f"--minutes is {search.budget.minutes:g}, expected a number of minutes, 0 or more")
    fields = [task.field for task in search.tasks]
    if len(set(fields)) != len(fields):
        raise ConfigError(f"--label names {max(fields, key=fields.count)!r} twice. Name each field once.")
    unknown = sorted(set(search.methods) - set(METHODS))
    if unknown:
        raise ConfigError(f"--methods: {unknown[0]!r} is not a method with weights; choose from {', '.join(METHODS)}")
    if search.budget.evaluations is not None and search.budget.evaluations <= len(names):
        raise ConfigError(
            f"--evaluations is {search.budget.evaluations}, expected {len(names) + 1} or more, because each adapter alone and "
            "equal weights are always tried."
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"scikit-learn is not installed, but tune needs it. Install it: {how_to_install('evaluation')}")
    return names


def _chosen(search: Search, refolder: Refolder, images: LabelledImages, rows: Rows) -> Rows:
    """The tuning images, or fewer if a budget in minutes would allow too few trials; chosen once for a work folder."""
    minutes = search.budget.minutes
    if minutes is None or minutes == 0 or len(rows) <= LEAST_IMAGES:  # 0 tries the references alone
        return rows
    pinned = search.work_folder / f"subset-{images.fingerprint}-{minutes:g}-{search.seed}.json"
    if not pinned.is_file():  # kept, since another speed would give other images, and no earlier trial would count
        measured = rows[: 2 * BATCH[refolder.encoder.device.type]]
        refolder.embed(images.pixels, measured)  # once before the measurement, because the first batches take longer
        started = time.perf_counter()
        refolder.embed(images.pixels, measured)
        affordable = len(measured) / (time.perf_counter() - started) * 60 * minutes / LEAST_TRIALS
        local.replace(
            search.work_folder, pinned, json.dumps(max(LEAST_IMAGES, round(min(affordable, search.most_images)))).encode()
        )
    most = int(json.loads(pinned.read_bytes()))
    if most >= len(rows):
        return rows
    names = [images.names[row] for row in rows]
    say(
        f"the search uses about {most:,} of {len(rows):,} tuning images, so that it can try {LEAST_TRIALS} merges in "
        f"{number_of(minutes, 'minute')}"
    )
    return rows[split_by_name(names, most / len(rows), search.seed)]


def _write(search: Search, tuned: Tuned) -> None:
    """Write the recipe with a summary of the evidence, and the full evidence beside it."""
    body = yaml.safe_dump(tuned.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    notes = [
        f"# Written by `lora-embed tune`; all figures: {search.evidence.name}",
        *(f"# {line}" for line in tuned.describe().splitlines()),
    ]
    with file_aside(search.evidence) as aside:
        aside.write_text(json.dumps(tuned.as_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    write_report(tuned.evaluation, search.report, OfSearch(says=tuned.says, images=tuned.tuning["images"]))
    with file_aside(search.out) as aside:
        aside.write_text("\n".join(notes) + "\n" + body, encoding="utf-8")
