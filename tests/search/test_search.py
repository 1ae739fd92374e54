"""Search: exact against float64 by hand; the command, and its page with hostile names."""

import html.parser
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs import tiny_recipe
from lora_embed.cli import main
from lora_embed.config.models import load_recipe
from lora_embed.errors import ConfigError
from lora_embed.images.decode import decode_image
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import Encoder, load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.schema import encoder_path
from lora_embed.search.export import export_index, open_index
from lora_embed.search.search import find_pictures, search_image, search_table
from lora_embed.shards.listing import list_shards
from lora_embed.table.read import Table
from lora_embed.text import printable
from pages import whole_names
from samples import encoded, noise, png, poisoned, samples_of, tar_of
from tables import SPACE, noise_vectors, publish_vectors, spread

HOSTILE = [
    "<script>alert(1)<",  # a slash would begin a folder
    "\"quoted' & <b onload=x>",
    "‮desrever‬",
    "עברית",
    "\x1b[31mred",
    "{braces} %s",
]


def by_hand(vectors: NDArray[np.float32], query: NDArray[np.float32], k: int) -> NDArray[np.float64]:
    """The k largest cosines, in float64."""
    wide, one = vectors.astype(np.float64), query.astype(np.float64)
    cosines = wide @ one / (np.linalg.norm(wide, axis=1) * np.linalg.norm(one))
    return np.sort(cosines)[::-1][:k]


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_search_is_exact(tmp_path: Path, vector_type: str, k: int) -> None:
    vectors = noise_vectors(300).astype(vector_type).astype(np.float32)
    table = publish_vectors(tmp_path / "table", spread(vectors, 7), vector_type=vector_type, shards_per_file=2)
    queries = noise_vectors(5, seed=1)
    for query, hits in zip(queries, search_table(table, queries, k, SPACE), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], by_hand(vectors, query, k), atol=1e-6)
        assert all(hit.id == f"{hit.shard}/{hit.key}" for hit in hits)
        place = [int(hit.key) for hit in hits]
        np.testing.assert_allclose([hit.score for hit in hits], by_hand(vectors[place], query, k), atol=1e-6)


def test_equal_scores_are_in_the_order_of_ids_wherever_they_lie(tmp_path: Path) -> None:
    """Batches and files of one vector many times over: powers of two, so that no rounding tells them apart."""
    vectors = np.outer(2.0 ** (np.arange(60) % 3), [1, 0, 0, 0]).astype(np.float32)
    backwards = {name: (keys[::-1], rows[::-1]) for name, (keys, rows) in spread(vectors, 6).items()}
    table = publish_vectors(tmp_path / "table", backwards)
    (hits,) = search_table(table, vectors[:1], 15)
    assert [int(hit.key) for hit in hits] == list(range(15))


def test_hits_carry_the_fields_of_their_images(tmp_path: Path) -> None:
    vectors = noise_vectors(20)
    hits = search_table(publish_vectors(tmp_path / "table", spread(vectors, 2)), vectors[[3, 14]], 1)
    assert [(hit.key, hit.fields) for (hit,) in hits] == [("000003", {"label": 3}), ("000014", {"label": 4})]


def test_a_vector_of_zeros_is_near_to_nothing(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(np.array([[0, 0], [1, 1], [-1, -1]], np.float32), 1))
    (hits,) = search_table(table, np.array([[2, 2]], np.float32), 3)
    assert [hit.score for hit in hits] == pytest.approx([1, 0, -1])
    assert {hit.score for hit in search_table(table, np.zeros((1, 2)), 3)[0]} == {0}


def test_more_hits_than_rows_are_all_rows_and_an_empty_table_has_none(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(9), 2))
    assert len(search_table(table, noise_vectors(1), 1000)[0]) == 9
    empty = publish_vectors(tmp_path / "empty", {"a.tar": ([], np.empty((0, 16), np.float32))})
    assert search_table(empty, noise_vectors(2), 3) == [[], []]
    assert search_table(table, np.empty((0, 16)), 3) == []


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros(16), 3, r"shape \(16,\), expected \(number of queries, 16\)"),
        (np.zeros((2, 15)), 3, r"shape \(2, 15\), expected \(number of queries, 16\)"),
        (np.full((1, 16), np.nan), 3, "NaN or infinity"),
        (np.zeros((1, 16)), 0, "k is 0, expected at least 1"),
    ],
)
def test_queries_that_make_no_sense_are_refused(queries: NDArray[Any], k: int, message: str, tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(4), 1))
    with pytest.raises(ConfigError, match=message):
        search_table(table, queries, k)


