"""The pictures that a page shows, each with a number: it stands in the page once, and is shown by that number elsewhere."""

from lora_embed.evaluate.records import Evaluation
from lora_embed.report.page import is_base64


def numbered_pictures(evaluation: Evaluation) -> dict[str, int]:
    """Image id → the number of its picture, for all images that queries show and that have one."""
    rows = [(query.id, *(near.id for near in (*query.before, *query.after))) for query in evaluation.queries]
    shown = dict.fromkeys(id_ for row in rows for id_ in row)
    with_picture = [id_ for id_ in shown if (jpeg := evaluation.thumbnails.get(id_)) and is_base64(jpeg)]
    return {id_: number for number, id_ in enumerate(with_picture)}
