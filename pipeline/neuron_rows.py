"""Rows of neurons in the slab: up rows and down rows apart, seen by loaders as offsets and by kernels as JAX arrays.

Axes: S slots, D d_model, P parts.
"""

from collections.abc import Sequence

import jax
import numpy as np

from ..storage.layout import BundleLayout, dtype_of, storage_dtype
from ..storage.readers import DirectReader
from .slab import Slab, SlabPlan
from .weights import alias


class NeuronRows:
    """Room for `num_rows` neurons of one layout, of which the first `used_rows` (None: all) will be used.

    Attributes:
      offsets: of each part's rows in the slab, P of them.
      up, down: [S, D] JAX arrays on the slab's memory, in the store's dtype; there once `bind` was called.
    """

    def __init__(self, plan: SlabPlan, bundles: BundleLayout, num_rows: int, used_rows: int | None = None) -> None:
        self.num_rows = num_rows
        self._bundles = bundles
        used = (num_rows if used_rows is None else used_rows) * bundles.row_bytes
        self.offsets: Sequence[int] = [plan.reserve(num_rows * bundles.row_bytes, used) for _ in range(bundles.num_parts)]
        self.up: jax.Array
        self.down: jax.Array

    def bind(self, slab: Slab) -> None:
        shape = (self.num_rows, self._bundles.d_model)
        self._parts = [slab.array(o, shape, dtype_of(self._bundles.dtype)) for o in self.offsets]
        self.up, self.down = (alias(part) for part in self._parts)

    def copy_to(self, other: "NeuronRows", rows: np.ndarray, others: np.ndarray) -> None:
        """Copies rows [n] int to the other's rows [n] int, none of which a kernel reads just now."""
        for source, target in zip(self._parts, other._parts, strict=True):
            target[others] = source[rows]

    def discard(self, slab: Slab, first: int) -> None:
        """Gives back the memory of the rows from `first` on."""
        for offset in self.offsets:
            slab.discard(offset + first * self._bundles.row_bytes, (self.num_rows - first) * self._bundles.row_bytes)

    def probe(self, slab: Slab, reader: DirectReader) -> bool:
        """Reads one neuron and says whether reads into these rows go past the page cache; the reader warns where they do not."""
        shape = (self.num_rows, self._bundles.d_model)
        parts = [slab.array(o, shape, storage_dtype(self._bundles.dtype)) for o in self.offsets]
        reader.read(np.zeros(1, np.int64), np.zeros(1, np.int64), parts)
        return reader.is_direct([part.ctypes.data for part in parts])
