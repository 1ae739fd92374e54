"""Indexes that somebody else wrote: nothing outside of their folder is opened, and what is bent is one message."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_embed.errors import ConfigError
from lora_embed.search.export import KINDS, export_index, open_index
from lora_embed.search.index_files import CHECKS
from tables import SPACE, noise_vectors, publish_vectors, spread

VECTORS = noise_vectors(300)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, by its name."""
    folder = tmp_path_factory.mktemp("indexes")
    table = publish_vectors(folder / "table", spread(VECTORS, 3))
    for kind in KINDS:
        export_index(table, kind, folder / kind)
    return folder


@pytest.fixture
def copy(indexes: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(indexes / kind, tmp_path / "index"))


def refused(folder: Path) -> str:
    """The message of an index that is refused."""
    with pytest.raises(ConfigError) as error:
        open_index(folder).search(VECTORS[:2], 5, SPACE)
    return str(error.value)


def mapped(path: Path) -> list[str]:
    """How this process has a file in its memory."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]


def lists_on_disk(folder: Path, place: Path) -> None:
    """An IVF index whose lists are said to lie in another file."""
    import faiss

    index = faiss.read_index(str(folder / "index.faiss"))
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(folder / "lists"))
    lists.merge_from(index.invlists, 0)
    index.replace_invlists(lists)
    faiss.write_index(index, str(folder / "index.faiss"))
    named = str(folder / "lists").encode()
    data = (folder / "index.faiss").read_bytes()
    start = data.index(named)
    renamed = struct.pack("<Q", len(str(place))) + str(place).encode()
    (folder / "index.faiss").write_bytes(data[: start - 8] + renamed + data[start + len(named) :])
    (folder / "lists").replace(place)


@pytest.mark.parametrize("kind", ["faiss-ivf", "faiss-flat", "faiss-hnsw"])
def test_lists_on_disk_never_map_a_file_of_the_users(kind: str, copy: Any, indexes: Path, tmp_path: Path) -> None:
    """Whatever kind the description says that the index is of."""
    folder, victim = copy("faiss-ivf"), tmp_path / "victim"
    lists_on_disk(folder, victim)
    about = json.loads((folder / "index.json").read_text()) | {"kind": kind}
    (folder / "index.json").write_text(json.dumps(about))
    before = victim.read_bytes()
    assert "index.faiss" in refused(folder)
    assert not mapped(victim)
    assert victim.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        ("IDMap,Flat", "faiss-flat"),
        ("PCA8,Flat", "faiss-flat"),
        ("SQ8", "faiss-flat"),
        ("IVF4,SQ8", "faiss-ivf"),
        ("IVF4_HNSW4,Flat", "faiss-ivf"),
        ("HNSW8,SQ8", "faiss-hnsw"),
    ],
)
def test_kinds_that_are_not_written_are_not_read(make: str, kind: str, copy: Any) -> None:
    """FAISS reads all of these, and this package writes none of them."""
    import faiss

    folder = copy(kind)
    index = faiss.index_factory(VECTORS.shape[1], make, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, np.arange(len(VECTORS))) if make.startswith("IDMap") else index.add(VECTORS)
    faiss.write_index(index, str(folder / "index.faiss"))
    assert "index.faiss" in refused(folder)


def at(pattern: bytes, after: int, form: str, value: Any) -> Callable[[bytes], bytes]:
    """Bytes with one value written so many bytes behind where a pattern stands first."""

    def bend(data: bytes) -> bytes:
        bent = bytearray(data)
        struct.pack_into(f"<{form}", bent, data.index(pattern) + after, value)
        return bytes(bent)

    return bend


# Behind four letters, 33 bytes of header, and for HNSW the arrays of likelihoods, firsts, levels and starts.
BENT: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "more vectors than there are": ("faiss-flat", at(b"IxFI", 8, "q", 2**40)),
    "longer vectors": ("faiss-hnsw", at(b"IHNf", 4, "i", 2**20)),
    "another measure": ("faiss-flat", at(b"IxFI", 33, "i", 1)),
    "an array without end": ("faiss-flat", at(b"IxFI", 37, "Q", 2**61)),
    "more lists than vectors": ("faiss-ivf", at(b"IwFl", 37, "Q", 2**33)),
    "a map of ids": ("faiss-ivf", at(b"ilar", -9, "B", 2)),
    "a list that goes on for ever": ("faiss-ivf", at(b"full", 12, "Q", 2**50)),
    "a vector that is not there": ("faiss-ivf", lambda data: data[:-8] + struct.pack("<q", 10**9)),
    "a vector before the first": ("faiss-ivf", lambda data: data[:-8] + struct.pack("<q", -2)),
    "another quantizer": ("faiss-ivf", lambda data: data.replace(b"IxFI", b"IxF2", 1)),
    "a cut file": ("faiss-flat", lambda data: data[:-1]),
    "more at its end": ("faiss-hnsw", lambda data: data + b"more"),
    "nothing": ("faiss-hnsw", lambda data: b""),
}


@pytest.mark.parametrize("how", BENT)
def test_a_bent_faiss_file_is_refused_before_faiss_reads_it(how: str, copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    kind, bend = BENT[how]
    path = copy(kind) / "index.faiss"
    path.write_bytes(bend(path.read_bytes()))
    monkeypatch.setattr(faiss, "read_index", None)
    assert re.search("index.faiss", refused(path.parent))


@pytest.mark.parametrize("value", [10**9, -2, 2**31 - 1])
@pytest.mark.parametrize("part", ["links", "entry", "levels"])
def test_a_graph_that_leads_out_of_its_index_is_refused(part: str, value: int, copy: Any) -> None:
    """FAISS itself reads memory wherever the links lead."""
    path = copy("faiss-hnsw") / "index.faiss"
    data = bytearray(path.read_bytes())
    place = 37
    for size, name in ((8, ""), (4, ""), (4, "levels"), (8, ""), (4, "links")):
        (length,) = struct.unpack_from("<Q", data, place)
        if name == part:
            struct.pack_into("<i", data, place + 8 + 4 * (length // 2), value)
        place += 8 + length * size
    if part == "entry":
        struct.pack_into("<i", data, place, value)
    path.write_bytes(data)
    assert "index.faiss" in refused(path.parent)


def test_every_kind_of_faiss_index_has_its_check() -> None:
    assert set(CHECKS) == {name for name, kind in KINDS.items() if kind.library == "faiss"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["file", "folder", "nothing", "device"])
def test_a_link_in_an_index_is_not_followed(kind: str, to: str, copy: Any, tmp_path: Path) -> None:
    folder = copy(kind)
    path = folder / ("vectors.lance" if kind == "lance" else "index.faiss")
    away = tmp_path / "away"
    path.rename(away)
    if to == "folder":
        path.mkdir()
        path = path / "more"
    path.symlink_to({"device": "/dev/zero", "nothing": tmp_path / "nothing"}.get(to, away))
    assert "is a link" in refused(folder)


@pytest.mark.parametrize("shared", ["data", "a dataset"])
def test_a_lance_dataset_is_not_followed_out_of_its_folder(shared: str, copy: Any, tmp_path: Path) -> None:
    import lance

    folder = copy("lance")
    private = tmp_path / "private.lance"
    (folder / "vectors.lance").rename(private)
    if shared == "a dataset":
        lance.dataset(str(private)).tags.create("then", 1)
        lance.dataset(str(private)).shallow_clone(str(folder / "vectors.lance"), "then")
    else:
        rows = lance.dataset(str(private)).to_table()
        base = lance.DatasetBasePath(str(tmp_path / "elsewhere"), name="away")
        (tmp_path / "elsewhere").mkdir()
        made = {"initial_bases": [base], "target_bases": ["away"]}
        lance.write_dataset(rows, str(folder / "vectors.lance"), mode="create", **made)
    assert lance.dataset(str(folder / "vectors.lance")).count_rows() == len(VECTORS)
    assert "names places outside of the dataset" in refused(folder)


ONE = "x" * 1_000_000
IDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "other columns": (["id", "shard", "password"], {}),
    "too few rows": (["id", "shard", "key"], {"rows": 7}),
    "a row group of gigabytes": (["id", "shard", "key"], {"value": ONE, "use_dictionary": False, "compression": "zstd"}),
}


@pytest.mark.parametrize("how", IDS)
def test_ids_that_are_none_are_refused(how: str, copy: Any) -> None:
    names, options = IDS[how]
    folder, rows, value = copy("faiss-flat"), options.pop("rows", 300), options.pop("value", "a")
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in names])
    table = pa.table([[value] * rows, ["a"] * rows, ["b"] * rows], schema=schema)
    pq.write_table(table, folder / "ids.parquet", write_statistics=False, **options)
    assert "ids" in refused(folder)


def test_one_long_id_for_all_rows_is_held_once(copy: Any) -> None:
    """As a dictionary's only value it takes no room in the file, and would take 300 MB as text."""
    folder = copy("faiss-flat")
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "shard", "key")])
    long = pa.table([[ONE] * 300, ["a"] * 300, ["b"] * 300], schema=schema)
    pq.write_table(long, folder / "ids.parquet", write_statistics=False)
    code = "import pyarrow as pa, sys; from pathlib import Path; from lora_embed.search.export import open_index; "
    code += "index = open_index(Path(sys.argv[1])); import numpy as np; "
    code += "hits = index.search(np.ones((1, 16)), 1, sys.argv[2]); print(pa.default_memory_pool().max_memory())"
    taken = subprocess.run([sys.executable, "-c", code, str(folder), SPACE], capture_output=True, text=True, check=True)
    assert int(taken.stdout) < 100 * len(ONE)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        '{"format": 1}',
        '{"count": NaN}',
        '{"count": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        '{"a": ' * 900 + "1" + "}" * 900,
        "\ufeff{}",
    ],
)
def test_a_description_that_is_none_is_one_message(text: str, copy: Any) -> None:
    folder = copy("faiss-flat")
    (folder / "index.json").write_text(text, encoding="utf-8")
    assert "index.json" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "lance/../../etc"},
        {"kind": 7},
        {"count": -1},
        {"dimension": 2**40},
        {"dimension": 2**62},
        {"space_id": ["a"]},
        {"parameters": "x"},
        {"metric": "l2"},
        {"format": "1"},
        {"version": 1.5},
    ],
)
@pytest.mark.parametrize("kind", ["faiss-hnsw", "lance"])
def test_a_description_of_other_types_is_one_message(change: dict[str, Any], kind: str, copy: Any) -> None:
    path = copy(kind) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "Export" in refused(path.parent)


def test_lists_that_are_mostly_empty_are_read(copy: Any) -> None:
    """FAISS writes them in another form."""
    import faiss

    path = copy("faiss-ivf") / "index.faiss"
    index = faiss.read_index(str(path))
    index.reset()
    index.add(np.repeat(VECTORS[:1], len(VECTORS), axis=0))
    faiss.write_index(index, str(path))
    assert b"sprs" in path.read_bytes()
    assert len(open_index(path.parent).search(VECTORS[:1], 3, SPACE)[0]) == 3


def test_a_bent_lance_file_is_one_message_also_where_lance_panics(copy: Any) -> None:
    folder = copy("lance")
    (path,) = (folder / "vectors.lance" / "data").iterdir()
    good, messages = path.read_bytes(), []
    for place in [*range(len(good) - 110, len(good) - 32), *range(len(good) - 20, len(good) - 8)]:  # positions and numbers
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xCA]) + good[place + 1 :])
        try:
            open_index(folder).search(VECTORS[:1], 5, SPACE)
        except ConfigError as error:
            messages.append(str(error))
    assert len(messages) > 80
    assert all(message.endswith("Export it again.") for message in messages)
    assert any("range" in message for message in messages)  # a panic of Lance
