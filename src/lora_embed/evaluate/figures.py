"""Compute figures with intervals from vectors and labels: metrics, differences, changes of classes and single queries."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lora_embed.errors import ConfigError
from lora_embed.evaluate.records import (
    METRICS,
    ClassChange,
    Difference,
    Figure,
    Neighbour,
    QueryChange,
    Relation,
    Retention,
    Task,
)
from lora_embed.text import number_of
from lora_embed.vectors.cka import linear_cka
from lora_embed.vectors.metrics import cluster_nmi, mean_interval, probe, score_interval, split_by_name
from lora_embed.vectors.rank import Ranked, rank, vote

BANK_SHARE = 2 / 3
MOST_CHANGED = 12  # queries that are shown for a task and a candidate
SIDES = {"bank": True, "train": True} | dict.fromkeys(("query", "test", "val", "valid", "validation", "dev", "eval"), False)

_WHOLE_NUMBER = re.compile(r"-?\d{1,600}")  # Python may refuse to read one of more than 640 digits

Mask = NDArray[np.bool_]
Classes = NDArray[np.int64]
Verdict = Literal["better", "worse", "within noise"]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """n images, their classes by task, and which images are in the bank of each split."""

    ids: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]  # task → names
    labels: Mapping[str, Classes]  # task → (n,) class, −1 for none
    groups: Classes  # (n,) images of one group are on one side of each split
    banks: tuple[Mask, ...]  # one a split
    bank_share: float | None = BANK_SHARE  # None: the split is the user's own

    def sides(self, task: str, split: int) -> tuple[Classes, Classes]:
        """Rows of the bank and of the queries."""
        has, bank = self.labels[task] >= 0, self.banks[split]
        return np.flatnonzero(has & bank), np.flatnonzero(has & ~bank)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One candidate's scores on one task; lists have one entry per split."""

    scores: dict[str, list[NDArray[np.float64]]]  # metric → score of each query (m,); nmi has one value (1,)
    predicted: list[Classes]  # by kNN
    first: Ranked  # of the first split


def own_split(values: Sequence[str | None], field: str) -> tuple[Mask, ...]:
    """The user's own split, by the values of a field. Raises ConfigError for an unknown value."""
    unknown = sorted({str(value) for value in values} - set(SIDES))
    if unknown:
        raise ConfigError(
            f"--split {field}: holds {unknown[0]!r}, expected bank or train for one side, and query, "
            "test, val or dev for the other"
        )
    return (np.array([SIDES[str(value)] for value in values]),)


def seeded_splits(names: Sequence[str], splits: int, seed: int) -> tuple[Mask, ...]:
    """Splits with two thirds of the names in the bank; each split and each seed draws other names."""
    return tuple(split_by_name(names, BANK_SHARE, seed * splits + number) for number in range(splits))


def classes_of(values: Sequence[str | None]) -> tuple[tuple[str, ...], Classes]:
    """Names of classes, and the class of each value (−1 for none).

    The names are sorted by number if all are whole numbers (equal ones such as 1 and 01 by name), else by name.
    """
    distinct = {value for value in values if value is not None}
    are_numbers = all(map(_WHOLE_NUMBER.fullmatch, distinct))
    names = tuple(sorted(distinct, key=lambda name: (int(name) if are_numbers else 0, name)))
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([-1 if value is None else place[value] for value in values], np.int64)


def tasks_of(classes: Mapping[str, tuple[str, ...]], labels: Mapping[str, Classes]) -> tuple[Task, ...]:
    """Each task with its classes and how many images have a label of it (−1: none)."""
    return tuple(
        Task(name=task, label=task, classes=classes[task], images=int((of_task >= 0).sum())) for task, of_task in labels.items()
    )


def check_sides(labelled: Labelled) -> None:
    """Raises ConfigError for a task that cannot be judged: with fewer than two classes, or no query in a split."""
    for task, names in labelled.classes.items():
        if len(names) < 2:
            problem = f"all of class {names[0]!r}" if names else "none of them labelled"
            raise ConfigError(
                f"--label {task}: {number_of(len(labelled.ids), 'image')}, {problem}; expected two classes or more"
            )
        for split in range(len(labelled.banks)):
            bank, queries = labelled.sides(task, split)
            if not len(queries) or len(np.unique(labelled.labels[task][bank])) < 2:
                known = number_of(len(np.unique(labelled.labels[task][bank])), "class")
                raise ConfigError(
                    f"--label {task}: split {split + 1} has {number_of(len(bank), 'labelled image')} of {known} in its bank "
                    f"and {number_of(len(queries), 'query')}; expected "
                    "two classes or more and one query or more. Label more images, or make groups smaller."
                )


