"""Checks before a version: figures of vectors against limits, and whether a new encoder is worth a full pass.

The default limits were chosen by measuring a real ViT-S/14 on 600 real images: 23 good updates (merges of the demo's two
adapters by other recipes, copies of them with noise) and 15 that were broken on purpose, each against the encoder before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_embed.vectors.health import Figures, Vectors
from lora_embed.vectors.metrics import knn_accuracy, split_by_name
from lora_embed.vectors.rows import unit

MIN_ROWS = 64  # of fewer vectors the figures say little, and no gate is made of them
SPLITS = 5
BANK_SHARE = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check: a figure, its limit, and a sentence for a person. A figure that is not a number never holds."""

    name: str
    value: float
    limit: float
    direction: Literal["at most", "at least"]
    says: str

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For a manifest: JSON's own types, and None for a figure that is not finite."""
        value = self.value if isfinite(self.value) else None
        return asdict(self) | {"value": value, "holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the gates, and what they leave on both sides.

    Good and bad as measured: bad are adapters at weights −1, 2, 5 and 20, the patch embedding at a hundredth and a tenth,
    the late blocks at 1/100 and 30 times, a large constant added to all vectors, pixels from 0 to 255. All good ones pass
    and all of these are stopped but one, the patch embedding at a tenth (overlap 0.39, accuracy −0.06). Processors that
    are wrong by less (mean and deviation swapped, not normalised, not cropped) move the figures no more than a good
    update does (overlap 0.55 to 0.71, accuracy −0.02 to 0.01): only `processor` sees them.
    """

    unusable: float = 0.001  # share of rows; all measured: 0. An encoder may give zeros for a blank image
    constant: float = 0.05  # share of dimensions, beyond the old share; all measured: 0
    duplicates: float = 0.05  # share of rows, beyond the old share; all measured: 0. Some per cent of a set may be blank
    norm_factor: float = 2.0  # median length against the old one of the same space; one class against all: up to 1.25
    norm_tail: float = 10.0  # lengths of the 1 % against the median; good ≤ 1.9, bad ≤ 2.2: it is for a set half broken
    rank: float = 0.6  # of the old rank, in another space; good ≥ 0.86, bad ≤ 0.48 for those that it is to stop
    rank_floor: float = 1.5  # 1 is a line; the base has 3.4, tiny random models 2.5
    spread: float = 0.2  # of the old spread, in another space; good ≥ 0.50, bad ≤ 0.07 for those that it is to stop
    spread_floor: float = 1e-3  # good ≥ 0.13, bad 3e-6 to 1e-2; the rounding of bfloat16 alone makes 3e-5
    overlap: float = 0.35  # beyond chance; good ≥ 0.40, most of the bad ≤ 0.27
    overlap_floor: float = 0.1  # where labels show a gain; from the base to good 0.14 to 0.19, to adapters at 5, 20 ≤ 0.03
    accuracy: float = 0.05  # largest loss, beyond two standard errors; good ≤ 0.05, bad ≥ 0.10


def health_gates(new: Figures, before: Figures | None, *, same_space: bool, limits: Limits) -> list[Gate]:
    """`unusable`, `constant`, `duplicates`, `norms`, and for a new space `collapsed` and `spread`; of few rows, none.

    In the space of the version before, `new` may be the new rows alone. A night's images may be all of one kind (one class
    of the demo's has a fifth of the spread of all), so rank and spread are judged only where the encoder is another.
    """
    if new.count < MIN_ROWS:
        return []
    gates = [_unusable(new, limits), _constant(new, before, limits), _duplicates(new, before, limits)]
    if same_space and before is not None:
        return [*gates, _norms_as_before(new, before, limits)]
    return [*gates, _norms_alone(new, limits), _collapsed(new, before, limits), _spread(new, before, limits)]


def _unusable(new: Figures, limits: Limits) -> Gate:
    says = f"{new.unusable:.2%} of the vectors are zero or not finite, and have no neighbours"
    return Gate(name="unusable", value=new.unusable, limit=limits.unusable, direction="at most", says=says)


def _constant(new: Figures, before: Figures | None, limits: Limits) -> Gate:
    limit = limits.constant + (before.constant if before is not None else 0.0)
    says = f"{new.constant:.1%} of the dimensions have the same value in all vectors"
    return Gate(name="constant", value=new.constant, limit=limit, direction="at most", says=says)


def _duplicates(new: Figures, before: Figures | None, limits: Limits) -> Gate:
    limit = limits.duplicates + (before.duplicates if before is not None else 0.0)
    says = f"{new.duplicates:.2%} of the images have exactly the vector of another image whose bytes differ"
    return Gate(name="duplicates", value=new.duplicates, limit=limit, direction="at most", says=says)


def _norms_as_before(new: Figures, before: Figures, limits: Limits) -> Gate:
    median, was = new.norms[1], before.norms[1]
    says = f"the median length of a vector is {median:.4g}, and was {was:.4g} in the version before, of the same encoder"
    value = max(_ratio(median, was), _ratio(was, median))
    return Gate(name="norms", value=value, limit=limits.norm_factor, direction="at most", says=says)


def _norms_alone(new: Figures, limits: Limits) -> Gate:
    low, median, high = new.norms
    says = f"98 % of the vectors have lengths from {low:.4g} to {high:.4g}, with the median at {median:.4g}"
    value = max(_ratio(high, median), _ratio(median, low))
    return Gate(name="norms", value=value, limit=limits.norm_tail, direction="at most", says=says)


def _collapsed(new: Figures, before: Figures | None, limits: Limits) -> Gate:
    was = f", those of the version before over {before.rank:.1f}" if before is not None else ""
    says = f"the vectors spread over {new.rank:.1f} directions{was}"
    limit = _least(limits.rank_floor, limits.rank, before.rank if before is not None else None)
    return Gate(name="collapsed", value=new.rank, limit=limit, direction="at least", says=says)


def _spread(new: Figures, before: Figures | None, limits: Limits) -> Gate:
    was = f", and was {before.spread:.2g} in the version before" if before is not None else ""
    says = f"the mean cosine distance of two vectors is {new.spread:.2g}{was}"
    limit = _least(limits.spread_floor, limits.spread, before.spread if before is not None else None)
    return Gate(name="spread", value=new.spread, limit=limit, direction="at least", says=says)


def _least(floor: float, share: float, before: float | None) -> float:
    """The floor or a share of what was, whichever is more, and never more than what was: that has been published."""
    return floor if before is None else min(max(floor, share * before), before)


def processor(before: Mapping[str, Any], new: Mapping[str, Any]) -> Gate:
    """What an encoder does to pixels is the same as in the version before, by the two descriptions' `preprocessing`.

    A wrong processor may move vectors no more than a good update does, and is plain to see here. The figure is the number
    of settings that differ.
    """
    before, new = (json.loads(json.dumps(dict(settings))) for settings in (before, new))  # tuples are lists in a file
    changed = sorted(key for key in before.keys() | new.keys() if before.get(key) != new.get(key))
    named = "; ".join(f"{key} was {before.get(key)} and is {new.get(key)}" for key in changed)
    says = f"images are prepared in another way: {named}" if changed else "images are prepared as before"
    return Gate(name="processor", value=float(len(changed)), limit=0.0, direction="at most", says=says)


@dataclass(frozen=True, kw_only=True)
class AccuracyChange:
    """kNN accuracy of two spaces on the same labels and splits; `error` is the standard error of new − old."""

    old: float
    new: float
    error: float
    rows: int

    @property
    def change(self) -> float:
        return self.new - self.old


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two spaces on the same images: the share of neighbours that stay, plain and beyond chance, and accuracies."""

    rows: int
    k: int
    shared: float
    overlap: float
    accuracy: AccuracyChange | None = None  # where labels are carried that say something


def compare(
    ids: Sequence[str], old: Vectors, new: Vectors, labels: Sequence[str | int | None] | None = None, *, k: int = 10
) -> Comparison | None:
    """Compare two spaces on a sample of a few thousand images: (n, d) and (n, e), rows aligned; None for too few."""
    _check_aligned(old, new)
    if len(ids) < MIN_ROWS:
        return None
    shared = neighbour_overlap(old, new, k)
    chance = k / (len(ids) - 1)
    accuracy = accuracy_change(ids, old, new, labels, k=k) if labels is not None else None
    return Comparison(rows=len(ids), k=k, shared=shared, overlap=(shared - chance) / (1 - chance), accuracy=accuracy)


def neighbour_overlap(old: NDArray[Any], new: NDArray[Any], k: int = 10) -> float:
    """Mean share of a row's k nearest rows by cosine, itself left out, that are the same in both spaces.

    It falls to k / (n − 1) by chance and so depends on the rows n; `compare` takes that off, as Cohen's kappa does (1960):
    then 100, 300, 600 and 1,172 real images say 0.56, 0.55, 0.53 and 0.51 of one pair of encoders, 0.17 to 0.19 of another.
    """
    nearest = [_nearest(vectors, k) for vectors in (old, new)]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*nearest, strict=True)]))


