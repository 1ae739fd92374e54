"""The gates of a version: compare figures of its vectors with limits.

The default limits were chosen by measurements with a real ViT-S/14 on 600 real images: 23 good updates (other merges of
the demo's two adapters, and copies of them with noise) and 15 that were broken on purpose, each compared with the encoder
before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_embed.text import number_of
from lora_embed.vectors.health import Figures, Vectors
from lora_embed.vectors.metrics import knn_accuracy, split_by_name
from lora_embed.vectors.rows import unit

MIN_ROWS = 64  # with fewer vectors the figures are too uncertain, so no gate is made
SPLITS = 5
BANK_SHARE = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check: a figure, its limit, and a sentence for a person. A gate whose figure is NaN always fails."""

    name: str
    value: float
    limit: float
    direction: Literal["at most", "at least"]
    says: str
    details: tuple[str, ...] = ()  # lines for the message of a gate that fails

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """The gate as JSON types, for a manifest; None for a figure that is not finite."""
        value = self.value if isfinite(self.value) else None
        content = {name: value for name, value in asdict(self).items() if name != "details"}
        return content | {"value": value, "holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the gates. The comments give the measured figures of good and of bad updates.

    Bad updates were: adapters at weights −1, 2, 5 and 20, the patch embedding scaled to a hundredth and a tenth, the late
    blocks scaled to 1/100 and 30 times, a large constant added to all vectors, pixels from 0 to 255. All good updates pass,
    and all bad ones are stopped except one, the patch embedding scaled to a tenth (overlap 0.39, accuracy −0.06). Smaller
    mistakes of the processor (mean and deviation swapped, not normalised, not cropped) change the figures no more than a
    good update does (overlap 0.55 to 0.71, accuracy −0.02 to 0.01): only the gate `processor` notices them.
    """

    passed_over: float = 0.5  # share of files that look like input and are hidden by their names; a figure of `listing`
    unusable: float = 0.001  # share of rows; all measured updates: 0. An encoder may give zeros for a blank image
    constant: float = 0.05  # share of dimensions, added to the old share; all measured updates: 0
    duplicates: float = 0.05  # share of rows, added to the old share; all measured: 0. A few per cent may be blank images
    norm_factor: float = 2.0  # factor to the old median length in the same space; one class alone: up to 1.25
    norm_tail: float = 10.0  # extreme 1 % of lengths to the median; good ≤ 1.9, bad ≤ 2.2; for a set that is half broken
    rank: float = 0.6  # share of the old rank, in another space; good ≥ 0.86, bad ≤ 0.48 if rank is what is wrong
    rank_floor: float = 1.5  # 1 means all vectors lie on a line; the base has 3.4, tiny random models 2.5
    spread: float = 0.2  # share of the old spread, in another space; good ≥ 0.50, bad ≤ 0.07 if spread is what is wrong
    spread_floor: float = 1e-3  # good ≥ 0.13, bad 3e-6 to 1e-2; the rounding of bfloat16 alone makes 3e-5
    overlap: float = 0.35  # above chance; good ≥ 0.40, most bad ones ≤ 0.27
    overlap_floor: float = 0.1  # if labels show a gain; base to good update 0.14 to 0.19, base to adapter at 5, 20 ≤ 0.03
    accuracy: float = 0.05  # largest loss, added to two standard errors; good ≤ 0.05, bad ≥ 0.10


def health_gates(new: Figures, before: Figures | None, *, same_space: bool, limits: Limits) -> list[Gate]:
    """`unusable`, `constant`, `duplicates`, `norms`, and for a new space `collapsed` and `spread`; none for few rows.

    In the space of the version before, `new` may be the new rows alone. They may all be of one kind (one class of the demo
    has a fifth of the spread of all images), so rank and spread are judged only for another encoder.
    """
    if new.count < MIN_ROWS:
        return []
    gates = [_unusable(new, limits), _constant(new, before, limits), _duplicates(new, before, limits)]
    if same_space and before is not None:
        return [*gates, _norms_as_before(new, before, limits)]
    return [*gates, _norms_alone(new, limits), _collapsed(new, before, limits), _spread(new, before, limits)]


def _unusable(new: Figures, limits: Limits) -> Gate:
    says = f"{new.unusable:.2%} of the vectors are zero or not finite, so they have no neighbours"
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
    says = f"the median length of a vector is {median:.4g}; it was {was:.4g} in the version before, of the same encoder"
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
    """The larger of the floor and a share of the old value, but never more than the old value, which was published."""
    return floor if before is None else min(max(floor, share * before), before)


def processor(before: Mapping[str, Any], new: Mapping[str, Any]) -> Gate:
    """Check that images are prepared as in the version before, by the `preprocessing` of both encoders' descriptions.

    A wrong processor may change vectors no more than a good update does, but its settings differ visibly. The figure is the
    number of settings that differ.
    """
    before, new = (json.loads(json.dumps(dict(settings))) for settings in (before, new))  # tuples are lists in a file
    changed = sorted(key for key in before.keys() | new.keys() if before.get(key) != new.get(key))
    changes = "; ".join(f"{key} was {before.get(key)} and is {new.get(key)}" for key in changed)
    says = f"images are prepared in another way: {changes}" if changed else "images are prepared as before"
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
    """Two spaces compared on the same images: the share of neighbours that stay, plain and above chance, and accuracies."""

    rows: int
    k: int
    shared: float
    overlap: float
    accuracy: AccuracyChange | None = None  # if usable labels are carried


def compare(
    ids: Sequence[str], old: Vectors, new: Vectors, labels: Sequence[str | int | None] | None = None, *, k: int = 10
) -> Comparison | None:
    """Compare two spaces on a few thousand images, (n, d) and (n, e) with aligned rows; None for too few images."""
    _check_aligned(old, new)
    if len(ids) < MIN_ROWS:
        return None
    shared = neighbour_overlap(old, new, k)
    chance = k / (len(ids) - 1)
    accuracy = accuracy_change(ids, old, new, labels, k=k) if labels is not None else None
    return Comparison(rows=len(ids), k=k, shared=shared, overlap=(shared - chance) / (1 - chance), accuracy=accuracy)


def neighbour_overlap(old: NDArray[Any], new: NDArray[Any], k: int = 10) -> float:
    """Mean share of a row's k nearest rows by cosine, itself left out, that are the same in both spaces.

    By chance it is k / (n − 1), which depends on the number of rows n. `compare` corrects for chance as Cohen's kappa does
    (1960): then 100, 300, 600 and 1,172 real images give 0.56, 0.55, 0.53 and 0.51 for one pair of encoders, and 0.17 to
    0.19 for another.
    """
    nearest = [_nearest(vectors, k) for vectors in (old, new)]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*nearest, strict=True)]))


def _nearest(vectors: NDArray[Any], k: int) -> NDArray[np.intp]:
    if not 1 <= k < len(vectors):
        raise ValueError(f"k is {k}, expected 1 to {len(vectors) - 1}, since there are {len(vectors)} vectors")
    directions = unit(np.asarray(vectors, np.float64))
    similarity = directions @ directions.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]


def accuracy_change(
    ids: Sequence[str], old: NDArray[Any], new: NDArray[Any], labels: Sequence[str | int | None], *, k: int = 10, seed: int = 0
) -> AccuracyChange | None:
    """kNN accuracy on the labels in both spaces: mean over five seeded splits, two thirds bank and one third queries.

    Rows without a label, or whose label no other row has, are left out. None for fewer than `MIN_ROWS` rows or a single
    class. The error is that of Nadeau & Bengio, "Inference for the Generalization Error" (2003), since splits overlap.
    """
    has_label = np.array([label is not None for label in labels])
    texts = [str(label) for label in labels]
    place = {text: number for number, text in enumerate(sorted(set(texts)))}
    _, classes, sizes = np.unique([place[text] for text in texts], return_inverse=True, return_counts=True)
    takes_part = has_label & (sizes[classes] > 1)
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
    """The gates `neighbours` and, if labels are carried, `accuracy`.

    A first adapter changes most neighbours and improves them. If labels show a gain, the lower limit is used.
    """
    accuracy = compared.accuracy
    is_better = accuracy is not None and accuracy.change > 2 * accuracy.error
    says = (
        f"of the {compared.k} nearest images of an image, {compared.k * compared.shared:.1f} are still the same "
        f"(mean of {number_of(compared.rows, 'image')}; {compared.overlap:.0%} above chance)"
    )
    limit = limits.overlap_floor if is_better else limits.overlap
    gates = [Gate(name="neighbours", value=compared.overlap, limit=limit, direction="at least", says=says)]
    if accuracy is not None:
        says = (
            f"the {compared.k} nearest images give {accuracy.new:.1%} of {accuracy.rows} images the right label, before it was "
            f"{accuracy.old:.1%} (standard error of the change {accuracy.error:.1%})"
        )
        least = -limits.accuracy - 2 * accuracy.error
        gates.append(Gate(name="accuracy", value=accuracy.change, limit=least, direction="at least", says=says))
    return gates


def _ratio(value: float, base: float) -> float:
    return float(value / base) if base else float("inf")


def _check_aligned(old: NDArray[Any], new: NDArray[Any]) -> None:
    if len(old) != len(new):
        raise ValueError(f"vectors have the shapes {old.shape} and {new.shape}, expected the same images; align rows by id")
