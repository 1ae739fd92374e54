"""The report of an evaluation: what it says, and how it behaves in a real browser, with hostile names too."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import count
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from browser import Tab, axe, started_browser
from evaluations import evaluation
from lora_embed.errors import StorageError
from lora_embed.evaluate.page.evaluation import evaluation_page, write_report
from lora_embed.evaluate.page.plots import class_changes, relations, scores, trial_scores, weight_curves
from lora_embed.evaluate.page.trials import best_of
from lora_embed.evaluate.records import Evaluation
from lora_embed.report.charts import Stack, scale
from lora_embed.report.page import PACKAGE, environment, page, render, shortened
from lora_embed.text import printable
from pages import plain_text, whole_names

HOSTILE = [
    "<script>window.hacked=1;alert(1)</script>",
    "\"'><img src=x onerror='window.hacked=1'>",
    "</style></title></svg><svg onload=window.hacked=1>",
    "javascript:window.hacked=1",
    "x" * 500,
    "ملف صورة شلوم שלום",
    "\u202egpj.exe\u202c\u2066\x1b[31m\x00\ud800",
    "&lt;b&gt; &amp; {title} %s $x_1$ {{ 7 * 7 }} {% raw %}",
]


@cache
def hostile(text: str) -> str:
    """A name in the next dress, the same name always in the same one."""
    return f"{HOSTILE[next(_DRESSES) % len(HOSTILE)]}{text}"


_DRESSES = count()


class Tables(HTMLParser):
    """Rows of a page's tables by caption, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._caption: str | None = None
        self._rows: list[list[str]] = []
        self._into: str | None = None
        self.feed(whole_names(text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self._caption, self._rows, self._into = "", [], tag
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            self._into = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "th", "td"):
            self._into = None
            if self._rows and self._rows[-1]:
                self._rows[-1][-1] = " ".join(self._rows[-1][-1].split())
        elif tag == "table" and self._caption is not None:
            self.tables[self._caption] = self._rows[1:]

    def handle_data(self, data: str) -> None:
        if self._into == "caption" and self._caption is not None:
            self._caption += data
        elif self._into is not None and self._rows and self._rows[-1]:
            self._rows[-1][-1] += f" {data}" if self._rows[-1][-1] else data


def rows_of(text: str, begins: str) -> list[list[str]]:
    found = [rows for caption, rows in Tables(text).tables.items() if caption.startswith(begins)]
    assert len(found) == 1, f"{begins}: {sorted(Tables(text).tables)}"
    return found[0]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with started_browser() as browser:
        yield browser.tab()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    paths = {"plain": folder / "plain.html", "hostile": folder / "hostile.html"}
    write_report(evaluation(), paths["plain"])
    write_report(evaluation(hostile), paths["hostile"])
    return paths


def test_each_figure_has_its_interval_and_its_verdict_in_words() -> None:
    rows = rows_of(evaluation_page(evaluation()), "kNN accuracy on category")
    assert [row[0].split()[0] for row in rows] == ["base", "halves", "ties"]
    assert [row[1] for row in rows] == ["70.0 68.6 to 71.4", "73.1 71.7 to 74.5", "68.8 67.4 to 70.2"]
    assert [row[2] for row in rows] == ["–", "+3.1 +2.1 to +4.1", "−1.2 −2.2 to −0.2"]
    assert [row[3] for row in rows] == ["", "▲ better", "▼ worse"]
    assert rows[0][0] == "base reference"
    text = plain_text(evaluation_page(evaluation()))
    assert "On task group the best encoder is merge ties , with 65.5 % kNN accuracy (95 % interval 64.1 to 66.9)" in text


def test_every_part_of_the_evaluation_is_in_the_report() -> None:
    text = evaluation_page(evaluation())
    found = Tables(text)
    anchors = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert anchors == [
        "summary", "scores", "merged", "heads", "classes", "search", "relations", "neighbours", "time", "lineage",
    ]  # fmt: skip
    merged = rows_of(text, "What was merged")
    assert merged[2][1:4] == ["ties density 0.2", "ten 1 more 1", "384"]
    assert merged[2][5] == "88 MB"
    assert [row[-1] for row in merged] == [one.space_id for one in evaluation().candidates]
    kept = rows_of(text, "Accuracy of the adapters' own heads")
    assert kept[0][2:] == ["80.0", "76.0", "95 %", "−4.0 −6.0 to −2.0"]
    losses = rows_of(text, "Largest losses and gains on category")
    assert [(row[0], row[1]) for row in losses] == [
        ("flags", "−30.0"),
        ("food", "−10.0"),
        ("symbols", "+15.0"),
        ("activities", "+40.0"),
    ]
    assert len(rows_of(text, "All classes of category")) == 5
    assert len(rows_of(text, "All trials")) == 12
    assert [row[1:] for row in rows_of(text, "CKA")] == [
        ["–", "0.900", "0.800"],
        ["0.900", "–", "0.700"],
        ["0.800", "0.700", "–"],
    ]
    assert rows_of(text, "Cosine by layer")[1] == ["encoder.layer.1.query.weight", "0.130"]
    assert rows_of(text, "Images that could not be embedded")[0] == ["corrupt_image", "2", "0.40 % of all"]
    shown = [attributes["href"] for tag, attributes in found.tags if tag == "use"]
    assert len(shown) == 2 * (1 + 3 + 4)
    assert text.count("no picture") == 2  # of the two neighbours that have no thumbnail
    assert text.count('aria-label="right"') == 2 * 2


def test_a_picture_stands_in_the_page_once_however_often_it_is_shown() -> None:
    found = evaluation()
    once = evaluation_page(found)
    often = evaluation_page(replace(found, queries=found.queries * 20))
    assert once.count("data:image/jpeg;base64,") == often.count("data:image/jpeg;base64,") == 6 == len(found.thumbnails)
    assert often.count("<use ") == 20 * once.count("<use ") == 20 * 16
    shown = {attributes["href"] for tag, attributes in Tables(often).tags if tag == "use"}
    assert shown == {f"#{attributes['id']}" for tag, attributes in Tables(often).tags if tag == "image"}


def test_a_class_of_few_queries_is_marked() -> None:
    found = evaluation()
    classes = (*found.classes, replace(found.classes[0], label="many", images=90))
    rows = {row[0]: row[-1] for row in rows_of(evaluation_page(replace(found, classes=classes)), "All classes of category")}
    assert (rows["flags"], rows["many"]) == ("40 few", "90")  # a third of them are queries in a split


def test_a_split_of_the_user_s_own_is_not_said_to_have_seeds() -> None:
    own = plain_text(evaluation_page(replace(evaluation(), splits=1)))
    assert "Your own split divides the labelled images into a bank (67 %) and queries." in own
    assert "1 split each" in own
    assert "seed" not in own.partition("What was merged")[0]
    assert "5 times with different seeds" in plain_text(evaluation_page(evaluation()))


def test_a_search_draws_each_method_s_curve_and_names_the_best_trial() -> None:
    found = evaluation()
    best = best_of(found)
    assert best is not None
    assert best.objective == max(trial.objective for trial in found.trials)
    text = whole_names(evaluation_page(found))
    assert rows_of(text, "All trials")[0][0] == str(best.number)
    for method in ("weighted_sum", "ties"):
        figure = text.split(f"<bdi>{method}: share of ten</bdi>")[1].split("</figure>")[0]
        assert figure.count('<path class="line') == 2  # one for each task: all else is the same
        assert figure.count("<title>trial") == 12
    one, other = replace(found.trials[1], options={"density": 0.9}), found.trials[0]
    mixed = whole_names(evaluation_page(replace(found, trials=(one, other, *found.trials[2:]))))
    assert '<path class="line' not in mixed.split("<bdi>weighted_sum: share of ten</bdi>")[1].split("</figure>")[0]


def test_an_evaluation_of_scores_alone_has_no_empty_sections() -> None:
    found = evaluation()
    bare = Evaluation(
        **{of: getattr(found, of) for of in found.__dataclass_fields__ if of not in
           ("retention", "classes", "relations", "queries", "trials", "thumbnails")}
    )  # fmt: skip
    anchors = [attributes["id"] for tag, attributes in Tables(evaluation_page(bare)).tags if tag == "section"]
    assert anchors == ["summary", "scores", "merged", "time", "lineage"]


def test_names_are_escaped_short_and_keep_their_direction() -> None:
    name = environment().get_template("report/templates/parts.html").module.name
    assert name("<b>&\"'") == "<bdi>&lt;b&gt;&amp;&#34;&#39;</bdi>"
    assert "\u202e" not in name("\u202eabc")
    assert "\\u202eabc" in name("\u202eabc")
    assert name("lora_em/<b>.tar") == "<bdi>lora_<wbr>em/<wbr>&lt;b&gt;.<wbr>tar</bdi>"
    long = name("y" * 500)
    assert long.startswith("<details")
    assert "y" * 500 in long
    assert shortened("ab" * 50, 20) == "ababababababab…babab"
    text = whole_names(evaluation_page(evaluation(hostile)))
    escaped = environment().from_string("{{ text|printable }}")
    assert [dress for dress in HOSTILE if escaped.render(text=dress) not in text] == []
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b\ud800]", text)
    tags = Tables(text).tags
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "link", "base", "form"}
    assert not [attribute for _, attributes in tags for attribute in attributes if attribute.startswith("on")]
    assert {(attributes["href"] or "")[:22] for tag, attributes in tags if tag == "image"} == {"data:image/jpeg;base64"}
    assert all((attributes["href"] or "").startswith("#p") for tag, attributes in tags if tag == "use")
    assert all((attributes["href"] or "").startswith("#") for tag, attributes in tags if tag == "a")