def score(labelled: Labelled, vectors: NDArray[np.float32]) -> dict[str, Scored]:
    """All metrics of one candidate's vectors (n, d), by task."""
    return {task: _score_task(labelled, task, vectors) for task in labelled.labels}


def _score_task(labelled: Labelled, task: str, vectors: NDArray[np.float32]) -> Scored:
    labels = labelled.labels[task]
    scores: dict[str, list[NDArray[np.float64]]] = {metric: [] for metric in METRICS}
    predicted: list[Classes] = []
    ranks: list[Ranked] = []
    for split in range(len(labelled.banks)):
        bank, queries = labelled.sides(task, split)
        sides = (vectors[bank], labels[bank], vectors[queries])
        ranked = rank(*sides, labels[queries])
        same = labels[bank][ranked.nearest] == labels[queries][:, None]
        predicted.append(vote(labels[bank][ranked.nearest], ranked.cosines))
        by_metric = {
            "knn": predicted[-1] == labels[queries],
            "probe": probe(*sides) == labels[queries],
            "recall@1": same[:, :1].any(axis=1),
            "recall@5": same[:, :5].any(axis=1),
            "map": ranked.precision,
            "nmi": np.array([cluster_nmi(vectors[queries], labels[queries])]),
        }
        for metric, values in by_metric.items():
            scores[metric].append(values.astype(np.float64))
        ranks += [ranked] if not ranks else []
    return Scored(scores=scores, predicted=predicted, first=ranks[0])


def figures_of(labelled: Labelled, task: str, name: str, scored: Scored) -> list[Figure]:
    """All metrics of one candidate on one task, each with its interval."""
    figures = []
    for metric in METRICS:
        per_split = tuple(float(scores.mean()) for scores in scored.scores[metric])
        mean, low, high = _interval(labelled, task, metric, scored.scores[metric])
        low, high = max(low, 0.0), min(high, 1.0)
        figures.append(Figure(task=task, metric=metric, candidate=name, per_split=per_split, mean=mean, low=low, high=high))
    return figures


def differences_of(labelled: Labelled, task: str, pair: tuple[str, str], scored: Scored, reference: Scored) -> list[Difference]:
    """One candidate's metrics minus the reference's, paired by split or, for the user's own split, by query."""
    results = []
    for metric in METRICS:
        differences = [a - b for a, b in zip(scored.scores[metric], reference.scores[metric], strict=True)]
        mean, low, high = _interval(labelled, task, metric, differences, least=-1.0)
        names = {"task": task, "metric": metric, "candidate": pair[0], "reference": pair[1]}
        results.append(Difference(**names, mean=mean, low=low, high=high, verdict=verdict_of(low, high)))
    return results


def verdict_of(low: float, high: float) -> Verdict:
    """The verdict on a difference, from its interval. One without a width says nothing of noise, and decides nothing."""
    if low == high:
        return "within noise"
    return "better" if low > 0 else "worse" if high < 0 else "within noise"


def _interval(
    labelled: Labelled, task: str, metric: str, scores: list[NDArray[np.float64]], least: float = 0.0
) -> tuple[float, float, float]:
    """Mean and 95 % interval: over splits, or over the queries of the user's own split (nmi: all possible values)."""
    if labelled.bank_share is not None:
        return mean_interval([float(of_split.mean()) for of_split in scores], labelled.bank_share)
    if metric == "nmi":
        return float(scores[0][0]), least, 1.0
    return score_interval(scores[0], labelled.groups[labelled.sides(task, 0)[1]])


def class_changes(labelled: Labelled, task: str, pair: tuple[str, str], scored: Scored, reference: Scored) -> list[ClassChange]:
    """Share of each class's queries that kNN classifies correctly, over all splits, with candidate and reference."""
    labels = np.concatenate([labelled.labels[task][labelled.sides(task, split)[1]] for split in range(len(labelled.banks))])
    after, before = (np.concatenate(scores.predicted) == labels for scores in (scored, reference))
    changes = []
    for number, name in enumerate(labelled.classes[task]):
        has_class = labels == number
        images = int((labelled.labels[task] == number).sum())
        shares = [float(right[has_class].mean()) if has_class.any() else 0.0 for right in (before, after)]
        changes.append(
            ClassChange(
                task=task, candidate=pair[0], reference=pair[1], label=name, images=images, before=shares[0], after=shares[1]
            )
        )
    return changes