def _nearest(vectors: NDArray[Any], k: int) -> NDArray[np.intp]:
    if not 1 <= k < len(vectors):
        raise ValueError(f"k is {k}, expected from 1 to {len(vectors) - 1}, one less than the {len(vectors)} vectors")
    directions = unit(np.asarray(vectors, np.float64))
    similarity = directions @ directions.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]


def accuracy_change(
    ids: Sequence[str], old: NDArray[Any], new: NDArray[Any], labels: Sequence[str | int | None], *, k: int = 10, seed: int = 0
) -> AccuracyChange | None:
    """kNN accuracy on the labels in both spaces: mean over five seeded splits, two thirds the bank, the rest the queries.

    Rows without a label, or alone with theirs, take no part; None for fewer than `MIN_ROWS` others or a single class.
    The error is Nadeau & Bengio's, "Inference for the Generalization Error" (2003), since splits overlap.
    """
    named = np.array([label is not None for label in labels])
    texts = [str(label) for label in labels]
    place = {text: number for number, text in enumerate(sorted(set(texts)))}
    _, classes, sizes = np.unique([place[text] for text in texts], return_inverse=True, return_counts=True)
    takes_part = named & (sizes[classes] > 1)
    if takes_part.sum() < MIN_ROWS or len(set(classes[takes_part])) < 2:
        return None
    classes, ids = classes[takes_part].astype(np.int64), [ids[int(row)] for row in np.flatnonzero(takes_part)]
    spaces = [unit(np.asarray(vectors[takes_part], np.float64)).astype(np.float32) for vectors in (old, new)]
    banks = [split_by_name(ids, BANK_SHARE, seed + number) for number in range(SPLITS)]
    figures = np.array([[_accuracy(space, classes, bank, k) for bank in banks] for space in spaces])
    deviation = float((figures[1] - figures[0]).std(ddof=1))
    error = deviation * (1 / SPLITS + (1 - BANK_SHARE) / BANK_SHARE) ** 0.5
    return AccuracyChange(old=float(figures[0].mean()), new=float(figures[1].mean()), error=error, rows=len(ids))


