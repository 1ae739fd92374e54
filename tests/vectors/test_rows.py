"""Vectors of length 1, and the column of a table as an array."""

import numpy as np
import pyarrow as pa
import pytest

from lora_embed.vectors.rows import unit, vectors_of


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_row_has_length_one_or_no_direction(kind: type) -> None:
    rows = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1], [-1e-30, 0]], kind)
    found = unit(rows)
    assert found.dtype == kind
    np.testing.assert_allclose(found[0], [0.6, 0.8], rtol=1e-6)
    assert not found[1:4].any()
    assert found[4].tolist() in ([-1.0, 0.0], [0.0, 0.0])  # as float32 its length is rounded to 0
    assert kind is np.float32 or found[4, 0] == -1


def test_the_column_of_a_table_a_batch_and_of_no_rows() -> None:
    kind = pa.list_(pa.float16(), 2)
    rows = pa.table({"embedding": pa.array([np.array([1, 2], np.float16), np.array([3, 4], np.float16)], kind)})
    for given in (rows, rows.to_batches()[0], pa.concat_tables([rows.slice(0, 1), rows.slice(1)]), rows.slice(0)):
        assert vectors_of(given).tolist() == [[1, 2], [3, 4]]
        assert vectors_of(given).dtype == np.float32
    assert vectors_of(rows.slice(1)).tolist() == [[3, 4]]
    assert vectors_of(rows.slice(0, 0)).shape == (0, 2)
