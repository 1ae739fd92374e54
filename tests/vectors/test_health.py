"""Figures of vectors against numpy on all rows at once, whatever the files they come in; samples that stay."""

import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from lora_embed.config.foreign import taken_as
from lora_embed.schema import part_schema
from lora_embed.vectors import health
from lora_embed.vectors.health import Health, combine, measure, measure_rows, participation_ratio, seeded_sample

DIMENSION = 24


def vectors_of(rows: int, seed: int = 0, dimension: int = DIMENSION) -> NDArray[np.float32]:
    """Vectors far from the origin on axes of different scales, as encoders give them."""
    scales = np.geomspace(0.1, 3, dimension)
    return (np.random.default_rng(seed).normal(size=(rows, dimension)) * scales + 2).astype(np.float32)


def ids_of(rows: int) -> list[str]:
    return [f"a.tar/{row}" for row in range(rows)]


def image(row: int) -> bytes:
    return hashlib.sha256(str(row).encode()).digest()


def measured(vectors: NDArray[np.float32], images: list[bytes] | None = None) -> Health:
    return measure(ids_of(len(vectors)), images or [image(row) for row in range(len(vectors))], vectors)


def test_figures_are_numpys() -> None:
    vectors = vectors_of(500)
    found = measured(vectors)
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    directions = exact / lengths[:, None]
    assert np.allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    assert np.allclose(found.squares / found.count, exact.var(axis=0), rtol=1e-12)
    figures = found.figures()
    assert (figures.count, figures.unusable, figures.constant, figures.duplicates) == (500, 0, 0, 0)
    assert figures.norms == pytest.approx(np.quantile(lengths, (0.01, 0.5, 0.99)))
    assert figures.spread == pytest.approx(1 - float(np.mean(directions @ directions.T)), rel=1e-9)
    assert taken_as(health.Figures, figures.to_dict(), "") == figures


def test_files_and_their_order_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SAMPLE_ROWS", 100)
    vectors, images = vectors_of(700), [image(row % 600) for row in range(700)]
    vectors[600:], vectors[200:250] = vectors[:100], vectors[300:350]
    vectors[5], vectors[6, 3] = 0, np.nan
    whole = measured(vectors, images)
    pieces = [slice(0, 1), slice(1, 300), slice(300, 300), slice(300, 650), slice(650, 700)]
    ids = ids_of(700)
    parts = [measure(ids[piece], images[piece], vectors[piece]) for piece in pieces]
    for several in (combine(parts), combine(parts[::-1]), combine([combine(parts[:2]), combine(parts[2:])])):
        assert np.allclose(several.mean, whole.mean, rtol=1e-12)
        assert np.allclose(several.squares, whole.squares, rtol=1e-9)
        assert np.array_equal(several.sample, whole.sample)
        figures = replace(several.figures(), spread=whole.figures().spread)
        assert figures == whole.figures()
        assert several.figures().spread == pytest.approx(whole.figures().spread, rel=1e-12)
    assert whole.figures().duplicates == pytest.approx(100 / 698)
    monkeypatch.setattr(health, "BLOCK_ROWS", 64)
    assert np.allclose(measured(vectors, images).squares, whole.squares, rtol=1e-9)


def test_a_small_variance_beside_a_large_mean_is_not_lost() -> None:
    vectors = vectors_of(400)
    vectors[:, 0] = 10_000 + np.random.default_rng(1).integers(0, 2, 400) / 64
    parts = [measure(ids_of(400)[start::4], [None] * 100, vectors[start::4]) for start in range(4)]
    variance = combine(parts).squares[0] / 400
    assert variance == pytest.approx(vectors[:, 0].astype(np.float64).var(), rel=1e-9)


def test_the_sample_is_that_of_seeded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SAMPLE_ROWS", 50)
    vectors, ids = vectors_of(300), ids_of(300)
    sample = [ids.index(text) for text in seeded_sample(ids, 50)]
    assert np.array_equal(measured(vectors).sample, vectors[sample])


def test_unusable_vectors_are_counted_and_left_out_of_the_rest() -> None:
    vectors = vectors_of(100)
    whole = measured(vectors[4:]).figures()
    vectors[0], vectors[1, 0], vectors[2, 1], vectors[3] = 0, np.nan, np.inf, -0.0
    figures = measured(vectors).figures()
    assert figures.unusable == 0.04
    assert (figures.count, figures.spread) == (96, pytest.approx(whole.spread))
    with pytest.raises(ValueError, match="nothing can be measured"):
        measured(np.zeros((3, DIMENSION), np.float32)).figures()


