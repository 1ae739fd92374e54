"""Draw what a search found: one contact sheet, one row per query with its nearest images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# in pixels
WIDTH, MARGIN, GAP = 1200, 28, 14
RULE_AT, ROWS_AT = 92, 126  # the line under the title; the first row
QUERY_SPACE = 36  # between the query's column and its neighbours
CAPTION = 46
FRAME, CORNER = 4, 8
INK, FAINT, RULE = "#1f2328", "#6b7280", "#d8dce2"
QUERY, RIGHT, WRONG = "#8b95a5", "#1a7f37", "#cf222e"
COSINE = "Cosine similarity under each neighbour"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An image with its class; `score` is the cosine similarity to the row's query, None on the query itself."""

    image: Image.Image
    label: str
    score: float | None = None


def neighbour_sheet(
    rows: Sequence[tuple[Tile, Sequence[Tile]]], out: Path, *, title: str = "Nearest images", note: str = COSINE
) -> None:
    """Write a PNG 1,200 pixels wide: each row a query, then its neighbours in the order given.

    A neighbour of the query's class has a green frame and a tick, any other a red frame and a cross. `note` is
    printed in grey under the title.
    """
    if not rows:
        raise ValueError("rows is empty, expected one or more queries with their neighbours")
    columns = max(len(neighbours) for _, neighbours in rows)
    side = _tile_side(columns)
    row_height = side + CAPTION + GAP
    sheet = Image.new("RGB", (WIDTH, ROWS_AT + row_height * len(rows) + MARGIN // 2), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 22), title, INK, _font(27))
    draw.text((MARGIN, 58), note, FAINT, _font(16))
    draw.text((WIDTH - MARGIN, 66), _summary(rows), INK, _font(16), anchor="rm")
    draw.line((MARGIN, RULE_AT, WIDTH - MARGIN, RULE_AT), RULE, 1)
    _draw_column_headings(draw, columns, side)
    for number, (query, neighbours) in enumerate(rows):
        top = ROWS_AT + row_height * number
        _draw_tile(sheet, query, (MARGIN, top), side, QUERY)
        for column, tile in enumerate(neighbours):
            corner = (_column_left(column, side), top)
            _draw_tile(sheet, tile, corner, side, RIGHT if tile.label == query.label else WRONG)
    sheet.save(out, optimize=True)


def _tile_side(columns: int) -> int:
    """Return the tiles' side that fills the width with a query and `columns` neighbours, within bounds."""
    room = WIDTH - 2 * MARGIN - QUERY_SPACE - GAP * max(columns - 1, 0)
    return max(48, min(160, room // (columns + 1)))


def _column_left(column: int, side: int) -> int:
    return MARGIN + side + QUERY_SPACE + column * (side + GAP)


def _summary(rows: Sequence[tuple[Tile, Sequence[Tile]]]) -> str:
    matches = [tile.label == query.label for query, neighbours in rows for tile in neighbours]
    return f"{sum(matches)} of {len(matches)} neighbours share the query's class"


def _draw_column_headings(draw: ImageDraw.ImageDraw, columns: int, side: int) -> None:
    headings = ["query", "nearest", *(str(place) for place in range(2, columns + 1))]
    lefts = [MARGIN, *(_column_left(column, side) for column in range(columns))]
    for heading, left in zip(headings, lefts, strict=False):
        draw.text((left + side / 2, RULE_AT + 18), heading, FAINT, _font(15), anchor="mm")


def _draw_tile(sheet: Image.Image, tile: Tile, corner: tuple[int, int], side: int, colour: str) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    inner = side - 2 * (FRAME + 4)
    picture = _fitted(tile.image, inner)
    at = (left + (side - picture.width) // 2, top + (side - picture.height) // 2)
    sheet.paste(picture, at)
    draw.rounded_rectangle((left, top, left + side - 1, top + side - 1), CORNER, outline=colour, width=FRAME)
    middle = left + side / 2
    label = _shortened(draw, tile.label, side + GAP - 4)
    draw.text((middle, top + side + 13), label, INK, _font(14), anchor="mm")
    if tile.score is not None:
        draw.text((middle, top + side + 31), f"{tile.score:.3f}", FAINT, _font(14), anchor="mm")
        _draw_badge(draw, (left + side - 13, top + 13), colour)


def _draw_badge(draw: ImageDraw.ImageDraw, centre: tuple[float, float], colour: str) -> None:
    """Draw a tick or a cross too, so that the verdict does not hang on telling green from red."""
    x, y = centre
    draw.circle(centre, 10, fill=colour, outline="white", width=2)
    if colour == RIGHT:
        draw.line((x - 4, y, x - 1, y + 3, x + 4, y - 3), "white", 2, joint="curve")
    else:
        draw.line((x - 3, y - 3, x + 3, y + 3), "white", 2)
        draw.line((x - 3, y + 3, x + 3, y - 3), "white", 2)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """Return the image on white within a square: whole multiples of small pixels stay crisp, the rest is Lanczos."""
    rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, "white")
    flat = Image.alpha_composite(ground, rgba).convert("RGB")
    scale = side / max(flat.size)
    if scale >= 4:
        scale = int(scale)
    size = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    return flat.resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS)


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: float) -> str:
    if draw.textlength(text, _font(14)) <= width:
        return text
    while text and draw.textlength(text + "…", _font(14)) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
