"""`lora-embed tune`: what it writes is what it found, on images it had not seen, at whatever moment it was stopped."""

import html
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lora_embed.cli import main
from lora_embed.config.models import load_recipe
from lora_embed.errors import AdapterMismatch, ConfigError
from lora_embed.evaluate.records import Evaluation
from lora_embed.model.build import build_encoder
from lora_embed.model.encoder import load_encoder
from lora_embed.model.ingredients import gather
from lora_embed.model.merge import METHODS
from lora_embed.model.refold import BATCH, Refolder
from lora_embed.tune.goal import Budget, Goal, TaskLabel, read_label
from lora_embed.tune.labelled import Wanted, read_labelled
from lora_embed.tune.tune import Tuned, tune
from lora_embed.vectors.metrics import split_by_name
from models import save_adapter
from pages import plain_text
from tuning import tiny_search

FOREVER = 60  # evaluations: a second or two of the tiny model
COMMAND = "import sys; from lora_embed.cli import main; sys.exit(main.run_command(sys.argv[1:]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Tuned:
    return tune(tiny_search(folder, evaluations=20, takes_best=True))


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "tune", str(folder / "recipe.yaml"), "--data", str(folder / "shards"), "--label", "one=colour", "--label", "stripes",
        "--group", "pair", "--methods", "weighted_sum,ties", "--out", str(folder / "tuned.yaml"), *more,
    ]  # fmt: skip


def test_the_recipe_that_is_written_builds_and_is_the_best_trial(folder: Path, tuned: Tuned) -> None:
    recipe = load_recipe(folder / "tuned.yaml")
    assert recipe == tuned.recipe
    best = max(tuned.evaluation.trials, key=lambda trial: trial.objective)
    weights = {Path(spec.path).name: spec.weight for spec in recipe.adapters}
    assert (recipe.merge_method, weights) == (best.method, {name: w for name, w in best.weights.items() if w})
    assert len(tuned.evaluation.trials) == 20
    ingredients = gather(recipe)
    (winner,) = (found for found in tuned.evaluation.candidates if found.name == "tuned")
    assert winner.recipe_id == ingredients.recipe_id
    assert build_encoder(ingredients, folder / "built", lambda line: None).space_id == winner.space_id


def test_the_evidence_is_an_evaluation_with_its_trials(folder: Path, tuned: Tuned) -> None:
    text = (folder / "tuned.evidence.json").read_text()
    assert Evaluation.from_json(text) == tuned.evaluation
    assert [found.name for found in tuned.evaluation.candidates] == ["base", "one", "two", "equal", "best tried", "tuned"]
    about = json.loads(text)["tuning"]
    assert about["own"]["colour"]["adapter"] == "one"
    assert about["images"] == about["held_back_images"] == 60
    pairs = {(found.candidate, found.reference) for found in tuned.evaluation.differences}
    assert {("tuned", "equal"), ("tuned", "one"), ("tuned", "two"), ("tuned", "base"), ("one", "equal")} <= pairs
    seen = {(found.kind, found.one, found.other) for found in tuned.evaluation.relations if found.layer is None}
    assert {(one, other) for kind, one, other in seen if kind == "cka"} == {
        ("base", "one"), ("base", "two"), ("one", "two"),
    }  # fmt: skip
    assert {kind for kind, one, other in seen if {one, other} == {"one", "two"}} == {
        "cka", "cosine", "sign_conflicts", "subspace_overlap",
    }  # fmt: skip


def test_the_page_says_what_the_terminal_says_and_of_which_images(folder: Path, tuned: Tuned) -> None:
    text = plain_text((folder / "tuned.evidence.html").read_text())
    lines = tuned.describe().splitlines()
    assert len(lines) >= 10
    for line in lines:
        assert " ".join(line.split()) in html.unescape(text)
    assert [line for line in lines if line.startswith("Merge tuned ")] != []
    assert "on task colour, tuned minus equal" in (folder / "tuned.yaml").read_text()
    assert "60 labelled images of 3 classes, field colour ; all were held back from the search" in text
    assert "minutes, on 60 images that no other figure of this report uses." in text
    assert "60 images for the search, 60 held back for the figures" in text
    assert "Images judged 60 124 samples read" in text


