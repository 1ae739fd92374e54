"""The result of an evaluation as plain data: the JSON that commands print, and what a report or a notebook shows.

Figures are shares (0 to 1) unless said otherwise; `task`, `candidate` and `adapter` are names of records beside them.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pyarrow as pa

from lora_embed.errors import ConfigError

FORMAT = 1
RelationKind = Literal["cosine", "sign_conflicts", "subspace_overlap", "cka"]  # the first three are those of `model.relate`
METRICS = ("knn", "probe", "recall@1", "recall@5", "map", "nmi")
HEADLINE = "knn"  # the metric that is shown if there is room for only one per task


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task: a label field of the samples, and the classes that occur in it."""

    name: str
    label: str  # field of the samples
    classes: tuple[str, ...]
    images: int  # images with a label


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One encoder that was evaluated."""

    name: str  # unique
    method: str  # merge method; "none" for the base alone
    weights: dict[str, float]  # adapter → weight
    options: dict[str, Any]
    recipe_id: str
    space_id: str
    dimension: int
    build_s: float
    encoder_bytes: int
    forward_s: float  # seconds for all images, summed over the workers

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that have a share in it; none for the base alone."""
        return tuple(name for name, weight in self.weights.items() if weight)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric of one candidate on one task: a value for each split, their mean, its 95 % interval."""

    task: str
    metric: str
    candidate: str
    per_split: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """False where all splits or queries have the same value, so that they do not show how much the figure varies."""
        return self.low < self.high


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A candidate's figure minus a reference's on the same splits; `verdict` follows from the 95 % interval.

    The reference is the evaluation's, or, for a merge, also the base and each of its single adapters.
    """

    task: str
    metric: str
    candidate: str
    reference: str
    mean: float
    low: float
    high: float
    verdict: Literal["better", "worse", "within noise"]

    @property
    def has_interval(self) -> bool:
        """False where all splits or queries have the same difference, so that they do not show how much it varies."""
        return self.low < self.high


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The accuracy of an adapter's own head: on the adapter alone (`own`), and on a candidate (`kept`)."""

    task: str
    adapter: str
    candidate: str
    own: float
    kept: float
    low: float  # 95 % interval of kept − own, over the same images
    high: float
    images: int

    @property
    def has_interval(self) -> bool:
        """False where no image has another answer than before, or all have."""
        return self.low < self.high


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """Share of one class's queries classified correctly over all splits: by the reference (before), the candidate (after)."""

    task: str
    candidate: str
    reference: str
    label: str
    images: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Relation:
    """How similar two adapters or encoders are; `layer` is a weight's name, or None for all weights."""

    kind: RelationKind
    one: str  # adapter, or "base"
    other: str
    layer: str | None
    value: float


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One of the nearest images of a query."""

    id: str
    label: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class QueryChange:
    """One query whose neighbours changed much: its neighbours with the reference and with the candidate."""

    task: str
    candidate: str
    reference: str
    id: str
    label: str
    before: tuple[Neighbour, ...]
    after: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One merge that a search tried: its scores by task, on the images of the search."""

    number: int
    method: str
    weights: dict[str, float]
    options: dict[str, Any]
    scores: dict[str, float]  # task → figure
    objective: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The whole evaluation."""

    created: str  # UTC, ISO 8601
    inputs: tuple[str, ...]
    samples: int
    decoded: int  # images decoded, each once for all candidates
    rejects: dict[str, int]  # reason → samples
    seconds: dict[str, float]  # by stage, summed over the workers
    splits: int
    bank_share: float
    seed: int
    tasks: tuple[Task, ...]
    candidates: tuple[Candidate, ...]
    reference: str  # the candidate that others are compared with
    figures: tuple[Figure, ...]
    differences: tuple[Difference, ...]
    retention: tuple[Retention, ...] = ()
    classes: tuple[ClassChange, ...] = ()
    relations: tuple[Relation, ...] = ()
    queries: tuple[QueryChange, ...] = ()
    trials: tuple[Trial, ...] = ()
    thumbnails: dict[str, str] = field(default_factory=dict)  # id → JPEG in base64
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_arrow(self) -> pa.Table:
        """The figures for a notebook: one row per task, metric, candidate and split, and a row without split for the mean.

        The row of the mean also has its interval and, except for the reference, the difference to the reference with its
        interval.
        """
        differences = {
            (row.task, row.metric, row.candidate): row for row in self.differences if row.reference == self.reference
        }
        rows: list[dict[str, Any]] = []
        for figure in self.figures:
            key = {"task": figure.task, "metric": figure.metric, "candidate": figure.candidate}
            rows += [key | {"split": split, "value": value} for split, value in enumerate(figure.per_split)]
            mean = key | {"split": None, "value": figure.mean, "low": figure.low, "high": figure.high}
            if (other := differences.get((figure.task, figure.metric, figure.candidate))) is not None:
                mean |= {"difference": other.mean, "difference_low": other.low, "difference_high": other.high}
                mean |= {"verdict": other.verdict}
            rows.append(mean)
        return pa.Table.from_pylist(rows, schema=_ARROW)

    @classmethod
    def from_json(cls, text: str, where: str = "the evaluation") -> "Evaluation":
        """Read an evaluation. Raises ConfigError, naming `where`, for text that this release did not write."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ConfigError(
                    f"{where}: has format {content['format']}, but this release reads format {FORMAT}. Evaluate again."
                )
            return cls(**{of.name: _restore(_HINTS[of.name], content[of.name]) for of in fields(cls)})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{where}: is not an evaluation as `lora-embed evaluate --json` prints it ({error!r}).") from None


def _restore(kind: Any, value: Any) -> Any:
    """Convert a JSON value to the record's type: tuples of records; other values stay as they are."""
    if get_origin(kind) is tuple:
        return tuple(_restore(get_args(kind)[0], item) for item in value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{of.name: _restore(hints[of.name], value[of.name]) for of in fields(kind)})  # type: ignore[operator]
    return value


_HINTS = get_type_hints(Evaluation)
_NUMBERS = ("value", "low", "high", "difference", "difference_low", "difference_high")
_ARROW = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("task", "metric", "candidate")),
        pa.field("split", pa.int32()),
        *(pa.field(name, pa.float64()) for name in _NUMBERS),
        pa.field("verdict", pa.string()),
    ]
)
