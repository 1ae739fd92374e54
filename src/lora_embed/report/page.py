"""What all HTML pages share: the frame, the style, and the only way by which data becomes HTML.

A page is one file that asks for nothing: no script, no font, no picture from elsewhere, and its policy forbids them all.
"""

import base64
import binascii
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lora_embed.errors import StorageError
from lora_embed.text import printable

NAME_LENGTH = 72  # characters of a name that are shown before it is folded up


def escaped(text: object) -> str:
    """Anything as HTML text, fit for an attribute in quotes too."""
    return html.escape(printable(str(text)), quote=True)


def shortened(text: object, length: int = NAME_LENGTH) -> str:
    """At most `length` characters, the middle left out; not escaped yet."""
    shown = printable(str(text))
    if len(shown) <= length:
        return shown
    tail = length // 4
    return f"{shown[: length - tail - 1]}…{shown[-tail:]}"


def name(text: object, length: int = NAME_LENGTH) -> str:
    """A name as HTML, kept apart from the direction of the text around it; a long one opens when it is asked to."""
    shown = printable(str(text))
    if len(shown) <= length:
        return f"<bdi>{html.escape(shown)}</bdi>"
    short = html.escape(shortened(shown, length))
    return f'<details class="long"><summary><bdi>{short}</bdi></summary><bdi>{html.escape(shown)}</bdi></details>'


def brief(text: object, length: int = 28) -> str:
    """A name as HTML where nothing may open: in a caption, a summary or a column's head."""
    return f"<bdi>{html.escape(shortened(text, length))}</bdi>"


def moment(text: str) -> str:
    """A time in ISO 8601 as people read it, escaped."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return escaped(text)


def percentage(value: float, digits: int = 0) -> str:
    """A share in percent, with its sign."""
    return f"{100 * value:.{digits}f} %"


def code(text: object) -> str:
    """An id as HTML."""
    return f"<code>{escaped(text)}</code>"


def picture(jpeg_base64: str | None, alt: str) -> str:
    """A JPEG in base64 as HTML, or a box that says there is none."""
    if not jpeg_base64 or not _is_base64(jpeg_base64):
        return '<div class="none">no picture</div>'
    return f'<img src="data:image/jpeg;base64,{jpeg_base64}" alt="{escaped(alt)}" width="96" height="96">'


def _is_base64(text: str) -> bool:
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table: its head as HTML, and whether it holds figures, which stand on the right."""

    head: str
    is_number: bool = False


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]], *, marked: int | None = None) -> str:
    """A table of HTML cells whose first column names the rows; it scrolls by itself where the page is too narrow.

    `marked` is the number of a row to set off.
    """
    kinds = [' class="num"' if column.is_number else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{column.head}</th>' for column, kind in zip(columns, kinds, strict=True))
    body = []
    for number, row in enumerate(rows):
        first, *rest = row
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr{" class=marked" if number == marked else ""}><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption_text(caption)}"><table><caption><span>{caption}'
        f"</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def caption_text(caption: str) -> str:
    """A caption's HTML without its tags, for an attribute."""
    plain, inside = [], False
    for one in caption:
        inside = (inside or one == "<") and one != ">"
        if not inside and one != ">":
            plain.append(one)
    return "".join(plain).replace('"', "&quot;")


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """Content that opens when it is asked to; `summary` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{content}</details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and their values, both HTML, one a line."""
    return f'<dl class="facts">{"".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in pairs)}</dl>'


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page: what a link to it says, its heading and its content, as HTML. Without content it is left out."""

    anchor: str
    title: str
    content: str


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole page: `title` is text, `lead` HTML under the heading."""
    there = [section for section in sections if section.content]
    links = "".join(f'<li><a href="#{section.anchor}">{escaped(section.title)}</a></li>' for section in there)
    body = "\n".join(
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-h"><h2 id="{section.anchor}-h">'
        f"{escaped(section.title)}</h2>{section.content}</section>"
        for section in there
    )
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(there) > 1 else ""
    return _FRAME.format(title=escaped(title), policy=_POLICY, style=STYLE, lead=lead, nav=nav, body=body)


def write(text: str, out: Path) -> None:
    """Raises StorageError when it cannot be written."""
    try:
        out.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}). Name another file.") from None