def test_final_figures_are_of_held_back_groups_alone(folder: Path, tuned: Tuned) -> None:
    """Made here anew by other code: pixels of the groups that were not drawn for tuning, embedded by built encoders."""
    search = tiny_search(folder)
    encoder = load_encoder(folder / "built") if (folder / "built").is_dir() else None
    if encoder is None:
        build_encoder(gather(tuned.recipe), folder / "built", lambda line: None)
        encoder = load_encoder(folder / "built")
    wanted = Wanted(fields=("colour", "stripes"), group="pair", most=search.most_images, seed=0)
    images = read_labelled(search, wanted, encoder.description.preprocessing, search.work_folder)
    assert images.decoded == 0
    held = ~split_by_name(images.names, 0.5, 0)
    assert not set(np.array(images.names)[held]) & set(np.array(images.names)[~held])
    judged = {task.name: task.images for task in tuned.evaluation.tasks}
    assert judged == {name: int((images.labels[name][held] >= 0).sum()) for name in ("colour", "stripes")}
    assert judged["colour"] == 60
    vectors = encoder.embed_pixels(images.pixels[held]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = images.labels["colour"][held]
    expected = []
    for seed in range(5):
        bank = split_by_name(np.array(images.names)[held].tolist(), 2 / 3, seed)
        right = 0
        for query, label in zip(vectors[~bank], labels[~bank], strict=True):
            cosines = vectors[bank] @ query
            near = np.argsort(-cosines)[:10]
            votes = np.bincount(labels[bank][near], weights=cosines[near], minlength=3)
            right += int(votes.argmax() == label)
        expected.append(right / int((~bank).sum()))
    (figure,) = (
        found for found in tuned.evaluation.figures if (found.candidate, found.task, found.metric) == ("tuned", "colour", "knn")
    )
    assert figure.per_split == pytest.approx(expected)


def test_the_same_search_evaluates_nothing_again_and_a_longer_one_the_rest(folder: Path, tuned: Tuned) -> None:
    recipe = (folder / "tuned.yaml").read_bytes()
    again = tune(tiny_search(folder, evaluations=20, takes_best=True))
    assert again.tuning["evaluated_now"] == 0
    assert (folder / "tuned.yaml").read_bytes() == recipe
    assert again.evaluation.trials == tuned.evaluation.trials
    assert again.evaluation.figures == tuned.evaluation.figures
    longer = tune(tiny_search(folder, evaluations=23, out=folder / "longer.yaml", work=folder / "tuned.work"))
    assert longer.tuning["evaluated_now"] == 3
    assert longer.evaluation.trials[:20] == tuned.evaluation.trials


def test_another_objective_needs_no_trial_anew(folder: Path, tuned: Tuned) -> None:
    search = tiny_search(folder, evaluations=5, out=folder / "mean.yaml", work=folder / "tuned.work", objective="mean")
    found = tune(search)
    assert found.tuning["evaluated_now"] == 0
    for trial, other in zip(found.evaluation.trials, tuned.evaluation.trials[:5], strict=True):
        assert trial.scores == other.scores
        assert trial.objective >= other.objective


@pytest.mark.long
def test_a_search_killed_in_its_midst_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = tune(tiny_search(tmp_path, evaluations=FOREVER, work=tmp_path / "undisturbed"))
    expected = (tmp_path / "tuned.yaml").read_bytes()
    (tmp_path / "tuned.yaml").unlink()
    log = tmp_path / "tuned.work" / "trials.jsonl"
    command = [sys.executable, "-c", COMMAND, *arguments(tmp_path, "--evaluations", str(FOREVER))]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not log.is_file() or log.read_bytes().count(b"\n") < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = log.read_bytes().count(b"\n")
    assert 7 <= done < len(undisturbed.evaluation.trials)
    assert not (tmp_path / "tuned.yaml").exists()
    resumed = tune(tiny_search(tmp_path, evaluations=FOREVER))
    assert resumed.tuning["evaluated_now"] == len(undisturbed.evaluation.trials) - done
    assert (tmp_path / "tuned.yaml").read_bytes() == expected
    assert resumed.evaluation.figures == undisturbed.evaluation.figures


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_folded_again_is_the_encoder_that_is_built(
    folder: Path, tuned: Tuned, tmp_path: Path, method: str
) -> None:
    """After other merges, bit for bit, by every method: else a search would choose by vectors that no encoder gives."""
    recipe = load_recipe(folder / "recipe.yaml")
    refolder = Refolder(gather(recipe), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for other in ("iso_c", "weighted_sum", method):
        asked = recipe.model_copy(update={"merge_method": other})
        refolder.fold(asked)
    description = build_encoder(gather(asked), tmp_path / "encoder", lambda line: None)
    assert refolder.space_id() == description.space_id
    assert refolder.identify(asked) == description.recipe_id
    built = load_encoder(tmp_path / "encoder", batch_size=BATCH["cpu"])
    np.testing.assert_array_equal(refolder.embed(pixels, np.array([4, 0, 2])), built.embed_pixels(pixels[[4, 0, 2]]))


def test_minutes_end_a_search_after_the_references(folder: Path, tmp_path: Path) -> None:
    search = tiny_search(folder, out=tmp_path / "tuned.yaml", budget=Budget(minutes=1e-6))
    assert [list(trial.weights.values()) for trial in tune(search).evaluation.trials] == [[1, 0], [0, 1], [0.5, 0.5]]


def test_a_lead_within_noise_leaves_equal_weights(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    careful = tune(tiny_search(folder, evaluations=20, out=tmp_path / "tuned.yaml", work=folder / "tuned.work"))
    assert careful.tuning["lead"] == tuned.tuning["lead"]
    assert careful.tuning["lead"]["low"] < 0 < careful.tuning["lead"]["mean"]
    assert [spec.weight for spec in careful.recipe.adapters] == [0.5, 0.5]
    assert "none of 20 trials is better beyond noise" in careful.describe()
    (apart,) = (
        found for found in careful.evaluation.differences
        if (found.task, found.candidate, found.reference) == ("colour", "tuned", "equal")
    )  # fmt: skip
    assert (apart.low, apart.high, apart.verdict) == (0, 0, "within noise")
    best = [found.per_split for found in careful.evaluation.figures if found.candidate == "best tried"]
    assert best == [found.per_split for found in tuned.evaluation.figures if found.candidate == "tuned"]


def test_a_lead_beyond_noise_is_taken(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    """One adapter ruins the space at any weight that is tried: the other alone leads by far."""
    recipe = load_recipe(folder / "recipe.yaml")
    ruin = save_adapter(tmp_path / "ruin", folder / "base", 3, seed=6, lora_alpha=4000)
    mixed = recipe.model_copy(
        update={"adapters": (recipe.adapters[0], recipe.adapters[1].model_copy(update={"path": str(ruin)}))}
    )
    tasks = (TaskLabel(field="colour"),)
    found = tune(tiny_search(folder, 14, recipe=mixed, tasks=tasks, out=tmp_path / "t.yaml", methods=("weighted_sum",)))
    assert found.tuning["lead"]["low"] > 0
    best = max(found.evaluation.trials, key=lambda trial: trial.objective)
    assert [spec.weight for spec in found.recipe.adapters] == [weight for weight in best.weights.values() if weight]


def test_goals() -> None:
    alone = {"a": [0.8, 0.8], "b": [0.5, 0.7]}
    worst = Goal(kind="worst", importance={"a": 1, "b": 1}, alone=alone)
    figures = {"a": [0.9, 0.9], "b": [0.4, 0.7]}
    assert worst.rank(figures) == pytest.approx((-0.05, 0.025))
    assert worst.by_split(figures) == pytest.approx([-0.1, 0])
    weighty = replace(worst, importance={"a": 1, "b": 3})
    assert weighty.rank(figures) == pytest.approx((-0.15, -0.0125))
    assert weighty.rank({"a": [0.85, 0.85], "b": [0.52, 0.72]})[0] == pytest.approx(0.02)  # a gain is not multiplied
    assert replace(weighty, kind="mean").rank(figures) == pytest.approx((-0.0125, -0.15))


def test_labels_as_users_write_them() -> None:
    assert read_label("kind") == TaskLabel(field="kind")
    assert read_label("shoes=kind:2.5") == TaskLabel(field="kind", adapter="shoes", importance=2.5)
    for wrong in ("", "shoes=", "kind:", "kind:0", "kind:much", "kind:-1", "kind:inf"):
        with pytest.raises(ConfigError, match="expected FIELD, ADAPTER=FIELD"):
            read_label(wrong)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": (TaskLabel(field="colour", adapter="three"),)}, "the recipe's adapters are one, two"),
        ({"tasks": (TaskLabel(field="colour"), TaskLabel(field="colour"))}, "'colour' twice"),
        ({"methods": ("concat",)}, "'concat' is not a method with weights"),
        ({"budget": Budget(evaluations=2)}, "expected 3 or more"),
        ({"out": Path("/nowhere/tuned.yaml")}, "the folder /nowhere does not exist"),
        ({"tasks": (TaskLabel(field="color"),)}, "samples has it in "),
        ({"most_images": 4}, "too few to split"),
    ],
)
def test_what_cannot_be_searched_is_one_message(
    folder: Path, tuned: Tuned, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        tune(tiny_search(folder, work=tmp_path, **changes))


def test_a_recipe_of_one_adapter_has_nothing_to_search(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    one = recipe.model_copy(update={"adapters": recipe.adapters[:1]})
    with pytest.raises(ConfigError, match="names 1 adapter, but tune needs 2 to 5"):
        tune(tiny_search(folder, work=tmp_path, recipe=one))


def test_a_method_that_the_adapters_do_not_allow_is_left_out_unless_asked_for(
    folder: Path, tuned: Tuned, tmp_path: Path
) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    wide = save_adapter(tmp_path / "wide", folder / "base", 3, seed=3, r=6)
    spec = recipe.adapters[0].model_copy(update={"path": str(wide)})
    mixed = recipe.model_copy(update={"adapters": (spec, recipe.adapters[1])})
    tasks = (TaskLabel(field="colour"),)
    search = tiny_search(folder, 3, work=tmp_path / "work", out=tmp_path / "t.yaml", recipe=mixed, tasks=tasks, methods=())
    assert set(tune(search).tuning["methods"]) == set(METHODS) - {"linear"}
    with pytest.raises(AdapterMismatch, match="needs adapters of equal ranks"):
        tune(replace(search, methods=("linear",)))


def test_the_command(folder: Path, tuned: Tuned, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run_command(arguments(folder, "--evaluations", "20", "--json")) == 0
    printed = capsys.readouterr().out
    assert Evaluation.from_json(printed).trials == tuned.evaluation.trials
    assert json.loads(printed)["tuning"]["evaluated_now"] == 0
    assert main.run_command(arguments(folder, "--evaluations", "20")) == 0
    assert "tuned minus one" in capsys.readouterr().out
    assert main.run_command(arguments(folder, "--evaluations", "2")) == 2
    assert "error: --evaluations is 2" in capsys.readouterr().err
    assert yaml.safe_load((folder / "tuned.yaml").read_text())["adapters"]
