"""Each gate holds for what is sound and fails for what was broken on purpose; the policy of embedding anew."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from lora_embed.config.foreign import taken_as
from lora_embed.gates import checks, judge
from lora_embed.gates.checks import Comparison, Gate, Limits, compare, comparison_gates
from lora_embed.gates.reembed import Policy, re_embed_decision
from lora_embed.vectors.health import Figures, measure
from lora_embed.vectors.metrics import knn_accuracy, paired_difference, split_by_name

Array = NDArray[np.float32]
CLASSES = 6
LIMITS = Limits()


def clusters(rows: int, seed: int = 0, dimension: int = 32) -> tuple[Array, list[int]]:
    """Vectors about six centres, far from the origin, and which centre each is of."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    centres = np.random.default_rng(99).normal(size=(CLASSES, dimension))
    return (centres[labels] + 0.6 * rng.normal(size=(rows, dimension)) + 1).astype(np.float32), labels.tolist()


def ids_of(rows: int) -> list[str]:
    return [f"a.tar/{row}" for row in range(rows)]


def figures(vectors: Array) -> Figures:
    images = [hashlib.sha256(str(row).encode()).digest() for row in range(len(vectors))]
    return measure(ids_of(len(vectors)), images, vectors).figures()


def health(vectors: Array, before: Array | None = None, *, same_space: bool = False) -> dict[str, Gate]:
    found = figures(before) if before is not None else None
    return {gate.name: gate for gate in checks.health_gates(figures(vectors), found, same_space=same_space, limits=LIMITS)}


def failed(found: dict[str, Gate]) -> set[str]:
    return {name for name, gate in found.items() if not gate.holds}


def test_the_figures_of_an_older_table_are_taken() -> None:
    """A figure that is added needs a default; else no version follows one that was published before."""
    known = {
        "count": 9,
        "unusable": 0.0,
        "constant": 0.0,
        "rank": 2.0,
        "spread": 0.1,
        "norms": [1.0, 2.0, 3.0],
        "duplicates": 0.0,
    }
    assert taken_as(Figures, known, "the manifest").norms == (1.0, 2.0, 3.0)


def zeros(vectors: Array) -> Array:
    return np.where(np.arange(len(vectors))[:, None] % 50 == 0, 0, vectors)


def dead_dimensions(vectors: Array) -> Array:
    return np.where(np.arange(vectors.shape[1]) < 4, np.float32(0.25), vectors)


def one_vector_for_many(vectors: Array) -> Array:
    return np.where(np.arange(len(vectors))[:, None] % 10 == 0, vectors[0], vectors)


def exploded(vectors: Array) -> Array:
    return np.where(np.arange(len(vectors))[:, None] % 20 == 0, 1000 * vectors, vectors)


def on_a_plane(vectors: Array) -> Array:
    axes = np.random.default_rng(5).normal(size=(vectors.shape[1], 2)).astype(np.float32)
    return vectors @ axes @ axes.T + np.float32(1e-3) * vectors + 3


def hardly_varying(vectors: Array) -> Array:
    return vectors.mean(axis=0) + np.float32(0.02) * (vectors - vectors.mean(axis=0))


BROKEN: list[tuple[Callable[[Array], Array], str]] = [
    (zeros, "unusable"),
    (dead_dimensions, "constant"),
    (one_vector_for_many, "duplicates"),
    (exploded, "norms"),
    (on_a_plane, "collapsed"),
    (hardly_varying, "spread"),
]


@pytest.mark.parametrize(("broken", "name"), BROKEN)
def test_each_gate_of_health_stops_what_it_is_for(broken: Callable[[Array], Array], name: str) -> None:
    before, _ = clusters(500)
    assert failed(health(before, before)) == set()
    assert failed(health(clusters(500, seed=1)[0], before)) == set()
    assert failed(health(broken(before), before)) == {name}
    assert failed(health(broken(before))) <= {name}  # the first version: floors alone


