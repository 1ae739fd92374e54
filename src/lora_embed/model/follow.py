"""Which places named by an encoder are opened: a stranger's encoder cannot make this machine contact a place of its choice."""

import os
from urllib.parse import urlsplit

from lora_embed.errors import EncoderError
from lora_embed.store import hub

TRUSTED = "LORA_EMBED_FOLLOW"  # places that encoders may name, separated by spaces; places below them are included
LOCAL, HUB = "this machine", "the Hugging Face hub"


def store_of(uri: str) -> str:
    """The store of a URI or path: a bucket or host with its scheme, the hub, or this machine's disks."""
    if hub.is_repository(uri) or (hub.may_be_repository(uri) and "/" in uri and not os.path.exists(uri)):
        return HUB
    if "://" not in uri and "::" not in uri:
        return LOCAL
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc}"


def refuse_elsewhere(uri: str, encoder_uri: str) -> None:
    """Raises EncoderError if an encoder names a place on another store, unless `LORA_EMBED_FOLLOW` allows it.

    A repository of the hub is allowed, but used only if it is already in the hub's cache.
    """
    store = store_of(uri)
    if store in (HUB, store_of(encoder_uri)) or is_trusted(uri):
        return
    raise EncoderError(
        f"{encoder_uri}: names its base {uri}, which is on another store, {store}; only a base on the encoder's own store is "
        f"opened. {ADVICE.format(uri=uri)}"
    )


def is_trusted(uri: str) -> bool:
    """True if a URI is, or is below, one of the places that the user allows encoders to name."""
    trusted = [place.rstrip("/") for place in os.environ.get(TRUSTED, "").split()]
    return ".." not in uri.split("/") and any(uri == place or uri.startswith(f"{place}/") for place in trusted)


ADVICE = (
    "If you trust it, name it yourself: as base of load_encoder or of the table's encoder(), or in the environment, "
    f"{TRUSTED}={{uri}}"
)


def may_ask_hub(uri: str, encoder_uri: str) -> bool:
    """True if a URI may be downloaded from the hub; otherwise only the hub's cache is used."""
    return store_of(encoder_uri) == HUB or is_trusted(uri)