def test_only_the_frame_takes_text_as_html_and_a_value_that_is_missing_is_an_error() -> None:
    templates = [path for path in PACKAGE.rglob("templates/**/*.html") if re.search(r"safe\b|autoescape", path.read_text())]
    assert [path.name for path in templates] == ["frame.html"]
    with pytest.raises(UndefinedError, match="'best' is undefined"):
        render("evaluate/page/templates/search.html", evaluation=evaluation())


def test_a_thumbnail_that_is_no_base64_is_left_out() -> None:
    found = evaluation()
    hostile_picture = dict.fromkeys(found.thumbnails, 'AAAA" onerror="alert(1)')
    text = evaluation_page(replace(found, thumbnails=hostile_picture))
    assert "onerror" not in text
    assert "<image" not in text
    assert "<use" not in text


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(evaluation(), tmp_path / "absent" / "report.html")


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.612, 0.745], (0.6, 0.65, 0.7, 0.75)),
        ([0.0, 12.0], (0.0, 2.5, 5.0, 7.5, 10.0, 12.5)),
        ([3.0, float("nan")], None),
        ([], None),
    ],
)
def test_scales_have_round_ticks_that_hold_all_values(values: list[float], ticks: tuple[float, ...] | None) -> None:
    found = scale(values, 0, 100)
    assert ticks is None or found.ticks == pytest.approx(ticks)
    assert len(found.ticks) >= 2
    assert all(found.low <= value <= found.high for value in values if value == value)
    assert (found.at(found.low), found.at(found.high)) == (0, 100)