def test_vectors_on_a_line_or_all_alike_fail_without_a_version_before() -> None:
    vectors, _ = clusters(500)
    line = vectors[:, :1] * np.float32(1 / 3) * vectors[0] + 2 * vectors[1]
    assert "collapsed" in failed(health(line.astype(np.float32)))
    assert {"collapsed", "spread", "constant", "duplicates"} == failed(health(np.tile(vectors[:1], (500, 1))))
    assert "spread" in failed(health(hardly_varying(hardly_varying(vectors))))


def test_a_night_of_the_same_space_may_be_narrow_but_not_of_another_length() -> None:
    before, labels = clusters(2000)
    narrow = hardly_varying(before[np.array(labels) == 2])
    assert failed(health(narrow, before, same_space=True)) == set()
    assert failed(health(narrow, before)) == {"spread"}
    for factor in (np.float32(0.4), np.float32(2.5)):
        assert failed(health(factor * before, before, same_space=True)) == {"norms"}
    assert failed(health(np.float32(2.5) * before, before)) == set()  # another space has its own length


def test_what_was_published_can_be_published_again() -> None:
    vectors = on_a_plane(hardly_varying(hardly_varying(clusters(500)[0])))
    assert failed(health(vectors, vectors)) == set()


def test_a_few_vectors_are_not_judged() -> None:
    few = np.ones((checks.MIN_ROWS - 1, 8), np.float32)
    assert health(few) == {}
    assert compare(ids_of(len(few)), few, few) is None
    assert failed(health(np.ones((checks.MIN_ROWS, 8), np.float32)))


def test_a_gate_says_its_figure_and_goes_into_a_manifest() -> None:
    gate = Gate(name="norms", value=float("nan"), limit=2.0, direction="at most", says="x")
    assert not gate.holds
    assert not replace(gate, direction="at least").holds
    expected = {"name": "norms", "value": None, "limit": 2.0, "direction": "at most", "says": "x", "holds": False}
    assert json.loads(json.dumps(gate.to_dict(), allow_nan=False)) == expected
    edge = replace(gate, value=2.0)
    assert edge.holds
    assert replace(edge, direction="at least").holds
    found = health(one_vector_for_many(clusters(500)[0]))["duplicates"]
    assert found.says == "10.00% of the images have exactly the vector of another image whose bytes differ"


def test_a_processor_that_differs_is_named_whether_it_was_read_or_made() -> None:
    before = {"resize": (64, 64), "multiply": (0.1, 0.2, 0.3), "crop": None}
    assert checks.processor(before, json.loads(json.dumps(before))).holds
    found = checks.processor(before, before | {"multiply": (0.1, 0.2, 0.4), "resize": 64})
    assert (found.value, found.holds) == (2.0, False)
    assert "multiply was [0.1, 0.2, 0.3] and is [0.1, 0.2, 0.4]" in found.says


def test_neighbour_overlap_is_scikit_learns_neighbours_by_hand() -> None:
    (old, _), (noise, _) = clusters(300), clusters(300, seed=1)
    new = old + np.float32(0.3) * noise
    sets = []
    for space in (old, new):
        search = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(space)
        sets.append([set(row) for row in search.kneighbors(return_distance=False)])  # itself is left out
    expected = np.mean([len(one & other) / 7 for one, other in zip(*sets, strict=True)])
    assert 0.2 < expected < 0.9
    assert checks.neighbour_overlap(old, new, 7) == pytest.approx(expected, abs=1e-3)
    assert checks.neighbour_overlap(old, 3 * old, 7) == 1
    assert checks.neighbour_overlap(old, old[:, ::-1], 7) == 1  # of another dimension or basis: only neighbours count
    with pytest.raises(ValueError, match="k is 300, expected 1 to 299"):
        checks.neighbour_overlap(old, new, 300)


