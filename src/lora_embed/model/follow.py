"""Whether a place that an encoder names is looked at: strangers' words send this machine nowhere that its user did not name."""

import os
from urllib.parse import urlsplit

from lora_embed.errors import EncoderError
from lora_embed.store import hub

TRUSTED = "LORA_EMBED_FOLLOW"  # places that encoders may name, separated by spaces; what lies below them counts
LOCAL, HUB = "this machine", "the Hugging Face hub"


def store_of(uri: str) -> str:
    """What a place lies on: a bucket or host with its scheme, the hub, or this machine's disks."""
    if hub.is_repository(uri) or (hub.may_be_repository(uri) and "/" in uri and not os.path.exists(uri)):
        return HUB
    if "://" not in uri and "::" not in uri:
        return LOCAL
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc}"


def refuse_elsewhere(uri: str, encoder_uri: str) -> None:
    """Raises EncoderError for a place that an encoder names and that lies on another store, unless `LORA_EMBED_FOLLOW` has it.

    On the hub it may lie: only what is in the hub's cache already is taken from there then.
    """
    store = store_of(uri)
    if store in (HUB, store_of(encoder_uri)) or is_trusted(uri):
        return
    raise EncoderError(
        f"{encoder_uri}: names {uri}, which lies elsewhere, on {store}; what an encoder names is followed on its own store "
        f"alone. {ADVICE.format(uri=uri)}"
    )


def is_trusted(uri: str) -> bool:
    """Does it lie at or below one of the places that the user trusts encoders to name?"""
    trusted = [place.rstrip("/") for place in os.environ.get(TRUSTED, "").split()]
    return ".." not in uri.split("/") and any(uri == place or uri.startswith(f"{place}/") for place in trusted)


ADVICE = (
    "If you trust it, name it yourself, as base of load_encoder or of the table's encoder(), or in the environment: "
    f"{TRUSTED}={{uri}}"
)


def may_ask_hub(uri: str, encoder_uri: str) -> bool:
    """May the hub be asked for it, or is it taken from the hub's cache alone?"""
    return store_of(encoder_uri) == HUB or is_trusted(uri)
