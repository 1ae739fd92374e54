"""Across kinds of processor: equal space ids, vectors within bounds, nights and resumed runs that go on from one another."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

import other_processor
from jobs import ROOT, job_of, read_rows, vectors_by_id, write_tars
from lora_embed.config.models import load_recipe
from lora_embed.model.build import build_encoder
from lora_embed.model.description import DESCRIPTION
from lora_embed.model.golden import BOUNDS, relative_difference
from lora_embed.model.ingredients import gather
from lora_embed.run.encoders import store_encoder
from lora_embed.schema import encoder_path
from lora_embed.store.store import Store
from lora_embed.table.read import open_table
from models import save_adapter, save_base
from processors import KINDS, NUMERIC, files_of, without_switches

Nights = tuple[Path, dict[str, dict[str, Any]]]
ACROSS = 1e-5  # relative L2 of a row, float32: docs/cluster.md
CHUNK = 4


def elsewhere(folder: Path, kind: str, *steps: str) -> dict[str, Any]:
    """The answers to steps of `other_processor` from a new process of that kind, also where the last step kills it."""
    command = [sys.executable, str(ROOT / "tests" / "other_processor.py"), str(folder), " + ".join(steps)]
    ended = subprocess.run(command, env=without_switches() | KINDS[kind], capture_output=True, text=True, check=False)
    assert ended.returncode == (-signal.SIGKILL if steps[-1].startswith("run_and_die") else 0), ended.stderr
    answers: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answers


def here(folder: Path, *steps: str) -> dict[str, Any]:
    """The answers to steps taken in this process."""
    return list(other_processor.take(folder, steps))[-1]


def write_recipes(folder: Path) -> None:
    """One base and three adapters on disk, the same files for every processor, and a recipe for each method."""
    base = save_base(folder / "base")
    adapters = [save_adapter(folder / f"adapter-{labels}", base, labels, seed=labels) for labels in (3, 10, 27)]
    specs = [{"path": str(path), "weight": weight} for path, weight in zip(adapters, (0.3, 0.45, -0.1), strict=True)]
    for method in (*other_processor.EQUAL_METHODS, "svd"):
        recipe = {"base_model": str(base), "adapters": specs, "merge_method": method}
        (folder / f"recipe-{method}.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """A folder with a table that three kinds of processor wrote in turn, and what each of them answered.

    Version 1 is this processor's. A run of an older kind is killed in the middle of the next shard, and another kind goes on
    with it: version 2. Beside that, each builds the recipes and checks encoders that this one built.
    """
    folder = tmp_path_factory.mktemp("nights")
    write_recipes(folder)
    write_tars(folder / "shards", shards=3, images=2 * CHUNK)
    job_of(folder, folder / "recipe-weighted_sum.yaml", folder / "shards", chunk_size=CHUNK)
    answers = {"this": here(folder, "multiply", "build", "build_factors", "run")}
    write_tars(folder / "more", shards=1, images=4 * CHUNK, seed=1000)
    os.rename(folder / "more" / "0000.tar", folder / "shards" / "0003.tar")
    steps = ("multiply", "build", f"check factors table/encoders/{answers['this']['run']['space']}")
    older, newer = KINDS
    # The first three chunks are of published shards, embedded again to measure drift; the others are the new shard's.
    answers[older] = elsewhere(folder, older, *steps, "run_and_die 5")
    answers[newer] = elsewhere(folder, newer, *steps, "run")
    return folder, answers


def embeddings(rows: pa.Table) -> NDArray[np.float32]:
    return np.array(rows["embedding"].to_pylist(), np.float32)


def test_the_processes_compute_with_other_kernels(nights: Nights) -> None:
    """Else the tests below would show nothing."""
    kernels = {kind: answer["kernels"] for kind, answer in nights[1].items()}
    if kernels["this"].startswith("AVX"):
        assert kernels["without AVX"] in ("DEFAULT", "NO AVX")  # the second by older torch
        assert kernels["AVX2"] == "AVX2"


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_recipe_is_the_same_space(nights: Nights, kind: str) -> None:
    """By sums that every processor adds up in one order; an SVD's last digits are each processor's own."""
    _, answers = nights
    assert answers[kind]["multiply"] == answers["this"]["multiply"]
    for spaces in (answers[kind]["build"], answers["this"]["build"]):
        assert len(spaces) == len(other_processor.EQUAL_METHODS) + 1
    equal = [f"recipe-{method}" for method in other_processor.EQUAL_METHODS]
    assert {name: answers[kind]["build"][name] for name in equal} == {name: answers["this"]["build"][name] for name in equal}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_images_are_within_their_bounds_on_another_processor(nights: Nights, kind: str) -> None:
    """Of an encoder whose weights are saved, and of one that is folded again from an adapter's factors, in all precisions."""
    differences = nights[1][kind]["check"]
    assert differences.keys() == BOUNDS.keys()
    assert all(difference <= BOUNDS[precision] / 2 for precision, difference in differences.items()), differences


