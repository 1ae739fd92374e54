"""Text for people: control characters escaped, credentials in URIs removed, and times written in words."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

# `://`, also as JSON may hold it, however often it was percent-encoded. After it come user, host, path and parameters.
_MARK = re.compile(r"(?::|%(?:25)*3a)(?:\\?/|%(?:25)*2f){2}", re.I)
_SCHEME = re.compile(r"[a-z0-9+.-]{1,32}\Z", re.I)
_PARAMETER = re.compile(r"[#;&][^\s\"'/?#;&=]{1,64}=")
_QUERY = re.compile(r"[?#;&]([^\s\"'/?#;&=]{1,64})=")
# Names of parameters that sign a URL or log somebody in. S3, Google Cloud Storage and local disks have no other parameters.
_SIGNS = re.compile(
    r"x-(?:amz|goog|oss|cos|ms)-.*|.*(?:signature|credential|token|secret|passw|pwd|access_?key|api_?key|accessid).*"
    r"|sig|sas|auth.*|.*[_-]key|key|key-pair-id|policy|jwt|pass|session.*"
    r"|versionid",  # none of these, but s3fs would read another version of another object
    re.I,
)
_KEYS_AS_WRITTEN = {"s3", "s3a", "gs", "gcs", "file", "local"}  # whose paths are names, in which ? and # mean nothing
_HOST_AND_PORT = re.compile(r"(?:\[[0-9a-f:.]*\]|[^:]*):[0-9]{1,5}", re.I)
_BUCKETS = {
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "adl",
    "hf",
    "oss",
}  # their URIs begin with a bucket, without a port
_CONTAINERS = {"abfs", "abfss"}  # their URIs have a container before `@`
_SENTENCE_END = re.compile(r"[.!?](?= )")
_MOST_ENCODED = 4  # how often text is percent-decoded in the search for a secret


def printable(text: str) -> str:
    """Text with escapes for characters that control a terminal, begin a line or change the writing direction."""
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def in_lines(lines: Iterable[str]) -> str:
    """Join lines; line breaks and control characters within a line are escaped."""
    return "\n".join(map(printable, lines))


def in_one_line(text: object, most: int = 200) -> str:
    """The text of an object, such as a library's error, without line breaks and cut to `most` characters."""
    return " ".join(str(text).split())[:most]


def whole_sentences(text: object, most: int = 300) -> str:
    """The text of a library's error in one line, cut after a sentence; `…` marks a first sentence that is too long."""
    line = " ".join(str(text).split())
    if len(line) <= most:
        return line
    ends = [end.end() for end in _SENTENCE_END.finditer(line, 0, most + 1)]
    if ends and ends[-1] >= most // 4:
        return line[: ends[-1]]
    return f"{line[:most].rpartition(' ')[0] or line[:most]} …"


def number_of(count: float, noun: str) -> str:
    """A number with its noun: `1 shard`, `1,000 shards`, `0.5 days`, `2 classes`, `2 queries`."""
    return f"{count:,g} {agree(count, noun)}" if isinstance(count, float) else f"{count:,} {agree(count, noun)}"


def agree(count: float, one: str, many: str = "") -> str:
    """The word that stands with a number, such as `is` or `are`; of a noun, the plural need not be given."""
    return one if count == 1 else many or _plural_of(one)


