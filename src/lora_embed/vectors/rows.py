"""Rows of vectors: a table's vectors as an array, and vectors scaled to length 1."""

from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Real = TypeVar("Real", bound=np.floating[Any])


def vectors_of(rows: pa.RecordBatch | pa.Table) -> NDArray[np.float32]:
    """The column `embedding` as float32 (n, d)."""
    column = rows.column("embedding")
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values.reshape(len(column), column.type.list_size), np.float32)


def unit(vectors: NDArray[Real]) -> NDArray[Real]:
    """Rows (n, d) scaled to length 1, in their own precision.

    A row of zeros, or with a value that is not finite, has no direction and becomes zeros: its cosine to every vector is 0.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    has_direction = np.isfinite(norms) & (norms > 0)
    if has_direction.all():
        return np.asarray(vectors / norms)
    return np.asarray(np.where(has_direction, vectors / np.where(has_direction, norms, 1), 0), vectors.dtype)
