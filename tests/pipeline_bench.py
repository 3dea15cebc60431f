"""A pool of real loaders over one slab, for tests below the engine. Axes: S slots, P parts of a bundle, D d_model."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from inflash.pipeline.channel import COUNTERS
from inflash.pipeline.loader_pool import LoaderPool
from inflash.pipeline.slab import Slab, SlabPlan
from inflash.storage.store import Store

NUM_SLOTS = 600


class Bench:
    """A pool over the slots of one layer, room for as many neurons with their parts apart, and for raw bytes."""

    def __init__(self, store: Store, *, loaders: int, depth: int, files: Sequence[Path] = (), verify: bool = False) -> None:
        plan = SlabPlan()
        regions = LoaderPool.reserve(plan, loaders, store.config.d_ff)
        self.parts = [plan.reserve(NUM_SLOTS * store.bundles.row_bytes) for _ in range(2)]
        self.slots_at = plan.reserve(NUM_SLOTS * store.bundles.bundle_bytes)
        self.bytes_at = plan.reserve(8 << 20)
        self.slab, self.store = Slab(plan.num_bytes), store
        self.pool = LoaderPool(store, self.slab, regions, depth=depth, files=files, verify=verify)

        self._dtype = np.dtype(f"u{store.bundles.row_bytes // store.config.d_model}")

    def rows(self, part: int) -> np.ndarray:
        """[S, D] of the parts that lie apart."""
        return self.slab.array(self.parts[part], (NUM_SLOTS, self.store.config.d_model), self._dtype)

    def bundles(self) -> np.ndarray:
        """[S, P, D] of the slots."""
        return self.slab.array(self.slots_at, (NUM_SLOTS, *self.store.bundles.shape[1:]), self._dtype)

    def raw(self, length: int, at: int = 0) -> bytes:
        return self.slab.array(self.bytes_at + at, (length,), np.uint8).tobytes()

    def awaited(self) -> dict[int, int]:
        """For each loader the request that the engine waits for."""
        return {number: int(peer.channel.awaited[0]) for number, peer in enumerate(self.pool._peers)}

    def count_read(self) -> None:
        """Has the first loader seem to have one more read back."""
        self.pool._peers[0].channel.counters[COUNTERS.index("reads")] += np.uint64(1)

    def scatter(self, layer: int, positions: Sequence[int] | np.ndarray, slots: Sequence[int] | np.ndarray) -> None:
        self.pool.wait(self.pool.scatter(layer, np.asarray(positions), np.asarray(slots), self.slots_at))


@contextlib.contextmanager
def bench(store: Store, *, loaders: int = 2, depth: int = 2, **options) -> Iterator[Bench]:
    made = Bench(store, loaders=loaders, depth=depth, **options)
    try:
        yield made
    finally:
        made.pool.close()
        made.slab.close()
