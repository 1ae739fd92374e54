"""`lora-embed evaluate` from recipes and small images to its record, on a real local Ray; and what it says when it cannot."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import ROOT, write_recipe
from lora_embed import load_encoder
from lora_embed.cli.main import evaluate_job, run_command
from lora_embed.evaluate.records import METRICS, Evaluation
from lora_embed.model.head import HeadOnBody, SavedHead
from lora_embed.vectors.metrics import knn_accuracy, split_by_name
from models import save_adapter, save_base
from samples import parquet_of, png, tar_of

IMAGES = 96
NUMBERS = [*range(0, IMAGES, 2), *range(1, IMAGES, 2)]  # in the order of the shards


def label_of(number: int) -> dict[str, object]:
    return {
        "digit": number % 10,
        "kind": "abc"[number % 3],
        "object": f"o{number // 2}",
        "side": "train" if number % 4 else "test",
    }


def images() -> list[Image.Image]:
    return [Image.open(io.BytesIO(png(number))) for number in NUMBERS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with labels and a broken image, a tiny random base, and recipes of its two adapters (10 and 27 classes)."""
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base", "dinov2")
    ten = save_adapter(folder / "ten", base, 10, seed=1)
    more = save_adapter(folder / "more", base, 27, seed=2)
    for name, weights in {"half": {ten: 0.5, more: 0.5}, "most": {ten: 0.8, more: 0.2}}.items():
        write_recipe(folder, base, weights).rename(folder / f"{name}.yaml")
    (folder / "shards").mkdir()
    for shard in range(2):
        members = [("broken.png", b"no image"), ("broken.json", json.dumps(label_of(0)).encode())]
        for number in range(shard, IMAGES, 2):
            members += [(f"{number:03d}.json", json.dumps(label_of(number)).encode()), (f"{number:03d}.png", png(number))]
        (folder / "shards" / f"{shard}.tar").write_bytes(tar_of(members))
    return folder


def arguments(world: Path, *more: str, recipes: tuple[str, ...] = ("half",)) -> list[str]:
    named = [part for recipe in recipes for part in ("--recipe", str(world / f"{recipe}.yaml"))]
    return ["evaluate", *named, "--data", str(world / "shards"), "--work", str(world / "work"), "--precision", "float32", *more]


def failed(world: Path, capsys: pytest.CaptureFixture[str], *more: str, recipes: tuple[str, ...] = ("half",)) -> str:
    assert run_command(arguments(world, *more, recipes=recipes)) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluation(world: Path) -> Evaluation:
    out = world / "found.json"
    options = ["--label", "digit", "--label", "kind", "--group", "object", "--alone", "--splits", "3", "--out", str(out)]
    assert run_command(arguments(world, *options, recipes=("half", "most"))) == 0
    return Evaluation.from_json(out.read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_candidates_tasks_and_counts(evaluation: Evaluation) -> None:
    assert [one.name for one in evaluation.candidates] == ["half", "most", "base", "ten", "more"]
    assert [(one.name, len(one.classes), one.images) for one in evaluation.tasks] == [
        ("digit", 10, IMAGES),
        ("kind", 3, IMAGES),
    ]
    assert (evaluation.samples, evaluation.rejects) == (IMAGES + 2, {"not_an_image": 2})
    assert evaluation.decoded == evaluation.samples
    assert len(evaluation.figures) == 5 * 2 * len(METRICS)
    merges = [(name, adapter) for name in ("half", "most") for adapter in ("ten", "more")]
    pairs = [(name, "base") for name in ("half", "most", "ten", "more")] + merges
    assert {(one.candidate, one.reference) for one in evaluation.differences} == set(pairs)
    assert len(evaluation.differences) == len(pairs) * 2 * len(METRICS)
    assert all(one.encoder_bytes > 0 and one.forward_s > 0 for one in evaluation.candidates)
    assert {"read", "decode", "forward", "metrics"} <= set(evaluation.seconds)
    assert evaluation.reference == "base"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_figures_are_those_of_the_encoder_by_hand(world: Path, evaluation: Evaluation) -> None:
    candidate = next(one for one in evaluation.candidates if one.name == "most")
    encoder = load_encoder(world / "work" / "encoders" / candidate.space_id)
    vectors = encoder.embed(images())
    labels = np.array(NUMBERS) % 10
    banks = [split_by_name([f"o{number // 2}" for number in NUMBERS], 2 / 3, seed) for seed in range(3)]
    expected = [knn_accuracy(vectors[bank], labels[bank], vectors[~bank], labels[~bank]) for bank in banks]
    (found,) = [one for one in evaluation.figures if (one.task, one.metric, one.candidate) == ("digit", "knn", "most")]
    assert found.per_split == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_heads_stand_on_every_candidate_of_their_base(world: Path, evaluation: Evaluation) -> None:
    found = {one.candidate: one for one in evaluation.retention}
    assert set(found) == {"half", "most", "base", "ten", "more"}
    assert {(one.task, one.adapter) for one in evaluation.retention} == {("digit", "ten")}  # no task has 27 classes
    own = found["ten"]
    assert (own.kept, own.low, own.high) == (own.own, 0, 0)
    assert {one.own for one in evaluation.retention} == {own.own}
    saved = [SavedHead.from_bytes(path.read_bytes()) for path in (world / "work" / "heads").iterdir()]
    (head,) = [one for one in saved if one.classes == 10]
    for candidate in evaluation.candidates:
        encoder = load_encoder(world / "work" / "encoders" / candidate.space_id)
        on_body = HeadOnBody(head, encoder.models[0])
        encoder.embed(images())
        right = on_body.take(IMAGES).argmax(axis=1) == np.array(NUMBERS) % 10
        assert found[candidate.name].kept == pytest.approx(right.mean())
    assert len({one.kept for one in evaluation.retention}) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_relations_changes_and_pictures(evaluation: Evaluation) -> None:
    weights = [one for one in evaluation.relations if one.kind != "cka"]
    over_all = {one.kind: one.value for one in weights if one.layer is None}
    assert set(over_all) == {"cosine", "sign_conflicts", "subspace_overlap"}
    assert 0.4 < over_all["sign_conflicts"] < 0.6
    layers = {one.layer for one in evaluation.relations if one.layer}
    assert len(layers) == 6
    assert {(one.one, one.other) for one in weights} == {("ten", "more")}
    seen = {frozenset((one.one, one.other)) for one in evaluation.relations if one.kind == "cka"}
    assert seen == {frozenset(pair) for pair in (("base", "ten"), ("base", "more"), ("ten", "more"))}
    shown = {one.id for query in evaluation.queries for one in (query, *query.before, *query.after)}
    assert set(evaluation.thumbnails) == shown
    assert max(sum(q.task == "digit" and q.candidate == "half" for q in evaluation.queries), 1) <= 12
    assert {one.candidate for one in evaluation.classes} == {"half", "most", "ten", "more"}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_as_a_table_for_notebooks(evaluation: Evaluation) -> None:
    table = evaluation.to_arrow()
    assert table.num_rows == len(evaluation.figures) * 4
    means = table.filter(table.column("split").is_null()).to_pylist()
    assert {row["verdict"] for row in means if row["candidate"] == "base"} == {None}
    assert [row["value"] for row in means] == [one.mean for one in evaluation.figures]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "evaluation")