def test_queries_of_another_space_are_refused(tmp_path: Path) -> None:
    table = publish_vectors(tmp_path / "table", spread(noise_vectors(4), 1))
    with pytest.raises(ConfigError, match=r"version 1 holds vectors of space 5ace5ace5ace, but the query .* of space abc"):
        search_table(table, noise_vectors(1), 3, "abc")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of two merged adapters."""
    folder = tmp_path_factory.mktemp("recipe")
    build_encoder(gather(load_recipe(tiny_recipe(folder))), folder / "encoder", lambda line: None)
    return folder / "encoder"


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Encoder:
    return load_encoder(encoder_folder)


@pytest.fixture
def searched(tmp_path: Path, encoder: Encoder, encoder_folder: Path) -> Table:
    """Two tars, of plain and of hostile keys, embedded and published with their encoder."""
    source = tmp_path / "shards"
    source.mkdir()
    (source / "a.tar").write_bytes(tar_of([(f"{number}.png", png(number)) for number in range(6)]))
    (source / "b.tar").write_bytes(tar_of([(f"{key}.png", png(100 + n)) for n, key in enumerate(HOSTILE)]))
    listed = tuple(list_shards((str(source),), {}))
    shards = {}
    for shard in listed:
        samples = samples_of(shard)
        pixels = [decode_image(sample.data or b"", encoder.description.preprocessing).pixels for sample in samples]
        shards[shard.name] = ([sample.key for sample in samples], encoder.embed_pixels(np.stack(pixels)))
    table = publish_vectors(tmp_path / "table", shards, space_id=encoder.space_id, inputs=(str(source),), listed=listed)
    for path in encoder_folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(encoder_folder).as_posix()
            table.store.create(f"{encoder_path(encoder.space_id)}/{name}", path.read_bytes())
    return table


def query_file(folder: Path, data: bytes, name: str = "query.png") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def of(folder: Path) -> list[str]:
    """Says that the input which the table names may be opened."""
    return ["--input", str(folder / "shards")]


def test_an_image_of_the_table_finds_itself(searched: Table, tmp_path: Path) -> None:
    found = search_image(searched, query_file(tmp_path, png(3)), k=4)
    assert [hit.id for hit in found.hits][:1] == ["a.tar/3"]
    assert found.hits[0].score == pytest.approx(1, abs=1e-6)
    assert (found.version, found.count, found.method) == (1, 12, "exact")
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)


@pytest.mark.parametrize("kind", ["faiss-flat", "lance"])
def test_the_command_searches_through_an_index(
    kind: str, searched: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_index(searched, kind, tmp_path / "index")
    query = query_file(tmp_path, png(104))
    answers = []
    for index in ([], ["--index", str(tmp_path / "index")]):
        assert main.run_command(["search", searched.store.uri, query, "-k", "3", "--json", *index]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    exact, indexed = answers
    assert (exact["method"], indexed["method"]) == ("exact", kind)
    assert [(hit["id"], hit["fields"]) for hit in exact["hits"]] == [(hit["id"], hit["fields"]) for hit in indexed["hits"]]
    assert exact["hits"][0]["fields"] == {"label": 4}
    found = search_image(searched, query, 3, tmp_path / "index")
    assert "note" not in found.describe()
    note = "note: the index holds version 1, and the table is at version 2. Export the index again to search that."
    assert replace(found, current=2).describe().endswith(note)
    assert main.run_command(["search", searched.store.uri, query, "-k", "1"]) == 0
    assert "  label=4" in capsys.readouterr().out
    assert exact["hits"][0]["id"] == f"b.tar/{HOSTILE[4]}"


def test_an_index_of_another_space_is_refused(searched: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = publish_vectors(tmp_path / "other", spread(noise_vectors(3, searched.dimension), 1))
    export_index(other, "faiss-flat", tmp_path / "index")
    query = query_file(tmp_path, png(1))
    assert main.run_command(["search", searched.store.uri, query, "--index", str(tmp_path / "index")]) == 2
    said = capsys.readouterr().err
    assert f"of space {SPACE}" in said
    assert f"of space {searched.space_id}" in said
    assert open_index(tmp_path / "index").description.space_id == SPACE


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each figure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.names: list[str] = []
        self._in_name = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_name = tag == "bdi"

    def handle_data(self, data: str) -> None:
        if self._in_name:
            self.names.append(data)
            self._in_name = False


def test_the_page_shows_pictures_and_hostile_names_as_text(
    searched: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = query_file(tmp_path, encoded(noise(seed=101), "JPEG"), "<img src=x onerror=alert(1)>.jpg")
    out = tmp_path / "page.html"
    assert main.run_command(["search", searched.store.uri, query, "-k", "50", "--page", str(out), *of(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "page.html: shows 12 of 12 images with their pictures" in said
    assert "\x1b" not in said
    assert "‮" not in said
    text = out.read_text()
    page = Page(whole_names(text))
    lead, (image, *names) = page.names[:4], page.names[4:]
    assert lead == [f"version 1 of {searched.store.uri}", f"space {searched.space_id}", "exact", "cosine"]
    ids = [f"a.tar/{n}" for n in range(6)] + [f"b.tar/{printable(key)}" for key in HOSTILE]
    labels = [str(number) for shard in (ids[:6], ids[6:]) for number in range(len(shard))]
    assert sorted(names) == sorted(ids + labels)
    assert image.endswith("<img src=x onerror=alert(1)>.jpg")
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "p",
        "main",
        "figure",
        "img",
        "figcaption",
        "b",
        "br",
        "bdi",
        "a",
        "header",
        "section",
        "h2",
        "div",
        "footer",
    }
    assert {tag for tag, _ in page.tags} <= allowed
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 13
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in images)
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}
    assert "http://" not in text
    assert "https://" not in text
    assert "‮" not in text


def test_pictures_are_left_out_where_a_shard_is_gone_or_another_one(searched: Table, tmp_path: Path) -> None:
    hits = search_image(searched, query_file(tmp_path, png(3)), k=50).hits
    where = (str(tmp_path / "shards"),)
    assert len(find_pictures(searched, hits, inputs=where)) == 12
    assert find_pictures(searched, hits, inputs=where)["a.tar/3"] == png(3)
    (tmp_path / "shards" / "a.tar").write_bytes(tar_of([(f"{number}.png", png(50 + number)) for number in range(6)]))
    assert {name.partition("/")[0] for name in find_pictures(searched, hits, inputs=where)} == {"b.tar"}
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    assert find_pictures(searched, hits, inputs=where) == {}
    no_lineage = Table(searched.store, replace(searched.manifest, lineage={}))
    assert find_pictures(no_lineage, hits, inputs=where) == {}
    out = tmp_path / "page.html"
    assert main.run_command(["search", searched.store.uri, str(tmp_path / "query.png"), "--page", str(out)]) == 0
    assert out.read_text().count("no picture") == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file, expected an image"),
        (b"", "cannot be embedded: empty"),
        (b"plain text", "cannot be embedded: not_an_image"),
        (png(1)[:150], "cannot be embedded: corrupt_image"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_message(
    data: bytes | None, message: str, searched: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = str(tmp_path / "absent.png") if data is None else query_file(tmp_path, data)
    assert main.run_command(["search", searched.store.uri, query]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--version", "9"], "has no version 9"),
        (["--index", "nowhere"], "nowhere: is not an index"),
        (["--page", "no/such/folder/page.html"], "page.html: cannot be written"),
    ],
)
def test_a_search_that_cannot_be_is_one_message(
    arguments: list[str], message: str, searched: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run_command(["search", searched.store.uri, query_file(tmp_path, png(1)), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_kills_its_decoder_is_one_message_as_a_query_and_no_picture_as_a_hit(
    searched: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, segfault=png(3))
    assert main.run_command(["search", searched.store.uri, query_file(tmp_path, png(3))]) == 2
    assert "query.png: cannot be embedded: decoder_crashed (the decoder was killed by signal 11" in capsys.readouterr().err
    out = tmp_path / "page.html"
    query = query_file(tmp_path, png(4))
    assert main.run_command(["search", searched.store.uri, query, "-k", "12", "--page", str(out), *of(tmp_path)]) == 0
    assert out.read_text().count("no picture") == 1


def test_an_empty_table_says_so(searched: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"a.tar": ([], np.empty((0, searched.dimension), np.float32))}
    publish_vectors(Path(searched.store.uri), nothing, space_id=searched.space_id)
    assert main.run_command(["search", searched.store.uri, query_file(tmp_path, png(1))]) == 0
    assert "version 2" in (said := capsys.readouterr().out)
    assert "holds no vectors" in said
