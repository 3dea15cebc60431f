"""Matrices that pass through two buffers in a fixed order, for every token anew."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ..storage.resident import ByteRange
from .block_stream import BlockStream
from .loader_pool import LoaderPool
from .slab import Slab, SlabPlan
from .weights import alias

MATRIX_BUFFERS = 2  # one is read into while the other is computed with


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedMatrix:
    """What a stream reads at a time.

    Attributes:
      shape: that it is seen in; what is read may be less, and the rest is then whatever was there before.
      ranges: of its bytes on flash; their targets count from the matrix's beginning.
    """

    shape: tuple[int, int]
    ranges: Sequence[ByteRange]


class MatrixStream:
    """Numbered matrices, taken in order, again and again. Use: `take`, dispatch what reads it, `give_back`.

    Attributes:
      files: that it reads from.
    """

    def __init__(self, slab: SlabPlan, dtype: np.dtype, matrices: Sequence[StreamedMatrix]) -> None:
        """Reserves the buffers, each as large as the largest of the matrices [rows, columns], in the store's dtype."""
        self._matrices, self._dtype = matrices, dtype
        num_bytes = max(math.prod(matrix.shape) for matrix in matrices) * dtype.itemsize
        self._offsets = [slab.reserve(num_bytes) for _ in range(MATRIX_BUFFERS)]
        self.files = {r.file for matrix in matrices for r in matrix.ranges}

    def bind(self, slab: Slab, pool: LoaderPool, files: Sequence[Path]) -> None:
        """Begins; `files` are those that the loaders know."""
        offsets, ranges = self._offsets, [matrix.ranges for matrix in self._matrices]  # not `self`, which holds the stream

        def load(item: int, buffer: int):
            return [pool.read_bytes(files.index(r.file), r.offset, r.length, offsets[buffer] + r.target) for r in ranges[item]]

        shapes = {matrix.shape for matrix in self._matrices}
        self._views = [{shape: alias(slab.array(offset, shape, self._dtype)) for shape in shapes} for offset in offsets]
        self._stream = BlockStream(pool, load, items=range(len(ranges)), num_buffers=len(offsets), cyclic=True)
        self._taken = 0

    def take(self, number: int) -> jax.Array:
        """The matrix, complete."""
        self._taken = self._stream.take(number)
        return self._views[self._taken][self._matrices[number].shape]

    def give_back(self, result: jax.Array) -> None:
        """The matrix taken last may be overwritten when `result` is computed."""
        self._stream.give_back(self._taken, result)

    def example(self, number: int) -> jax.Array:
        """An array like the matrix, for compiling kernels."""
        return self._views[0][self._matrices[number].shape]