def _accuracy(vectors: Vectors, classes: NDArray[np.int64], bank: NDArray[np.bool_], k: int) -> float:
    return knn_accuracy(vectors[bank], classes[bank], vectors[~bank], classes[~bank], k)


def comparison_gates(compared: Comparison, limits: Limits) -> list[Gate]:
    """`neighbours`, and `accuracy` where labels are carried.

    A first adapter changes most neighbours, and for the better: where labels show that, the lower limit holds.
    """
    accuracy = compared.accuracy
    is_better = accuracy is not None and accuracy.change > 2 * accuracy.error
    says = (
        f"of the {compared.k} nearest images of an image, {compared.k * compared.shared:.1f} are still the same "
        f"(mean of {compared.rows} images; {compared.overlap:.0%} beyond chance)"
    )
    limit = limits.overlap_floor if is_better else limits.overlap
    gates = [Gate(name="neighbours", value=compared.overlap, limit=limit, direction="at least", says=says)]
    if accuracy is not None:
        says = (
            f"by their {compared.k} nearest images, {accuracy.new:.1%} of {accuracy.rows} images get their label, "
            f"{accuracy.old:.1%} before (standard error of the change {accuracy.error:.1%})"
        )
        least = -limits.accuracy - 2 * accuracy.error
        gates.append(Gate(name="accuracy", value=accuracy.change, limit=least, direction="at least", says=says))
    return gates


def _ratio(value: float, of: float) -> float:
    return float(value / of) if of else float("inf")


def _check_aligned(old: NDArray[Any], new: NDArray[Any]) -> None:
    if len(old) != len(new):
        raise ValueError(f"vectors of shapes {old.shape} and {new.shape} are not of the same images; align them by id")