def _plural_of(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else f"{noun}s"


def size_of(count: float) -> str:
    """A number of bytes in the unit that fits it, to three digits: `12 bytes`, `1.5 kB`, `88.2 MB`, `1.07 GB`."""
    units = ("kB", "MB", "GB", "TB", "PB")
    if count < 999.5:
        return number_of(round(count), "byte")
    power = next((power for power in range(1, len(units)) if count < 999.5 * 1000**power), len(units))
    value = count / 1000**power
    digits = max(0, 2 - (value >= 9.995) - (value >= 99.95))
    text = f"{value:,.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {units[power - 1]}"


def counted(counts: Mapping[str, int]) -> str:
    """`1,000 samples, 1 reject`, from counts by nouns in the plural that end in `s`."""
    return ", ".join(number_of(number, name.removesuffix("s")) for name, number in counts.items())


def utc(moment: float | None = None) -> str:
    """A time in seconds since 1970, or now, in ISO 8601 to the second."""
    when = datetime.now(UTC) if moment is None else datetime.fromtimestamp(moment, UTC)
    return when.isoformat(timespec="seconds")


def span(seconds: float) -> str:
    """A duration as `minutes:seconds`, or as `hours:minutes:seconds` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def rough_span(seconds: float) -> str:
    """An estimated duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {number_of(round(seconds / 60), 'minute')}" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def redacted(text: str) -> str:
    """Text whose URIs have no user, password or parameters (such as a signature): `…` stands in their place."""
    pieces, start = [], 0
    for scheme, begin, end in _bodies(text):
        pieces += [text[start:begin], _redacted_body(scheme, text[begin:end])]
        start = end
    return "".join([*pieces, text[start:]])


def holds_secret(uri: str) -> bool:
    """True if a URI, or one URI of a chain, holds a password, a token or a signature.

    In the name of an object or a file, `?version=1` is none; on the web, any parameter may be one.
    """
    return any(
        _holds_secret(scheme, uri[begin:end], _signing if scheme in _KEYS_AS_WRITTEN else _parameters)
        for scheme, begin, end in _bodies(uri)
    )


def may_hold_secret(uri: str) -> bool:
    """True also for parameters of unknown names in any URI. Keys in tables depend on it, so that it must not change."""
    return any(_holds_secret(scheme, uri[begin:end], _parameters) for scheme, begin, end in _bodies(uri))


def without_secrets(value: Any) -> Any:
    """Plain data (dictionaries, lists, text, numbers) in which all text is `redacted`."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted(key) if isinstance(key, str) else key: without_secrets(item) for key, item in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def _bodies(text: str) -> list[tuple[str, int, int]]:
    """For each URI in a text: its scheme, and where the part after `://` begins and ends at the latest."""
    marks = list(_MARK.finditer(text)) if "/" in text or "%" in text else []
    schemes = [_SCHEME.search(text[max(0, mark.start() - 32) : mark.start()]) for mark in marks]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        (scheme[0].lower() if scheme else "", mark.end(), end)
        for mark, scheme, end in zip(marks, schemes, ends[: len(marks)], strict=True)
    ]


def _holds_secret(scheme: str, body: str, parameters: Callable[[str], int | None]) -> bool:
    """True if the part after `://` holds a secret, as it is or percent-decoded."""
    for form in _decodings(body):
        user = form[: _user_length(scheme, form)]
        if ":" in user or (user and scheme in ("http", "https")) or parameters(form) is not None:
            return True
    return False


def _decodings(body: str) -> list[str]:
    """The text as it is, and percent-decoded once, twice and so on until nothing is left to decode."""
    forms = [body]
    while len(forms) < _MOST_ENCODED and "%" in forms[-1] and (decoded := unquote(forms[-1])) != forms[-1]:
        forms.append(decoded)
    return forms


def _redacted_body(scheme: str, body: str) -> str:
    """The part after `://`, redacted. A URI in a text ends at a space; one without a password also at a quote."""
    length = _user_length(scheme, re.split(r"\s", body, maxsplit=1)[0])
    token = re.split(r"[\s\"'<>]", body[length:], maxsplit=1)[0]
    user, rest = "…" * bool(length), body[length + len(token) :]
    if (begin := _parameters(token)) is not None:
        return f"{user}{token[: begin + 1]}…{rest}"
    if any(_user_length(scheme, form) or _parameters(form) is not None for form in _decodings(token)[1:]):
        return f"{user}…{rest}"
    return f"{user}{token}{rest}"


def _parameters(body: str) -> int | None:
    """The position of the `?`, `#`, `;` or `&` where parameters begin; None where there are none."""
    query = body.find("?")
    positions = [query] if query >= 0 and "=" in body[query:] else []
    if parameter := _PARAMETER.search(body):
        positions.append(parameter.start())
    return min(positions, default=None)


def _signing(body: str) -> int | None:
    """The position of the first parameter that signs a URL or logs somebody in; None where there is none."""
    return next((parameter.start() for parameter in _QUERY.finditer(body) if _SIGNS.fullmatch(parameter[1])), None)


def _user_length(scheme: str, body: str) -> int:
    """The length of user and password, up to their `@`; 0 without them. A password may hold `/`, `?` and `@`."""
    host = re.split(r"[/?#]", body, maxsplit=1)[0]
    if _HOST_AND_PORT.fullmatch(host) and scheme not in _BUCKETS:
        return 0
    if ":" in host and "@" in body[host.index(":") :] and not host.startswith("["):
        return body.rindex("@")
    return 0 if scheme in _CONTAINERS else max(0, host.rfind("@"))
