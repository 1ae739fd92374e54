"""Contact sheets: what was nearest to a query before and after, for the queries whose neighbours changed most."""

from lora_embed.evaluate.records import Evaluation, Neighbour, QueryChange
from lora_embed.report.page import Section, brief, folded, picture

OPEN = 12  # sheets that are shown without being asked for


def contact_sheets(found: Evaluation) -> Section:
    """A sheet for each query."""
    sheets = [_sheet(found, query) for query in found.queries]
    about = (
        "<p>The queries whose neighbours changed most. <b>✓</b> and a solid frame: the query's own class; <b>✕</b> and a "
        "dashed frame: another. Under each image its class and its cosine to the query.</p>"
    )
    rest = folded(f"{len(sheets) - OPEN} more queries", "".join(sheets[OPEN:])) if len(sheets) > OPEN else ""
    content = about + "".join(sheets[:OPEN]) + rest if sheets else ""
    return Section(anchor="neighbours", title="Neighbours", content=content)


def _sheet(found: Evaluation, query: QueryChange) -> str:
    before, after = _right(query, query.before), _right(query, query.after)
    image = picture(found.thumbnails.get(query.id), f"the query {query.id}")
    return (
        f'<article class="sheet"><h3>{brief(query.label, 60)} <span class="tag">{brief(query.task, 40)}</span></h3>'
        f'<figure class="query">{image}<figcaption>{brief(query.id, 48)}</figcaption></figure><div>'
        f"<h4>Before: {brief(query.reference, 48)}, {before} of {len(query.before)} right</h4>"
        f"{_near(found, query, query.before)}"
        f"<h4>After: {brief(query.candidate, 48)}, {after} of {len(query.after)} right</h4>"
        f"{_near(found, query, query.after)}"
        "</div></article>"
    )


def _right(query: QueryChange, neighbours: tuple[Neighbour, ...]) -> int:
    return sum(neighbour.label == query.label for neighbour in neighbours)


def _near(found: Evaluation, query: QueryChange, neighbours: tuple[Neighbour, ...]) -> str:
    items = []
    for neighbour in neighbours:
        kind, sign, word = ("right", "✓", "right") if neighbour.label == query.label else ("wrong", "✕", "another class")
        image = picture(found.thumbnails.get(neighbour.id), neighbour.id)
        items.append(
            f'<li class="{kind}"><figure>{image}<figcaption><b role="img" aria-label="{word}">{sign}</b> '
            f"{brief(neighbour.label)}<br><small>{neighbour.cosine:.3f}</small></figcaption></figure></li>"
        )
    return f'<ol class="near" tabindex="0" aria-label="nearest first">{"".join(items)}</ol>'
