"""Pages at the width of a phone, in a real browser: nothing important is off-screen, and names break at their joints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Tab, started_browser
from lora_embed.evaluate.page.evaluation import write_report
from lora_embed.monitor.record import RejectExample, RunRecord
from lora_embed.monitor.timeline import Reading
from lora_embed.report.page import write
from lora_embed.report.run import run_page
from lora_embed.search.index import Hit
from lora_embed.search.page import write_page
from lora_embed.search.search import Found
from samples import encoded, noise
from whole_evaluation import whole_evaluation

WIDTH = 390
LONG = "the image processor prepares images in another way than before, which is said here in a long sentence. " * 3
# The lowest end of the text of each card, and where the card ends.
CARDS = """[...document.querySelectorAll('SECTION .cards tbody tr')].map(row => {
    const range = document.createRange(); range.selectNodeContents(row);
    const cells = [...row.children].filter(cell => cell.offsetParent).map(cell => cell.getBoundingClientRect());
    const text = [...range.getClientRects()].filter(rect => rect.width);
    return [Math.min(...cells.map(cell => cell.left)), Math.max(...cells.map(cell => cell.right)),
            row.getBoundingClientRect().bottom - Math.max(...text.map(rect => rect.bottom)), row.innerText]})"""
# Each place where the text of a name goes on in the next line after a character that is no joint.
BROKEN = """(() => { const broken = []; for (const name of document.querySelectorAll('bdi')) {
    const walk = document.createTreeWalker(name, NodeFilter.SHOW_TEXT); let before = null, letters = '';
    for (let node = walk.nextNode(); node; node = walk.nextNode()) for (let at = 0; at < node.length; at++) {
        const range = document.createRange(); range.setStart(node, at); range.setEnd(node, at + 1);
        const rect = range.getBoundingClientRect();
        if (!rect.width) { letters += node.data[at].trim() ? '' : ' '; continue; }
        if (before && rect.top >= before.bottom - 3 && !/[ _./…-]$/.test(letters)) broken.push(letters);
        before = rect; letters += node.data[at]; } }
    return broken })()"""


def record() -> RunRecord:
    """A run with checks of long words, and rejects of long names."""
    gate = {"value": 0.123, "limit": 0.5, "direction": "at most", "holds": True, "says": LONG, "details": ["a", LONG]}
    return RunRecord(
        run_id="20261127T010203Z-abcdef", started="2026-11-27T01:02:03+00:00", seconds=61.0, outcome="published", version=3,
        job={"table": "s3://bucket/table", "input": ["s3://bucket/images_of_the-year/2026.tar"], "recipe": "r.yaml"},
        encoder={"space_id": "0" * 12, "recipe_id": "1" * 12, "dimension": 384}, bound={}, stages={"forward": 3.0}, embedded=9,
        layout={"carry": [["theme", "string"], ["price", "float64"]], "max_bytes": 2**30, "max_pixels": 10**8, "limit": None},
        workers={"actors": 2, "decoders": 0, "cpus_per_decoder": 1.0}, readings=(Reading(elapsed_s=0.0, samples=0),),
        gates={"rejects": gate, "passed_over": gate | {"holds": False}}, rejects={"not_an_image": 1},
        examples=(RejectExample(id="shards/2026-11_phones.tar/img_0001.final-cut", reason="not_an_image", detail=LONG[:110]),),
    )  # fmt: skip


def found() -> Found:
    """Twelve hits, whose names have one line, two or three."""
    names = [f"shards_of-2026/{'nested-folder_' * (number % 3)}{number}.tar/img_{number:05d}" for number in range(12)]
    hits = tuple(Hit(id=name, score=0.9 - number / 100, shard="", key="") for number, name in enumerate(names))
    picture = encoded(noise(seed=1), "JPEG")
    facts = {
        "image": "/data/queries_of/an-apple.png",
        "table": "s3://bucket/table",
        "version": 2,
        "current": 2,
        "space_id": "0" * 12,
    }
    return Found(**facts, method="exact", count=900, hits=hits, data=picture)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in ("evaluation", "run", "search")}
    write_report(whole_evaluation(lambda name: f"adapters/run_{name}-final.v2"), paths["evaluation"])
    write(run_page(record()), paths["run"])
    result = found()
    write_page(result, {hit.id: result.data for hit in result.hits[:11]}, paths["search"])
    return paths


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with started_browser() as browser:
        yield browser.tab()


def cards(tab: Tab, section: str) -> list[list[Any]]:
    found_cards: list[list[Any]] = tab.ask(CARDS.replace("SECTION", section))
    return found_cards


def test_verdict_and_interval_of_the_main_table_need_no_scrolling(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["evaluation"], width=WIDTH)
    rows = cards(tab, "#scores")
    assert len(rows) == 6
    assert all(left >= 0 and right <= WIDTH for left, right, _, _ in rows)
    words = [text.split() for *_, text in rows]
    assert [("▲" in text, "▼" in text, "≈" in text) for text in words].count((False, False, False)) == 2  # the reference
    shown = "[...document.querySelectorAll('#scores .cards svg.row')].map(one => one.getBoundingClientRect().right)"
    assert len(tab.ask(shown)) == 8
    assert max(tab.ask(shown)) <= WIDTH
    labels = "getComputedStyle(document.querySelector('#scores .cards td'), '::before').content"
    assert tab.ask(labels) == '"Percent"'


@pytest.mark.parametrize("dark", [False, True])
def test_what_scrolls_has_a_shadow_at_its_edge(pages: dict[str, Path], tab: Tab, *, dark: bool) -> None:
    tab.open(pages["evaluation"], width=WIDTH, dark=dark)
    tab.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    scrolling = """[...document.querySelectorAll('*')].filter(one => one.scrollWidth > one.clientWidth + 1
        && ['auto', 'scroll'].includes(getComputedStyle(one).overflowX)).map(one => [one.className || one.localName,
        getComputedStyle(one).backgroundImage.split('linear-gradient').length - 1,
        getComputedStyle(one).backgroundAttachment])"""
    rows = tab.ask(scrolling)
    assert {name for name, *_ in rows} == {"ul", "scroll"}
    assert {(shadows, attached) for _, shadows, attached in rows} == {(4, "local, local, scroll, scroll")}


@pytest.mark.parametrize(
    ("page", "section", "count"), [("run", "#checks", 2), ("run", "#rejects", 1), ("evaluation", "#heads", 4)]
)
def test_cards_hold_no_blank(pages: dict[str, Path], tab: Tab, page: str, section: str, count: int) -> None:
    tab.open(pages[page], width=WIDTH)
    rows = cards(tab, section)
    assert len(rows) == count
    for left, right, blank, text in rows:
        assert left >= 0
        assert right <= WIDTH
        assert 0 < blank < 20, text


@pytest.mark.parametrize("width", [WIDTH, 1280])
def test_the_rows_of_a_search_line_up(pages: dict[str, Path], tab: Tab, width: int) -> None:
    tab.open(pages["search"], width=width)
    places = tab.ask("""[...document.querySelectorAll('.found:last-child figure')].map(one => {
        const rect = one.getBoundingClientRect(); return [Math.round(rect.left), Math.round(rect.top)] })""")
    rows = [[left for left, top in places if top == at] for at in dict.fromkeys(top for _, top in places)]
    assert len(places) == 12
    assert len(rows[0]) == (2 if width == WIDTH else 5)
    assert all(row == rows[0][: len(row)] for row in rows)
    query = tab.ask("document.querySelector('.found figure').getBoundingClientRect().left")
    assert round(query) == rows[0][0]


@pytest.mark.parametrize("page", ["evaluation", "run", "search"])
@pytest.mark.parametrize("width", [WIDTH, 1280])
def test_names_break_at_their_joints_and_not_within_words(pages: dict[str, Path], tab: Tab, page: str, width: int) -> None:
    tab.open(pages[page], width=width)
    assert tab.ask("document.scrollingElement.scrollWidth") <= width
    assert tab.ask("document.querySelectorAll('bdi wbr').length") > 3
    assert tab.ask(BROKEN) == []


def test_the_check_of_names_sees_a_broken_word(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["search"], width=WIDTH)
    narrow = "one.style.display = 'inline-block', one.style.width = '2rem', one.style.overflowWrap = 'anywhere'"
    tab.ask(f"document.querySelectorAll('bdi').forEach(one => {{ {narrow} }})")
    assert len(tab.ask(BROKEN)) > 0


def test_neighbours_stand_in_whole_rows(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["evaluation"], width=WIDTH)
    rows = tab.ask("[...document.querySelectorAll('.near')].map(row => [row.scrollWidth - row.clientWidth, row.clientWidth])")
    assert len(rows) == 4
    assert all(beyond <= 0 and wide < WIDTH for beyond, wide in rows)


def test_settings_are_said_in_words(pages: dict[str, Path]) -> None:
    text = pages["run"].read_text()
    for said in ("theme (string), price (float64)", "1.07 GB", "100,000,000", "not set"):
        assert said in text
    for raw in ("1073741824", "[[", "&#34;string&#34;"):
        assert raw not in text
