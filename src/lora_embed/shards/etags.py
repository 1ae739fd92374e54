"""The etags of the objects that a list names: from pages of a listing where many of them lie together, else one by one."""

import posixpath
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from lora_embed.errors import LoraEmbedError
from lora_embed.monitor.progress import say
from lora_embed.store.objects import Reach, look
from lora_embed.store.place import Place, locate
from lora_embed.store.remote import is_s3
from lora_embed.store.retry import LIBRARY_ERRORS, describe
from lora_embed.store.store import Store
from lora_embed.text import agree, number_of

AT_ONCE = 32  # objects that are asked for at the same time
FEWEST_IN_PAGE = 16  # of the objects, in a page of a listing: with fewer, they are asked for one by one
POOR_PAGES = 2  # pages with fewer, after which a store is not listed further


def etags_of(references: list[str | None], folder: Place, reach: Reach) -> list[str]:
    """The etag of each reference's object; empty where there is none. An object is asked for once."""
    places = [_place(reference, folder) for reference in references]
    named = {place for place in places if place is not None}
    etags = _listed(named, reach)
    left = sorted(named - etags.keys(), key=lambda place: place.uri)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda place: look(place, reach), left)
        etags.update((place, "" if entry is None else entry.etag) for place, entry in zip(left, found, strict=True))
    return ["" if place is None else etags[place] for place in places]


def _place(reference: str | None, folder: Place) -> Place | None:
    try:
        return locate(reference or "", folder)
    except ValueError:
        return None


def _listed(places: Iterable[Place], reach: Reach) -> dict[Place, str]:
    """The etags of those objects that pages of listings give. Without the right to list, of none."""
    by_store: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        by_store[place.store].append(place)
    found: dict[Place, str] = {}
    for some in by_store.values():
        store = reach.store_of(some[0])
        if is_s3(store.uri) and len(some) > FEWEST_IN_PAGE:
            found.update(_from_pages(store, {place.path: place for place in some}))
    return found


def _from_pages(store: Store, wanted: dict[str, Place]) -> dict[Place, str]:
    """Each page begins behind the first object that is not known yet, whose own etag it cannot give."""
    paths, found, number, poor = sorted(wanted), dict[Place, str](), 0, 0
    while len(paths) - number > FEWEST_IN_PAGE and poor < POOR_PAGES:
        folder = posixpath.commonpath([posixpath.dirname(paths[number]), posixpath.dirname(paths[-1])])
        try:
            page = store.page_behind(paths[number], folder)
        except (LoraEmbedError, *LIBRARY_ERRORS) as error:
            left = len(paths) - len(found)
            why = f"cannot list {store.uri} ({describe(error)})"
            say(f"check_references: {why}, so {number_of(left, 'object')} {agree(left, 'is', 'are')} asked for one by one")
            return found
        useful = [entry for entry in page if entry.path in wanted]
        found.update((wanted[entry.path], entry.etag) for entry in useful)
        poor += len(useful) < FEWEST_IN_PAGE
        last = page[-1].path if page else paths[-1]
        number = next((at for at in range(number + 1, len(paths)) if paths[at] > last), len(paths))
    return found