def test_a_night_on_another_processor_goes_on_in_the_middle_of_a_shard(nights: Nights) -> None:
    folder, answers = nights
    assert answers["this"]["run"] | {"version": 1, "embedded": 6 * CHUNK} == answers["this"]["run"]
    space = answers["this"]["run"]["space"]
    assert answers["AVX2"]["run"] == {"version": 2, "embedded": 2 * CHUNK, "space": space}, (
        "half of a shard was embedded before"
    )
    rows = read_rows(folder / "table")
    assert rows.num_rows == 10 * CHUNK
    names = sorted((folder / "shards").iterdir())
    assert {id_.split("/")[0] for id_ in rows["id"].to_pylist()} == {path.name for path in names}


def test_its_drift_is_that_of_rounding_and_its_old_rows_are_the_old_bytes(
    nights: Nights,
) -> None:
    folder, answers = nights
    table = str(folder / "table")
    gate = open_table(table).manifest.gates["drift"]
    assert (gate["holds"], gate["limit"]) == (True, BOUNDS["float32"])
    if answers["this"]["kernels"] != answers["without AVX"]["kernels"]:
        assert 0 < gate["value"] < BOUNDS["float32"] / 2, "another processor's vectors differ in their last digits"
    before = json.loads((folder / "table" / "versions" / "00000001.json").read_text())
    old = pa.concat_tables([pq.read_table(folder / "table" / entry["path"]) for entry in before["files"]])
    now = vectors_by_id(read_rows(folder / "table"))
    assert {id_: now[id_] for id_ in old["id"].to_pylist()} == vectors_by_id(old)


def test_every_row_is_within_the_bound_of_one_processors_vectors(nights: Nights, tmp_path: Path) -> None:
    """Whichever of the three made it: here all are embedded again by one."""
    folder, answers = nights
    alone = job_of(tmp_path, folder / "recipe-weighted_sum.yaml", folder / "shards", chunk_size=CHUNK)
    assert here(tmp_path, "run")["run"] == {"version": 1, "embedded": 10 * CHUNK, "space": answers["this"]["run"]["space"]}
    mixed, own = read_rows(folder / "table"), read_rows(Path(alone.table))
    assert mixed["id"].equals(own["id"])
    assert relative_difference(embeddings(mixed), embeddings(own)) <= ACROSS


def test_of_two_builds_of_a_recipe_a_table_takes_the_first(nights: Nights, tmp_path: Path) -> None:
    """Runs on two kinds of processor may build at once what their SVDs make two spaces of."""
    folder, _ = nights
    built = {}
    for method in ("weighted_sum", "ties"):
        ingredients = gather(load_recipe(str(folder / f"recipe-{method}.yaml")))
        built[method] = build_encoder(ingredients, tmp_path / method, str)
    description = json.loads((tmp_path / "ties" / DESCRIPTION).read_text())
    description["recipe_id"] = built["weighted_sum"].recipe_id  # as if both were of one recipe
    (tmp_path / "ties" / DESCRIPTION).write_text(json.dumps(description))
    store = Store(str(tmp_path / "table"))
    first = store_encoder(tmp_path / "weighted_sum", store)
    assert store_encoder(tmp_path / "ties", store) == first == built["weighted_sum"]
    store.delete([entry.path for entry in store.list_files(encoder_path(first.space_id))])
    assert store_encoder(tmp_path / "ties", store).space_id == built["ties"].space_id
    assert json.loads(store.read(f"recipes/{first.recipe_id}.json") or b"") == {"space_id": built["ties"].space_id}


def test_the_list_of_tests_that_compute_is_whole() -> None:
    """Each that imports torch, or the tiny models, and needs no whole cluster."""
    assert sorted(NUMERIC) == list(NUMERIC)
    for name in NUMERIC:
        assert len(files_of((name,))) == 1
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "\nimport torch" in path.read_text():
            assert path.stem.removeprefix("test_") in NUMERIC, path