def test_parts_of_a_stack_stand_on_each_other() -> None:
    stack = Stack(start=0, end=1, heights={"read": 1.0, "decode": 2.0, "write": 0.5})
    assert stack.lower_edges() == [("read", 0.0, 1.0), ("decode", 1.0, 2.0), ("write", 3.0, 0.5)]


@pytest.mark.parametrize("kind", ["plain", "hostile"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (375, True)])
def test_a_browser_shows_it_without_a_complaint_a_request_or_an_overflow(
    kind: str, width: int, dark: bool, written: dict[str, Path], tab: Tab
) -> None:
    tab.open(written[kind], width=width, dark=dark)
    for _ in range(2):  # as it opens, then with everything unfolded
        assert tab.ask("document.scrollingElement.scrollWidth") <= width
        tab.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    images = "[...document.querySelectorAll('image')].map(image => image.decode().then(() => image.href.baseVal.length > 99))"
    assert tab.ask(f"Promise.all({images})") == [True] * 6
    shown = "[...document.querySelectorAll('use')].map(shown => document.querySelector(shown.href.baseVal).localName)"
    assert tab.ask(shown) == ["image"] * 16
    assert tab.ask("'hacked' in window") is False
    assert [url for url in tab.requests() if not url.startswith("data:image/jpeg")] == [written[kind].as_uri()]
    assert tab.complaints() == []
    ground = tab.ask("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")  # so the style's hash is right, too


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (375, False)])
def test_axe_finds_nothing_serious(width: int, dark: bool, written: dict[str, Path], tab: Tab) -> None:
    tab.open(written["plain"], width=width, dark=dark)
    tab.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    tab.ask(f"{axe()}; 0")
    found = tab.ask("axe.run().then(found => found.violations.map(one => [one.impact, one.id, one.nodes[0].html, one.help]))")
    assert [one for one in found if one[0] in ("serious", "critical")] == []
    assert tab.ask("axe.run().then(found => found.passes.length)") > 15


