"""Compare encoders on seeded splits: accuracies by split, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_embed.errors import ConfigError
from lora_embed.evaluate.figures import BANK_SHARE, seeded_splits, verdict_of
from lora_embed.evaluate.records import Difference, Figure
from lora_embed.text import agree, number_of
from lora_embed.vectors.metrics import knn_accuracy, mean_interval

METRIC = "knn"  # the metric of the search; `lora-embed evaluate` has others

Labels = Mapping[str, NDArray[np.int64]]  # task → (n,) class, −1 where there is none
Spaces = Mapping[str, NDArray[np.float32]]  # encoder → vectors (n, d) of the same images


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which images are in the bank, (n,), for each of several seeded splits by group."""

    banks: tuple[NDArray[np.bool_], ...]

    @classmethod
    def of(cls, names: Sequence[str], count: int, seed: int) -> "Splits":
        """`count` splits of images whose groups these are."""
        return cls(banks=seeded_splits(names, count, seed))

    def accuracies(self, vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, ...]:
        """kNN accuracy in each split, over the images that have a label of the task."""
        labelled = labels >= 0
        return tuple(
            knn_accuracy(vectors[bank & labelled], labels[bank & labelled], vectors[~bank & labelled], labels[~bank & labelled])
            for bank in self.banks
        )


def refuse_thin(labels: Labels, splits: Splits, part: str) -> None:
    """Raises ConfigError if a split has no query of a task, or fewer than two of its classes in the bank."""
    for task, classes in labels.items():
        for bank in splits.banks:
            if len(set(classes[bank & (classes >= 0)].tolist())) < 2 or not (~bank & (classes >= 0)).any():
                images = int((classes >= 0).sum())
                raise ConfigError(
                    f"--label {task}: {number_of(images, 'image')} with this label {agree(images, 'is', 'are')} {part}, too "
                    "few to split into a bank of at least two classes and queries. Give more labelled images, or group them by "
                    "another field."
                )


def figures_of(spaces: Spaces, labels: Labels, splits: Splits) -> tuple[Figure, ...]:
    """kNN accuracy of all encoders on all tasks, on the same splits."""
    figures = []
    for task, classes in labels.items():
        for name, vectors in spaces.items():
            values = splits.accuracies(vectors, classes)
            mean, low, high = mean_interval(values, BANK_SHARE)
            figures.append(Figure(task=task, metric=METRIC, candidate=name, per_split=values, mean=mean, low=low, high=high))
    return tuple(figures)


def differences_of(figures: Sequence[Figure], pairs: Sequence[tuple[str, str]]) -> tuple[Difference, ...]:
    """The differences of (candidate, reference) pairs, on each task."""
    values = {(figure.task, figure.candidate): figure.per_split for figure in figures}
    differences = []
    for task in dict.fromkeys(figure.task for figure in figures):
        for candidate, reference in pairs:
            mean, low, high = mean_interval(np.subtract(values[task, candidate], values[task, reference]).tolist(), BANK_SHARE)
            differences.append(
                Difference(
                    task=task,
                    metric=METRIC,
                    candidate=candidate,
                    reference=reference,
                    mean=mean,
                    low=low,
                    high=high,
                    verdict=verdict_of(low, high),
                )
            )
    return tuple(differences)