def test_what_was_embedded_is_not_embedded_again(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--label", "digit", "--label", "kind", "--group", "object", "--alone", "--seed", "9", "--json"]
    assert run_command(arguments(world, *options)) == 0
    again = Evaluation.from_json(capsys.readouterr().out)
    assert (again.decoded, again.samples, again.rejects) == (0, IMAGES + 2, {"not_an_image": 2})
    assert all(one.forward_s > 0 for one in again.candidates)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "evaluation")
def test_an_encoder_directory_is_a_candidate_too(
    world: Path, evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    space = next(one.space_id for one in evaluation.candidates if one.name == "most")
    encoder = ["--recipe", str(world / "work" / "encoders" / space), "--label", "digit", "--split", "side"]
    assert run_command(arguments(world, *encoder)) == 0
    out = capsys.readouterr().out
    assert "1 split," in out
    assert space in out


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_parquet_by_the_job(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"image": [png(n) for n in range(30)], "kind": [None if n == 7 else "ab"[n % 2] for n in range(30)]}
    (tmp_path / "a.parquet").write_bytes(parquet_of(columns))
    options = ["--recipe", str(world / "half.yaml"), "--data", str(tmp_path), "--label", "kind", "--work", str(world / "work")]
    assert evaluate_job([*options, "--no-heads", "--precision", "float32", "--json"]) == 0
    found = Evaluation.from_json(capsys.readouterr().out)
    assert (found.tasks[0].images, found.samples, found.retention) == (29, 30, ())


def test_the_job_script_takes_the_same_options() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--label", "kind", "--precision", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--precision is 'int8', expected auto, float32" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "colour"], "--label colour: of the first 98 samples of 2 shards"),
        ([], "--label is missing. Name at least one."),
        (["--label", "kind", "--label", "kind"], "--label kind is given 2 times"),
        (["--label", "kind", "--splits", "1"], "--splits is 1, expected 2 or more"),
        (["--label", "kind", "--reference", "best"], "--reference best: is not a candidate; choose from half"),
        (["--label", "kind", "--group", "colour"], "--group colour: of the first 98 samples of 2 shards"),
        (["--label", "kind", "--head", "ten"], "--head ten: expected --head ADAPTER=FIELD"),
        (["--label", "kind", "--head", "ten=colour"], "'colour' is named for a head, but is not a --label"),
        (["--label", "kind", "--classes", "kind=/nowhere"], "--classes kind=/nowhere: /nowhere cannot be read"),
        (["--label", "kind", "--precision", "int8"], "--precision is 'int8', expected auto, float32"),
        (
            ["--label", "kind", "--out", "/nowhere/x.json"],
            "--out /nowhere/x.json: is a directory, or its directory does not exist",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    world: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in failed(world, capsys, *options)


def test_a_recipe_that_is_not_there(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml: no such file, expected a recipe" in failed(world, capsys, "--label", "kind", recipes=("none",))


def test_a_recipe_given_twice(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failed(world, capsys, "--label", "kind", recipes=("half", "half"))
    assert "two candidates have the name 'half'" in message
