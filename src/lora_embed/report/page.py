"""The frame of all HTML pages: the one Jinja2 environment, and the filters by which templates show text and figures.

A page is one file that loads nothing: it has no script, font or picture from elsewhere, and its policy forbids them.
Templates stand in `templates/` beside the code that fills them; their names are paths below the package.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_embed.errors import StorageError
from lora_embed.text import agree, counted, number_of, printable, size_of, span

if TYPE_CHECKING:
    from jinja2 import Environment

PACKAGE = Path(__file__).parents[1]
NAME_LENGTH = 72  # characters of a name that are shown before it is folded up
WHOLE_NAME = 8  # characters of a name that fits any column in one line
_JOINTS = re.compile(r"(?<=[_\-/.])(?=[^_\-/.])")


def page(title: str, lead: Sequence[str], folder: str, sections: dict[str, str], **values: Any) -> str:
    """The HTML of a whole page; `lead` stands under its heading, and all text is escaped on its way in.

    `sections` maps anchors to headings. The template `{folder}/{anchor}.html` fills each section from `values`; a section
    that it leaves blank is left out.
    """
    contents = {anchor: render(f"{folder}/{anchor}.html", **values).strip() for anchor in sections}
    filled = [(anchor, sections[anchor], content) for anchor, content in contents.items() if content]
    style = (PACKAGE / "report/templates/style.css").read_text(encoding="utf-8")
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    frame = {"title": title, "lead": lead, "sections": filled, "style": style, "style_hash": style_hash}
    return render("report/templates/frame.html", **frame)


def render(template: str, **values: Any) -> str:
    """One template, filled. A value that it needs and does not get is an error."""
    return environment().get_template(template).render(values)


@cache
def environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        loader=FileSystemLoader(PACKAGE),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"printable": printable, "shortened": shortened, "moment": moment, "span": span}
    jinja.filters |= {
        "number": number,
        "percentage": percentage,
        "share": share,
        "points": points,
        "number_of": number_of,
        "size_of": size_of,
        "agree": agree,
        "counted": counted,
    }
    jinja.filters |= {"pieces": pieces, "last_part": last_part}
    jinja.tests["base64"] = is_base64
    return jinja


def shown(value: Any) -> Any:
    """What a template shows of a value: text without control characters, which is escaped next. HTML stays as it is."""
    return value if hasattr(value, "__html__") else printable(str(value))


def write(text: str, out: Path) -> None:
    """Raises StorageError when the file cannot be written."""
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}). Name another file.") from None


def shortened(text: str, length: int = NAME_LENGTH) -> str:
    """At most `length` characters of a text, the middle left out."""
    full_text = printable(text)
    if len(full_text) <= length:
        return full_text
    tail = length // 4
    return f"{full_text[: length - tail - 1]}…{full_text[-tail:]}"


def pieces(text: str) -> list[str]:
    """A long name in pieces that end with `_`, `-`, `/` or `.`, after which it may break; a short one is whole."""
    return [text] if len(text) <= WHOLE_NAME else _JOINTS.split(text)


def last_part(uri: str) -> str:
    """The last part of a path or URI, which mostly tells adapters apart."""
    return uri.rstrip("/").rpartition("/")[2] or uri


def moment(text: str) -> str:
    """A time in ISO 8601 as people read it; a text that is none stays as it is."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return text


def number(value: float, form: str = ",") -> str:
    """A number in a format of Python's, with a minus sign instead of a hyphen."""
    return format(value, form).replace("-", "−")


def percentage(value: float, digits: int = 0) -> str:
    """A share in percent, with its sign."""
    return f"{number(100 * value, f'.{digits}f')} %"


def share(value: float) -> str:
    """A share in percent, without its sign."""
    return number(100 * value, ".1f")


def points(value: float) -> str:
    """A difference of shares, in percentage points."""
    return number(100 * value, "+.1f")


def is_base64(text: str) -> bool:
    """Whether a text is base64 and nothing else, so that it may stand in an address."""
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False