def query_changes(labelled: Labelled, task: str, pair: tuple[str, str], scored: Scored, reference: Scored) -> list[QueryChange]:
    """Queries of the first split whose nearest images differ most between both (Jaccard), the most changed first."""
    bank, queries = labelled.sides(task, 0)
    overlap = [_jaccard(*rows) for rows in zip(scored.first.nearest, reference.first.nearest, strict=True)]
    order = sorted(range(len(queries)), key=lambda row: (overlap[row], labelled.ids[queries[row]]))
    changed = [row for row in order if overlap[row] < 1][:MOST_CHANGED]
    return [
        QueryChange(
            task=task,
            candidate=pair[0],
            reference=pair[1],
            id=labelled.ids[queries[row]],
            label=_label(labelled, task, int(queries[row])),
            before=_neighbours(labelled, task, reference.first, bank, row),
            after=_neighbours(labelled, task, scored.first, bank, row),
        )
        for row in changed
    ]


def _jaccard(first: Classes, second: Classes) -> float:
    shared = len(np.intersect1d(first, second))
    return shared / (len(first) + len(second) - shared)


def _neighbours(labelled: Labelled, task: str, ranked: Ranked, bank: Classes, row: int) -> tuple[Neighbour, ...]:
    places = [int(place) for place in bank[ranked.nearest[row]]]
    return tuple(
        Neighbour(id=labelled.ids[place], label=_label(labelled, task, place), cosine=round(float(cosine), 4))
        for place, cosine in zip(places, ranked.cosines[row], strict=True)
    )


def _label(labelled: Labelled, task: str, row: int) -> str:
    return labelled.classes[task][int(labelled.labels[task][row])]


def head_order(names: tuple[str, ...], outputs: int, ordered_names: Sequence[str] | None) -> list[str] | None:
    """Class names in the order of a head's outputs: as given, or the labels if they are numbers 0 … n−1 or n names.

    None if they do not fit: then the head is not for these classes.
    """
    if ordered_names is not None:
        return list(ordered_names) if len(ordered_names) == outputs and set(names) <= set(ordered_names) else None
    numbers = [str(number) for number in range(outputs)]
    if names and set(names) <= set(numbers) and numbers[-1] in names:
        return numbers
    return list(names) if len(names) == outputs else None


def right_by_head(
    labelled: Labelled, task: str, order: Sequence[str], outputs: NDArray[np.int32]
) -> tuple[Classes, NDArray[np.float64]]:
    """Rows that a head is judged on, and for each 1 if the head's largest output is its class, else 0.

    A head is judged on all labelled images, since it learns nothing from the bank, or on the queries of the user's own split.
    """
    labels = labelled.labels[task]
    rows = np.flatnonzero(labels >= 0) if labelled.bank_share is not None else labelled.sides(task, 0)[1]
    place = np.array([list(order).index(name) for name in labelled.classes[task]])
    return rows, (outputs[rows] == place[labels[rows]]).astype(np.float64)


def retention_of(
    labelled: Labelled,
    names: tuple[str, str, str],
    order: Sequence[str],
    on_adapter: NDArray[np.int32],
    on_candidate: NDArray[np.int32],
) -> Retention:
    """Accuracy of an adapter's head on its own adapter and on a candidate; `names` are task, adapter and candidate."""
    task, adapter, candidate = names
    rows, adapter_right = right_by_head(labelled, task, order, on_adapter)
    candidate_right = right_by_head(labelled, task, order, on_candidate)[1]
    _, low, high = score_interval(candidate_right - adapter_right, labelled.groups[rows])
    shares = {"own": float(adapter_right.mean()), "kept": float(candidate_right.mean())}
    return Retention(task=task, adapter=adapter, candidate=candidate, **shares, low=low, high=high, images=len(rows))


def cka_relations(spaces: Mapping[str, NDArray[np.float32]]) -> tuple[Relation, ...]:
    """CKA of each pair of encoders; the vectors must be of the same images in the same order."""
    return tuple(
        Relation(kind="cka", one=first, other=second, layer=None, value=linear_cka(spaces[first], spaces[second]))
        for first, second in itertools.combinations(spaces, 2)
    )
