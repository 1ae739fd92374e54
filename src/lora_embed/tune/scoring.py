"""Try merges and score them on the tuning images, one after another, until the budget is spent."""

import hashlib
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_embed.config.models import Recipe
from lora_embed.errors import AdapterMismatch
from lora_embed.evaluate.figures import BANK_SHARE
from lora_embed.evaluate.records import Trial
from lora_embed.model.merge import METHODS, options_of
from lora_embed.model.refold import Refolder
from lora_embed.monitor.progress import say
from lora_embed.tune.goal import Goal, Search
from lora_embed.tune.holdout import Splits, refuse_thin
from lora_embed.tune.labelled import LabelledImages
from lora_embed.tune.propose import Point, Rank, equal, next_point, point_of, references, starts
from lora_embed.tune.trials import Exam, TrialLog, Tried
from lora_embed.vectors.metrics import mean_interval

TUNING_SPLITS = 20  # a trial's score is the mean over these; finding neighbours takes little time compared with embedding


class Scorer:
    """Scores recipes on the tuning images. Recipes that are in the log of trials are not scored again."""

    def __init__(
        self, search: Search, names: tuple[str, ...], refolder: Refolder, images: LabelledImages, rows: NDArray[np.int64]
    ) -> None:
        self.ask, self.names, self.refolder, self.images, self.rows = search, names, refolder, images, rows
        self.methods = _working(search, refolder)
        self.labels = {task: labels[rows] for task, labels in images.labels.items()}
        self._splits = Splits.of([images.names[row] for row in rows], TUNING_SPLITS, search.seed)
        refuse_thin(self.labels, self._splits, "for tuning")
        data = hashlib.sha256(f"{images.fingerprint} {rows.tolist()}".encode()).hexdigest()[:12]
        self._exam = Exam(data=data, seed=search.seed, splits=TUNING_SPLITS)
        self._log = TrialLog(search.work_folder / "trials.jsonl")
        self._points: dict[Point, Tried] = {}
        self.evaluated = 0

    def search(self) -> tuple[Trial, ...]:
        """Try merges until the budget is spent or nothing is left to try; references come first."""
        count, ask = len(self.names), self.ask
        first = list(dict.fromkeys([*references(count), *_written(ask.recipe, self.methods), *starts(count, self.methods)]))
        while True:
            spent = sum(tried.seconds for tried in self._points.values())
            if len(self._points) > count and ask.budget.is_spent(len(self._points), spent):
                break
            ranks = self._ranks() if len(self._points) > count else dict.fromkeys(self._points, (0.0, 0.0))
            point = next_point(ranks, first, self.methods, ask.seed)
            if point is None:
                say("no untried merge is left near the best ones")
                break
            self._points[point] = self._try(point)
            if len(self._points) > count:
                self._say_last(point)
        return self._trials()

    def goal(self) -> Goal:
        """The objective, whose values need the trials of the references."""
        alone = self._alone()
        return Goal(
            kind=self.ask.objective,
            importance={task.field: task.importance for task in self.ask.tasks},
            alone={task: alone[name].per_split[task] for task, name in self.own().items()},
        )

    def own(self) -> dict[str, str]:
        """Task → its own adapter: the one that the user named, or the single adapter that is best at it."""
        scores = {name: tried.scores for name, tried in self._alone().items()}
        return {
            task.field: task.adapter or max(self.names, key=lambda name: scores[name][task.field]) for task in self.ask.tasks
        }

    def winner(self) -> Recipe:
        """The best trial's recipe if its lead over equal weights is significant, else that of equal weights.

        Among tens of trials on hundreds of images, one leads by chance. A lead counts if its paired 95 % interval over the
        splits is above 0, or in any case with `takes_best`.
        """
        is_ahead = self.ask.takes_best or self.lead()[1] > 0
        return self.best() if is_ahead else _without_zeros(self.recipe(equal(len(self.names))))

    def best(self) -> Recipe:
        """The recipe of the best trial (the earliest of equal ones), without adapters at weight 0."""
        return _without_zeros(self.recipe(self._best()))

    def lead(self) -> tuple[float, float, float]:
        """The best trial's objective minus that of equal weights, by split: mean and 95 % interval."""
        goal = self.goal()
        best, even = (goal.by_split(self._points[point].per_split) for point in (self._best(), equal(len(self.names))))
        return mean_interval(np.subtract(best, even).tolist(), BANK_SHARE)

    def references(self) -> dict[str, Recipe]:
        """The recipes that the winner is compared with, by name."""
        alone = self.ask.recipe.model_copy(update={"adapters": (), "merge_method": "none", "merge_options": {}})
        points = zip([*self.names, "equal"], references(len(self.names)), strict=True)
        return {"base": alone} | {name: self.recipe(point) for name, point in points} | {"best tried": self.best()}

    def recipe(self, point: Point) -> Recipe:
        """The user's recipe with a point's method, weights and options."""
        specs = zip(self.ask.recipe.adapters, point.weights, strict=True)
        return self.ask.recipe.model_copy(
            update={
                "adapters": tuple(spec.model_copy(update={"weight": weight}) for spec, weight in specs),
                "merge_method": point.method,
                "merge_options": dict(point.options),
            }
        )

    def about(self) -> dict[str, Any]:
        """The settings of the search, and the scores of its best trial."""
        goal, best = self.goal(), self._best()
        return {
            "objective": goal.kind,
            "importance": goal.importance,
            "own": {task: {"adapter": name, "score": float(np.mean(goal.alone[task]))} for task, name in self.own().items()},
            "budget": asdict(self.ask.budget),
            "seed": self.ask.seed,
            "methods": self.methods,
            "group": self.ask.group,
            "images": len(self.rows),
            "splits": TUNING_SPLITS,
            "best_scores": self._points[best].scores,
            "lead": dict(zip(("mean", "low", "high"), self.lead(), strict=True)),
            "evaluated_now": self.evaluated,
        }

    def _try(self, point: Point) -> Tried:
        started = time.perf_counter()
        recipe_id = self.refolder.identify(recipe := self.recipe(point))
        if earlier := self._log.find(recipe_id, self._exam):
            return earlier
        self.refolder.fold(recipe)
        vectors = self.refolder.embed(self.images.pixels, self.rows)
        figures = {task: list(self._splits.accuracies(vectors, labels)) for task, labels in self.labels.items()}
        tried = Tried(recipe_id=recipe_id, exam=self._exam, per_split=figures, seconds=time.perf_counter() - started)
        self._log.add(tried)
        self.evaluated += 1
        return tried

    def _alone(self) -> dict[str, Tried]:
        points = zip(self.names, references(len(self.names)), strict=False)
        return {name: self._points[point] for name, point in points}

    def _best(self) -> Point:
        ranks = self._ranks()
        return max(ranks, key=ranks.__getitem__)

    def _ranks(self) -> dict[Point, Rank]:
        goal = self.goal()
        return {point: goal.rank(tried.per_split) for point, tried in self._points.items()}

    def _trials(self) -> tuple[Trial, ...]:
        ranks = self._ranks()
        return tuple(
            Trial(
                number=number,
                method=point.method,
                weights=dict(zip(self.names, point.weights, strict=True)),
                options=dict(point.options),
                scores=tried.scores,
                objective=ranks[point][0],
                seconds=tried.seconds,
            )
            for number, (point, tried) in enumerate(self._points.items(), 1)
        )

    def _say_last(self, point: Point) -> None:
        ranks, tried = self._ranks(), self._points[point]
        weights = "/".join(f"{weight:g}" for weight in point.weights)
        scores = ", ".join(f"{task} {100 * score:.1f}" for task, score in tried.scores.items())
        mark = " ← best so far" if self._best() == point else ""
        say(
            f"{len(self._points)}: {point.method} {weights}{shown_options(dict(point.options))}: {scores}, "
            f"{self.ask.objective} {100 * ranks[point][0]:+.2f}, {tried.seconds:.1f} s{mark}"
        )