def test_a_keyboard_reaches_all_of_it(written: dict[str, Path], tab: Tab) -> None:
    tab.open(written["plain"], width=1280)
    tab.press("Tab", 9)
    assert tab.ask("document.activeElement.textContent") == "Skip to content"
    assert tab.ask("document.activeElement.getBoundingClientRect().left") >= 0
    tab.press("Tab", 9)
    assert tab.ask("document.activeElement.textContent") == "In short"
    stops = "[...document.querySelectorAll('a, summary, [tabindex=\"0\"]')]"
    closed = f"{stops}.find(one => one.matches('summary') && !one.parentElement.open)"
    tab.ask(f"window.summary = {closed}; summary.focus()")
    tab.press(" ", 32)
    assert tab.ask("summary.parentElement.open") is True
    scrolling = "[...document.querySelectorAll('*')].filter(one => one.scrollWidth > one.clientWidth + 1 && "
    scrolling += "['auto', 'scroll'].includes(getComputedStyle(one).overflowX))"
    assert tab.ask(f"{scrolling}.filter(one => one.tabIndex !== 0 && one.tagName !== 'UL').length") == 0


def test_what_the_policy_forbids_is_refused_and_seen(written: dict[str, Path], tmp_path: Path, tab: Tab) -> None:
    """The checks above see what they look for."""
    text = written["plain"].read_text(encoding="utf-8")
    out = tmp_path / "broken.html"
    out.write_text(text.replace("</main>", "<script>window.hacked=1</script><img src='http://127.0.0.1:9/x.png'></main>"))
    tab.open(out, width=375)
    assert tab.ask("'hacked' in window") is False
    assert len([one for one in tab.complaints() if "Content Security Policy" in one]) == 2
    assert tab.ask("document.body.insertAdjacentHTML('beforeend', '<pre>' + 'x'.repeat(999) + '</pre>')") is None
    assert tab.ask("document.scrollingElement.scrollWidth") > 375


def test_a_page_of_one_section_has_no_list_of_them() -> None:
    assert "<nav" not in page("title", [], "search/templates", {})
    assert printable("a\u202eb") == "a\\u202eb"


def test_figures_draw_what_was_found() -> None:
    found = evaluation(lambda text: f"${text}_1$")
    panels = scores(found).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        rf"\${one}_1\$" for one in ("base", "halves", "ties")
    ]
    assert panels[1].containers[2].lines[0].get_xdata()[0] == pytest.approx(65.5)
    with pytest.raises(ValueError, match="metric 'f1' was not measured"):
        scores(found, "f1")
    bars = class_changes(found, "$category_1$", "$halves_1$").axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([-30, -10, 0, 15, 40])
    curves = weight_curves(found, "$ten_1$").axes
    assert curves[0].lines[0].get_xdata() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    pairs = trial_scores(found, "$category_1$", "$group_1$")
    assert pairs.axes[0].lines[1].get_ydata()[-1] == pytest.approx(60)
    for figure in (scores(found), pairs, relations(found, "cosine"), relations(found, "cka")):
        figure.savefig(buffer := io.BytesIO(), format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")
