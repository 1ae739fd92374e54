"""How adapters lie to each other: a matrix for each measure, and the same measure layer by layer."""

from dataclasses import dataclass

from lora_embed.evaluate.records import Evaluation, Relation
from lora_embed.report.charts import Axis, Chart, Point, Series
from lora_embed.report.page import shortened
from lora_embed.text import number_of

KINDS = {  # heading, and what the figures mean
    "cosine": (
        "Cosine",
        "Cosine of the changes to the weights: 1 is the same direction, 0 unrelated, −1 the opposite direction",
    ),
    "sign_conflicts": (
        "Sign conflicts",
        "Of the weights that both change, the share changed in opposite directions: 0.5 is chance",
    ),
    "subspace_overlap": (
        "Overlap of subspaces",
        "Share of the smaller output space that lies in the other one: 1 is all of it",
    ),
    "cka": ("CKA", "CKA, the likeness of the vectors of the same images: 1 is the same space up to rotation and length"),
}
MOST_PAIRS = 8  # lines of a chart
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One kind of relation: values by pair over all layers, in both orders, and values by layer and pair."""

    title: str
    about: str
    whole: dict[Pair, float]
    layers: dict[str, dict[Pair, float]]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(end for pair in self.whole for end in pair))

    @property
    def pairs(self) -> list[Pair]:
        return list(dict.fromkeys(pair for values in self.layers.values() for pair in values))

    @property
    def chart(self) -> Chart:
        """A line for each pair over the layers."""
        return Chart(
            title=f"{self.title} by layer",
            says=f"{self.title} of {number_of(len(self.pairs), 'pair')} over {number_of(len(self.layers), 'layer')}, in the "
            "order of the model.",
            x=Axis(name="layer, in the model's order"),
            y=Axis(name=self.title),
            series=tuple(
                Series(name=name_pair(pair), points=self._points(pair), is_joined=True) for pair in self.pairs[:MOST_PAIRS]
            ),
        )

    def _points(self, pair: Pair) -> tuple[Point, ...]:
        numbered = [(place, layer, values) for place, (layer, values) in enumerate(self.layers.items(), 1) if pair in values]
        return tuple(Point(x=place, y=values[pair], says=f"{layer}: {values[pair]:.3f}") for place, layer, values in numbered)


def measures_of(evaluation: Evaluation) -> list[Measure]:
    """For each kind of relation that was measured."""
    measures = [measure_of(kind, [relation for relation in evaluation.relations if relation.kind == kind]) for kind in KINDS]
    return [measure for measure in measures if measure.whole or measure.layers]


def measure_of(kind: str, relations: list[Relation]) -> Measure:
    title, about = KINDS[kind]
    whole: dict[Pair, float] = {}
    layers: dict[str, dict[Pair, float]] = {}
    for relation in relations:
        if relation.layer is None:
            whole[relation.one, relation.other] = relation.value
        else:
            layers.setdefault(relation.layer, {})[relation.one, relation.other] = relation.value
    whole |= {(second, first): value for (first, second), value in whole.items() if (second, first) not in whole}
    return Measure(title=title, about=about, whole=whole, layers=layers)


def name_pair(pair: Pair) -> str:
    """As text, both ends short."""
    return " · ".join(shortened(end, 24) for end in pair)