def shown_options(options: dict[str, Any]) -> str:
    """Options as text, to follow the weights."""
    return "".join(f", {name} {value}" for name, value in options.items())


def _working(search: Search, refolder: Refolder) -> tuple[str, ...]:
    """The methods to try: those that the user named, or all that can merge these adapters.

    Raises AdapterMismatch if a method that the user named cannot merge them.
    """
    working = []
    for method in search.methods or tuple(METHODS):
        if method == "linear":  # the only method that some adapters do not allow; folding fails at the first weight
            try:
                refolder.fold(search.recipe.model_copy(update={"merge_method": method, "merge_options": {}}))
            except AdapterMismatch as error:
                if search.methods:
                    raise
                say(f"merge method linear is not tried: {error}")
                continue
        working.append(method)
    return tuple(working)


def _written(recipe: Recipe, methods: tuple[str, ...]) -> list[Point]:
    """The merge of the user's recipe, if its method is searched."""
    if recipe.merge_method not in methods:
        return []
    all_options = options_of(recipe.merge_method, recipe.merge_options)
    options = {name: all_options[name] for name in recipe.merge_options}
    return [point_of(recipe.merge_method, tuple(spec.weight for spec in recipe.adapters), options)]


def _without_zeros(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"adapters": tuple(spec for spec in recipe.adapters if spec.weight)})
