"""Pages as text, for tests of what they say."""

import re


def whole_names(page: str) -> str:
    """The HTML without the places where a long name may break."""
    return page.replace("<wbr>", "")


def plain_text(page: str) -> str:
    """What a reader sees: without tags, and with one space where there is any."""
    return " ".join(re.sub("<[^>]*>", " ", whole_names(page)).split())
