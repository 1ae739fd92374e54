"""The page that `search --page` writes: the query, and the nearest images with their pictures."""

from pathlib import Path

from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.thumbnail import thumbnail
from lora_embed.report.page import page, write
from lora_embed.search.search import Found
from lora_embed.text import number_of

SIDE = 160  # pixels of a picture


def write_page(result: Found, pictures: dict[str, bytes], out: Path) -> None:
    """Write one HTML file with everything in it: the query, and the hits with those pictures that were found.

    Raises StorageError if the file cannot be written.
    """
    with IsolatedDecoder() as decode:
        query = thumbnail(result.data, SIDE, decode)
        thumbnails = {id_: thumbnail(data, SIDE, decode) for id_, data in pictures.items()}
    lead = [f"version {result.version} of {result.table}", f"space {result.space_id}", result.method, "cosine"]
    title, sections = f"Nearest of {number_of(result.count, 'image')}", {"found": "Nearest first"}
    write(page(title, lead, "search/templates", sections, result=result, query=query, thumbnails=thumbnails), out)
