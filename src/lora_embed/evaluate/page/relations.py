"""How adapters lie to each other: a matrix for each measure, and the same layer by layer."""

from lora_embed.evaluate.records import Evaluation, Relation
from lora_embed.report.charts import Axis, Point, Series, plain, xy_chart
from lora_embed.report.page import Column, Section, brief, escaped, folded, name, shortened, table

KINDS = {  # title, and what its figures mean
    "cosine": ("Cosine", "of the changes to the weights: 1 is the same direction, 0 unrelated, below 0 against each other"),
    "sign_conflicts": ("Sign conflicts", "share of entries that both change, in opposite directions: 0.5 is chance"),
    "subspace_overlap": ("Overlap of subspaces", "share of the smaller output space that lies in the other's: 1 is all of it"),
    "cka": ("CKA", "likeness of the vectors of the same images: 1 is the same space up to rotation and length"),
}
SHADES = 6  # classes h1 … h6 of the style
MOST_PAIRS = 8  # lines of a chart


def relatedness(found: Evaluation) -> Section:
    """For each kind that was measured a matrix, and a chart and a table by layer where there are layers."""
    kinds = [kind for kind in KINDS if any(relation.kind == kind for relation in found.relations)]
    parts = [_kind(kind, [relation for relation in found.relations if relation.kind == kind]) for kind in kinds]
    about = (
        "<p>Adapters that change the same weights in opposite directions lose by merging; those that are alike or keep out of "
        "each other's way lose little. These figures need no labels.</p>"
    )
    return Section(anchor="relations", title="Relatedness", content=about + "".join(parts) if parts else "")


def _kind(kind: str, relations: list[Relation]) -> str:
    title, about = KINDS[kind]
    whole = [relation for relation in relations if relation.layer is None]
    layered = [relation for relation in relations if relation.layer is not None]
    matrix = _matrix(f"{title}: {about}", whole) if whole else ""
    chart, listed = _by_layer(title, layered) if layered else ("", "")
    return f'<h3>{title}</h3><div class="beside">{matrix}{chart}</div>{listed}'


def _matrix(caption: str, relations: list[Relation]) -> str:
    names = list(dict.fromkeys(end for relation in relations for end in (relation.one, relation.other)))
    values = {(relation.one, relation.other): relation.value for relation in relations}
    values |= {(other, one): value for (one, other), value in values.items() if (other, one) not in values}
    head = "".join(f'<th scope="col">{brief(one)}</th>' for one in names)
    rows = []
    for one in names:
        cells = "".join(_cell(values.get((one, other)), is_self=one == other) for other in names)
        rows.append(f'<tr><th scope="row">{name(one)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(caption)}"><table class="heat">'
        f"<caption><span>{escaped(caption)}</span></caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: float | None, *, is_self: bool) -> str:
    if value is None:
        return "<td>–</td>"
    shade = min(SHADES, round(abs(value) * SHADES))
    shown = f"{value:.3f}".replace("-", "−")
    return f"<td>{shown}</td>" if is_self or not shade else f'<td class="h{shade}">{shown}</td>'


def _by_layer(title: str, relations: list[Relation]) -> tuple[str, str]:
    """A chart, and all of its figures, folded."""
    layers = list(dict.fromkeys(relation.layer or "" for relation in relations))
    pairs = list(dict.fromkeys((relation.one, relation.other) for relation in relations))
    values = {(relation.one, relation.other, relation.layer): relation.value for relation in relations}
    series = [
        Series(
            name=_pair(pair),
            points=tuple(
                Point(x=place, y=values[(*pair, layer)], says=f"{layer}: {values[(*pair, layer)]:.3f}")
                for place, layer in enumerate(layers, 1)
                if (*pair, layer) in values
            ),
            shade=shade,
            is_joined=True,
        )
        for shade, pair in enumerate(pairs[:MOST_PAIRS])
    ]
    about = f"{title} of {len(pairs)} pairs over {len(layers)} layers, in the order of the model."
    chart = xy_chart(
        f"{title} by layer", about, series, Axis(name="layer, in the model's order"), Axis(name=title, shows=plain)
    )
    columns = [Column(head="Layer"), *(Column(head=brief(_pair(pair), 40), is_number=True) for pair in pairs)]
    rows = [
        [name(layer), *(f"{values[(*pair, layer)]:.3f}" if (*pair, layer) in values else "–" for pair in pairs)]
        for layer in layers
    ]
    listed = table(f"{escaped(title)} by layer", columns, rows)
    return chart, folded(f"{escaped(title)} of all {len(layers):,} layers", listed)


def _pair(pair: tuple[str, str]) -> str:
    return " · ".join(shortened(end, 24) for end in pair)