def test_constant_dimensions_are_those_that_vary_by_less_than_rounding() -> None:
    vectors = vectors_of(200)
    vectors[:, 0] = 0
    vectors[:, 1] = np.where(np.arange(200) % 2, 1e4, np.nextafter(np.float32(1e4), np.float32(2e4)))
    vectors[:, 2:4] = 1e-7 * np.random.default_rng(0).normal(size=(200, 2))  # small, but not constant
    assert measured(vectors).figures().constant == pytest.approx(2 / DIMENSION)


def test_duplicates_are_rows_with_the_vector_of_another_image() -> None:
    vectors, images = vectors_of(100), [image(row) for row in range(100)]
    vectors[1] = vectors[0]  # two images, one vector
    vectors[3], images[3] = vectors[2], images[2]  # one image that stands there twice
    vectors[10:13] = 1.5
    vectors[20:22, 7:] = vectors[20, 7:]
    vectors[20, :7], vectors[21, :7] = 0.0, -0.0
    assert measured(vectors, images).figures().duplicates == pytest.approx(7 / 100)


def test_duplicates_of_a_large_set_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "DISTINCT", 400)
    vectors = vectors_of(4000)
    vectors[3000:] = vectors[:1000]
    parts = [measure(ids_of(4000)[s::8], [image(row) for row in range(s, 4000, 8)], vectors[s::8]) for s in range(8)]
    found = combine(parts)
    assert len(found.doubles.vector) == 400
    assert combine([combine(parts[5:]), combine(parts[:5])]).doubles.share == found.doubles.share
    assert found.doubles.share == pytest.approx(0.5, abs=0.08)
    vectors[1000:] = vectors[0]  # so many rows of one vector that its hash may not be among those counted
    assert measured(vectors).figures().duplicates == pytest.approx(0.75, abs=0.05)


def test_participation_ratio_is_that_of_the_eigenvalues() -> None:
    vectors = vectors_of(20_000)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(directions.T.astype(np.float64)))
    assert participation_ratio(vectors) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=2e-3)
    wide = vectors_of(60, dimension=200)  # fewer rows than dimensions: the other way round, the same formula
    assert participation_ratio(wide) == pytest.approx(participation_ratio(np.hstack([wide, np.zeros((60, 1))])))


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_participation_ratio_counts_directions_whatever_the_rows(rank: int) -> None:
    rng = np.random.default_rng(3)
    centre, axes = 40 * np.eye(64)[0], np.linalg.qr(rng.normal(size=(64, 64)))[0][:rank]
    found = [participation_ratio(centre + rng.normal(size=(rows, rank)) @ axes) for rows in (80, 300, 1500)]
    assert found == pytest.approx([rank] * 3, rel=0.12)


def test_vectors_that_are_all_alike_have_no_rank() -> None:
    assert participation_ratio(np.tile(vectors_of(1), (100, 1))) == 0
    assert participation_ratio(vectors_of(2)) == 0


def test_a_sample_does_not_depend_on_order_or_on_other_ids() -> None:
    ids = ids_of(1000)
    sample = seeded_sample(ids, 100)
    assert sample == seeded_sample(reversed(ids), 100)
    assert seeded_sample(ids, 30) == sample[:30]
    assert seeded_sample([*seeded_sample(ids[:400], 100), *seeded_sample(ids[400:], 100)], 100) == sample
    gone = set(ids[::10])
    kept = seeded_sample([text for text in ids if text not in gone], 100)
    assert set(sample) - gone <= set(kept)
    assert len(set(sample) & set(seeded_sample(ids, 100, seed=1))) < 30
    assert sorted(seeded_sample(ids, 5000)) == sorted(ids)


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_rejects_of_a_part_are_not_measured(vector_type: str) -> None:
    vectors = vectors_of(6).astype(vector_type)
    vectors[4:] = 0
    schema = part_schema(DIMENSION, vector_type, ())
    columns = {
        "id": ids_of(6),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMENSION).cast(schema.field(1).type),
        "shard": pa.array(["a.tar"] * 6).dictionary_encode(),
        "key": ids_of(6),
        "width": pa.array([8] * 6, pa.int32()),
        "height": pa.array([8] * 6, pa.int32()),
        "sha256": pa.array([image(row) for row in range(6)], pa.binary(32)),
        "reason": [None] * 4 + ["empty"] * 2,
        "detail": pa.nulls(6, pa.string()),
    }
    rows = pa.table(columns, schema=schema)
    found = measure_rows(pa.concat_tables([rows.slice(0, 3), rows.slice(3)]))
    assert (found.count, found.unusable) == (4, 0)
    assert np.allclose(found.mean, vectors[:4].astype(np.float64).mean(axis=0))
    assert measure_rows(rows.slice(0, 0)).count == 0
