"""Neurons in the slab, seen by loaders as offsets and by kernels as JAX arrays: rows of parts apart, or whole bundles.

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
    """Room for `num_rows` neurons that come in order: up rows and down rows apart.

    Attributes:
      offsets: of each part's rows in the slab, P of them.
      parts: P arrays [S, D] on the slab's memory, in the store's dtype; there once `bind` was called.
      up, down: the same as JAX arrays.
    """

    def __init__(self, plan: SlabPlan, bundles: BundleLayout, num_rows: int) -> None:
        self.num_rows = num_rows
        self._bundles = bundles
        self.offsets: Sequence[int] = [plan.reserve(num_rows * bundles.row_bytes) for _ in range(bundles.num_parts)]
        self.up: jax.Array
        self.down: jax.Array

    def bind(self, slab: Slab) -> None:
        shape = (self.num_rows, self._bundles.d_model)
        self.parts = [slab.array(o, shape, dtype_of(self._bundles.dtype)) for o in self.offsets]
        self.up, self.down = (alias(part) for part in self.parts)

    def probe(self, slab: Slab, reader: DirectReader) -> bool:
        """Reads one neuron and says whether reads into these rows go past the page cache; the reader warns where they do not."""
        shape = (self.num_rows, self._bundles.d_model)
        parts = [slab.array(o, shape, storage_dtype(self._bundles.dtype)) for o in self.offsets]
        reader.read(np.zeros(1, np.int64), np.zeros(1, np.int64), parts)
        return reader.is_direct([part.ctypes.data for part in parts])


class NeuronSlots:
    """Slots for neurons of one layer that come singly: whole bundles, as they lie on flash.

    Attributes:
      offset: of the slots in the slab.
      bundles: [S, P, D] JAX array on the slab's memory, in the store's dtype; there once `bind` was called.
    """

    def __init__(self, plan: SlabPlan, bundles: BundleLayout, used_slots: int) -> None:
        """Addresses for all neurons, of which memory is meant for the first `used_slots`."""
        self._layout = bundles
        self.offset = plan.reserve(bundles.layer_bytes, used_slots * bundles.bundle_bytes)
        self.bundles: jax.Array

    def bind(self, slab: Slab) -> None:
        self._array = slab.array(self.offset, self._layout.shape, dtype_of(self._layout.dtype))
        self.bundles = alias(self._array)

    def copy_from(self, passing: NeuronRows, rows: np.ndarray, slots: np.ndarray) -> None:
        """Copies passing rows [n] int into slots [n] int, none of which a kernel reads just now."""
        for number, part in enumerate(passing.parts):
            self._array[slots, number] = part[rows]

    def discard(self, slab: Slab, first: int) -> None:
        """Gives back the memory of the slots from `first` on."""
        size = self._layout.bundle_bytes
        slab.discard(self.offset + first * size, self._layout.layer_bytes - first * size)