# Colours of series are Okabe and Ito's (jfly.uni-koeln.de/color), darkened or lightened for the ground they stand on.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1c2128;--soft:#57606a;--rule:#d5dae1;--link:#0550ae;
--good:#0a6c47;--bad:#a33c00;--heat:0,92,168;
--c0:#0067a5;--c1:#b35900;--c2:#007a5a;--c3:#a3447c;--c4:#6a51a3;--c5:#7a6a00;--c6:#3d7f9e;--c7:#4d4d4d}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1b212a;--ink:#e8ebef;--soft:#a4aebb;--rule:#363f4b;
--link:#7cb7ff;--good:#4fd0a0;--bad:#ff9f5c;--heat:70,160,235;
--c0:#5cb3f0;--c1:#f0a04b;--c2:#3cc79a;--c3:#e58fc0;--c4:#b3a0f0;--c5:#e0d04a;--c6:#8fd3ef;--c7:#c3c9d1}}
*{box-sizing:border-box}
html{scroll-padding-top:3.5rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:70rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .35rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:0 0 .75rem;line-height:1.25}
h3{font-size:1.05rem;margin:1.75rem 0 .5rem;overflow-wrap:anywhere}
p{max-width:46rem;margin:.5rem 0 1rem}
p,li,summary,h4,figcaption,.tag{overflow-wrap:anywhere}
a{color:var(--link)}
.hid{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.skip{position:absolute;left:-999px}
.skip:focus{left:1rem;top:.5rem;background:var(--bg);padding:.5rem 1rem;z-index:3;outline:2px solid var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.lead,.soft,figcaption small{color:var(--soft)}
nav{position:sticky;top:0;z-index:2;background:var(--bg);border-bottom:1px solid var(--rule);margin-top:1.25rem}
nav ul{list-style:none;display:flex;gap:1.25rem;max-width:70rem;margin:0 auto;padding:.6rem 1.25rem;overflow-x:auto;
white-space:nowrap;font-size:.9rem}
@media (min-width:40rem){nav ul{flex-wrap:wrap;gap:.1rem 1.25rem}}
nav a{text-decoration:none;display:inline-block;padding:.15rem 0}
nav a:hover{text-decoration:underline}
section{margin:2.5rem 0 3rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:0 0 1.25rem;padding:0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.7rem .9rem;min-width:0}
.tiles dt{color:var(--soft);font-size:.85rem}
.tiles dd{margin:0;font-size:1.35rem;font-weight:600;overflow-wrap:anywhere;line-height:1.3}
.tiles dd small{font-size:.8rem;font-weight:400;color:var(--soft);display:block}
ul.says{padding-left:1.2rem;max-width:52rem}
ul.says li{margin:.35rem 0}
.scroll{overflow-x:auto;margin:.75rem 0 1.25rem;border:1px solid var(--rule);border-radius:.6rem;width:fit-content;
max-width:100%;position:relative}
table{border-collapse:separate;border-spacing:0;min-width:19rem;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.65rem .8rem;color:var(--soft);background:var(--card);border-bottom:1px solid var(--rule)}
caption span{display:inline-block;position:sticky;left:.8rem;max-width:calc(100vw - 4rem)}
th,td{text-align:left;padding:.45rem .8rem;vertical-align:top;border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:600;vertical-align:bottom;white-space:nowrap}
tbody th{font-weight:600;min-width:8rem;max-width:22rem;overflow-wrap:anywhere;position:sticky;left:0;background:var(--bg);
z-index:1}
td{max-width:26rem;overflow-wrap:break-word}
td:not(.num){min-width:7.5rem}
dd bdi,dd code,details.long{overflow-wrap:anywhere}
td code{white-space:nowrap}
.num{text-align:right;white-space:nowrap}
td small,th small{display:block;color:var(--soft);font-size:.8rem;font-weight:400}
.marked>*{background:var(--card)}
.tag{font-size:.72rem;font-weight:600;border:1px solid var(--rule);border-radius:1rem;padding:.05rem .45rem;color:var(--soft)}
.better{color:var(--good);font-weight:600;white-space:nowrap}
.worse{color:var(--bad);font-weight:600;white-space:nowrap}
.noise{color:var(--soft);white-space:nowrap}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:.6rem 0;min-width:0}
summary{cursor:pointer;padding:.2rem 0}
details.long{margin:0;display:inline-block;max-width:100%}
details.long[open]{font-weight:400;max-height:12rem;overflow-y:auto}
.facts{margin:0 0 1rem}
.facts div{display:grid;grid-template-columns:minmax(7rem,13rem) minmax(0,1fr);gap:1rem;padding:.4rem 0;
border-bottom:1px solid var(--rule)}
.facts dt{color:var(--soft)}
.facts dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20.5rem),1fr));gap:1rem;margin:1rem 0}
.charts figure,.beside figure{margin:0;border:1px solid var(--rule);border-radius:.6rem;padding:.7rem .7rem .5rem;min-width:0;
background:var(--bg)}
figure>figcaption{font-size:.9rem;font-weight:600;overflow-wrap:anywhere}
figure>figcaption small{display:block;font-weight:400}
svg{display:block;width:100%;height:auto;max-width:100%;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg.row{width:15rem;max-width:none}
svg text{fill:var(--ink)}
svg .soft{fill:var(--soft)}
svg .halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
svg .ring{fill:none;stroke:var(--ink);stroke-width:1.5}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .ref{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
svg .mark{stroke:var(--bg);stroke-width:1}
svg .hollow{fill:var(--bg)!important;stroke-width:2}
svg .f0{fill:var(--c0)}svg .f1{fill:var(--c1)}svg .f2{fill:var(--c2)}svg .f3{fill:var(--c3)}
svg .f4{fill:var(--c4)}svg .f5{fill:var(--c5)}svg .f6{fill:var(--c6)}svg .f7{fill:var(--c7)}
svg .l0{stroke:var(--c0)}svg .l1{stroke:var(--c1)}svg .l2{stroke:var(--c2)}svg .l3{stroke:var(--c3)}
svg .l4{stroke:var(--c4)}svg .l5{stroke:var(--c5)}svg .l6{stroke:var(--c6)}svg .l7{stroke:var(--c7)}
svg .good{fill:var(--good);stroke:var(--good)}svg .bad{fill:var(--bad);stroke:var(--bad)}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem .9rem;padding:0;margin:.4rem 0 0;font-size:.82rem;color:var(--soft)}
.key li{display:flex;align-items:center;gap:.35rem;min-width:0;overflow-wrap:anywhere}
.key svg{width:1rem;height:1rem;flex:none}
.beside{display:flex;flex-wrap:wrap;gap:0 1rem;align-items:flex-start;margin-bottom:.5rem}
.beside figure{width:21rem;max-width:100%;margin:.75rem 0 0!important}
.heat{max-width:44rem}
.heat td,.heat thead th{text-align:center;min-width:4.5rem}
.h1{background:rgba(var(--heat),.06)}.h2{background:rgba(var(--heat),.12)}.h3{background:rgba(var(--heat),.18)}
.h4{background:rgba(var(--heat),.24)}.h5{background:rgba(var(--heat),.3)}.h6{background:rgba(var(--heat),.36)}
.sheet{border:1px solid var(--rule);border-radius:.6rem;padding:.9rem;margin:1rem 0;display:grid;
grid-template-columns:8rem minmax(0,1fr);gap:.4rem 1rem}
.sheet h3{grid-column:1/-1;margin:0}
.sheet h4{margin:.2rem 0 .3rem;font-size:.9rem;font-weight:600}
.near{list-style:none;display:grid;grid-auto-flow:column;grid-auto-columns:6.4rem;gap:.5rem;padding:4px;margin:0;
overflow-x:auto}
.near figure,.query{margin:0;font-size:.8rem;line-height:1.3}
.near img,.near .none,.query img,.query .none{display:block;width:6rem;height:6rem;object-fit:contain;border-radius:.5rem;
background:#fff;border:3px solid var(--rule);color:#57606a}
.none{display:grid!important;place-items:center;font-size:.75rem;background:var(--card)!important;color:var(--soft)!important}
.near .right img,.near .right .none{border-color:var(--good)}
.near .wrong img,.near .wrong .none{border-style:dashed;border-color:var(--bad)}
.near figcaption,.query figcaption{overflow-wrap:anywhere;margin-top:.25rem;font-weight:400;font-size:.8rem}
.right b{color:var(--good)}.wrong b{color:var(--bad)}
.found{display:flex;flex-wrap:wrap;gap:1rem}
.found figure{margin:0;width:10rem}
.found figure:first-child{margin-right:1.5rem}
.found img,.found .none{width:10rem;height:10rem;border-radius:.5rem}
.found figcaption{font-size:.82rem;font-weight:400;overflow-wrap:anywhere}
.alert{border-left:4px solid var(--bad);background:var(--card);padding:.7rem 1rem;border-radius:.3rem;white-space:pre-wrap;
overflow-wrap:anywhere}
footer{color:var(--soft);font-size:.85rem;padding-bottom:2rem}
@media (max-width:40rem){body{font-size:15px}header,main,footer,nav ul{padding-left:.9rem;padding-right:.9rem}
.sheet{grid-template-columns:minmax(0,1fr)}.facts div{grid-template-columns:minmax(0,1fr);gap:0}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}tbody th{min-width:8.2rem;max-width:8.5rem;padding-right:.4rem}}
@media print{:root{color-scheme:light;--bg:#fff;--card:#f6f7f9;--ink:#000;--soft:#444;--rule:#bbb;--link:#000;--good:#0a6c47;
--bad:#a33c00;--heat:0,92,168;--c0:#0067a5;--c1:#b35900;--c2:#007a5a;--c3:#a3447c;--c4:#6a51a3;--c5:#7a6a00;--c6:#3d7f9e;
--c7:#4d4d4d}nav,.skip{display:none}.scroll{overflow:visible;border:0}table{font-size:.75rem}body{font-size:11pt}
.near{overflow:visible;grid-auto-columns:minmax(0,1fr)}.near img,.near .none{width:100%;height:auto;aspect-ratio:1}
figure,.sheet,tr{break-inside:avoid}h2,h3{break-after:avoid}section{margin:1.5rem 0}*{print-color-adjust:exact}}
"""
_POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style></head><body>
<a class="skip" href="#content">Skip to content</a>
<header><h1>{title}</h1>{lead}</header>
{nav}
<main id="content" tabindex="-1">
{body}
</main>
<footer>Made by lora-embed. This file is whole by itself: it loads nothing and runs no script.</footer>
</body></html>
"""