def test_overlap_beyond_chance_is_nothing_for_unrelated_spaces_whatever_the_rows() -> None:
    for rows in (100, 500):
        one, other = (np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32) for seed in (1, 2))
        found = compare(ids_of(rows), one, other)
        assert found is not None
        assert found.overlap == pytest.approx(0, abs=0.03)
        assert found.accuracy is None
        assert {gate.name: gate.holds for gate in comparison_gates(found, LIMITS)} == {"neighbours": False}


def test_vectors_without_a_direction_count_as_far_from_all() -> None:
    old, labels = clusters(300)
    new = np.where(np.arange(300)[:, None] % 2 == 0, np.float32(0), old)
    new[1] = np.nan
    found = compare(ids_of(300), old, new, labels)
    assert found is not None
    assert found.accuracy is not None
    assert found.accuracy.change < -0.2
    assert not any(gate.holds for gate in comparison_gates(found, LIMITS))


def compared(new: Callable[[Array], Array], rows: int = 600) -> Comparison:
    old, labels = clusters(rows)
    found = compare(ids_of(rows), old, new(old), [str(label) for label in labels])
    assert found is not None
    return found


def without_classes(vectors: Array) -> Array:
    """Keep of each vector what does not tell its class."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, vectors.shape[1]))
    axes = np.linalg.qr(centres.T)[0]
    return (vectors - vectors @ axes @ axes.T).astype(np.float32)


def test_images_that_have_changed_are_not_compared() -> None:
    """Nor those of one version alone: vectors of two images say nothing of two encoders."""

    def rows(**images: tuple[bytes, float]) -> judge.Rows:
        return {id_: {"sha256": sha256, "embedding": [value]} for id_, (sha256, value) in images.items()}

    before = rows(same=(b"1", 1.0), changed=(b"2", 2.0), removed=(b"3", 3.0), moved=(b"4", 4.0))
    new = rows(added=(b"3", 30.0), moved=(b"4", 40.0), changed=(b"5", 50.0), same=(b"1", 10.0))
    ids, old, now = judge.align(before, new)
    assert (ids, old.tolist(), now.tolist()) == (["same", "moved"], [[1.0], [4.0]], [[10.0], [40.0]])


def test_accuracy_on_carried_labels_falls_where_classes_are_lost() -> None:
    same, worse = compared(lambda old: 2 * old), compared(without_classes)
    assert same.accuracy is not None
    assert worse.accuracy is not None
    assert (same.accuracy.change, same.accuracy.error) == (0, 0)
    assert worse.accuracy.old == same.accuracy.old > 0.8
    assert worse.accuracy.new < 0.4
    gate = {gate.name: gate for gate in comparison_gates(worse, LIMITS)}["accuracy"]
    assert not gate.holds
    says = f"{worse.accuracy.new:.1%} of 600 images the right label, before it was {worse.accuracy.old:.1%}"
    assert says in gate.says
    assert all(gate.holds for gate in comparison_gates(same, LIMITS))


def test_the_error_of_a_change_is_the_corrected_one_of_paired_splits() -> None:
    (old, labels), (noise, _) = clusters(300), clusters(300, seed=1)
    new = (old + 0.8 * noise).astype(np.float32)
    found = checks.accuracy_change(ids_of(300), old, new, labels)
    banks = [split_by_name(ids_of(300), checks.BANK_SHARE, seed) for seed in range(checks.SPLITS)]
    truth = np.array(labels)
    one, other = (
        [knn_accuracy(space[bank], truth[bank], space[~bank], truth[~bank]) for bank in banks] for space in (new, old)
    )
    expected = paired_difference(one, other, checks.BANK_SHARE)
    assert found is not None
    assert found.change == pytest.approx(expected.mean)
    assert found.error == pytest.approx(expected.corrected_error)
    assert found.error > 0


def test_a_loss_must_be_beyond_two_errors() -> None:
    accuracy = checks.AccuracyChange(old=0.70, new=0.62, error=0.02, rows=600)
    found = Comparison(rows=600, k=10, shared=0.6, overlap=0.6, accuracy=accuracy)
    assert all(gate.holds for gate in comparison_gates(found, LIMITS))
    certain = replace(found, accuracy=replace(accuracy, error=0.01))
    assert [gate.name for gate in comparison_gates(certain, LIMITS) if not gate.holds] == ["accuracy"]


def test_few_neighbours_may_stay_where_labels_show_that_vectors_are_better() -> None:
    better = checks.AccuracyChange(old=0.45, new=0.70, error=0.02, rows=600)
    found = Comparison(rows=600, k=10, shared=0.2, overlap=0.18)
    assert [gate.holds for gate in comparison_gates(found, LIMITS)] == [False]
    assert [gate.holds for gate in comparison_gates(replace(found, accuracy=better), LIMITS)] == [True, True]
    unsure = replace(better, new=0.48)
    assert [gate.holds for gate in comparison_gates(replace(found, accuracy=unsure), LIMITS)] == [False, True]
    assert [gate.holds for gate in comparison_gates(replace(found, overlap=0.09, accuracy=better), LIMITS)] == [False, True]


@pytest.mark.parametrize("labels", [[None] * 300, ["same"] * 300, ids_of(300), ["a", "b"] * 30 + [None] * 240])
def test_labels_that_say_nothing_give_no_accuracy(labels: list[str | None]) -> None:
    old, _ = clusters(300)
    assert checks.accuracy_change(ids_of(300), old, old, labels) is None


def test_accuracy_leaves_out_rows_without_a_label_or_alone_with_theirs() -> None:
    old, labels = clusters(400)
    mixed = [f"only {row}" if row >= 380 else None if row >= 300 else str(labels[row]) for row in range(400)]
    found = checks.accuracy_change(ids_of(400), old, without_classes(old), mixed)
    alone = checks.accuracy_change(ids_of(300), old[:300], without_classes(old)[:300], labels[:300])
    assert found is not None
    assert found.rows == 300
    assert found == alone


@pytest.mark.parametrize(
    ("overlap", "change", "action", "says"),
    [
        (0.70, 0.00, "go on", "70.0% of neighbours stay the same; embedding all images anew takes about 12.0 hours"),
        (0.99, 0.00, "skip", "the change is below your threshold: 99.0% of neighbours stay the same, and reembed.skip_overlap "
         "is 98.0%; embedding all images anew would have taken about 12.0 hours"),
        (0.99, 0.05, "go on", "99.0% of neighbours stay the same"),
        (0.70, -0.20, "ask", "accuracy: the 10 nearest images give 50.0% of 600 images the right label, before it was 70.0%"),
        (0.20, 0.00, "ask", "neighbours: of the 10 nearest images of an image, 2.0 are still the same"),
        (0.99, -0.20, "ask", "A person must decide: the rest takes about 12.0 hours."),
    ],
)  # fmt: skip
def test_the_decision_follows_the_policy(overlap: float, change: float, action: str, says: str) -> None:
    accuracy = checks.AccuracyChange(old=0.7, new=0.7 + change, error=0.01, rows=600)
    found = re_embed_decision(
        Comparison(rows=600, k=10, shared=overlap, overlap=overlap, accuracy=accuracy), Policy(), hours=12
    )
    assert found.action == action
    assert says in found.says


def test_a_policy_may_never_skip_and_other_gates_ask() -> None:
    same = Comparison(rows=600, k=10, shared=1.0, overlap=1.0)
    assert re_embed_decision(same, Policy(), hours=0.2).says.endswith("about 12 minutes")
    assert re_embed_decision(same, Policy(skip_overlap=None), hours=1).action == "go on"
    changed = checks.processor({"crop": 1}, {"crop": 2})
    assert re_embed_decision(same, Policy(), hours=1, extra=[changed]).action == "ask"
    assert re_embed_decision(None, Policy(), hours=1, extra=[changed]).action == "ask"
    assert re_embed_decision(None, Policy(), hours=1).action == "go on"
