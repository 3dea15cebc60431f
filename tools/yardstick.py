"""How fast this machine is right now, by pieces of work that never change: what predictions made at another time are scaled by.

On a machine that others use, too, memory, processors and disk vary by a factor of two within seconds, far more than plans differ.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.compilation import jit
from ..kernels.linear import linear
from ..pipeline import native_library
from ..pipeline.machine_state import MachineState
from ..pipeline.neuron_cache import make_cache
from ..storage.layout import bundles_path
from ..storage.read_rate import read_rate
from ..storage.shard_index import open_raw_array
from ..storage.store import Store
from .stopwatch import seconds_of
from .tiny_model import TinyModel

_ROWS, _COLUMNS = 16384, 4096  # 128 MiB in bf16: beyond any cache
_READ_BYTES, _READ_DEPTH = 8 << 10, 128
_BLOCK_BYTES, _BLOCK_DEPTH = 512 << 10, 12
_DISK_S = 0.08
_SETTLING_S = 0.05  # a run that stands still goes on reading ahead for a while, and the first product would pay for it
_NEURONS, _SLOTS, _NAMED, _PLACINGS = 8192, 2048, 400, 24


class Yardstick:
    """The pieces of work, ready to be timed."""

    def __init__(self, files: Sequence[tuple[Path, int]], batches: Iterable[int], tiny: TinyModel | None = None) -> None:
        """Compiles.

        Args:
          files: on the disk in question, and their sizes; taken in turn. A store's own, where one is to be read: a disk is faster with
            what was written or read lately.
          batches: numbers of sequences that products are timed for.
          tiny: whose steps are timed, for a model that stays in the processor's caches as this one does.
        """
        native_library.choose()
        self._files = cycle(files)
        self._products = _products(batches, _ROWS, _COLUMNS)
        rng = np.random.default_rng(0)
        self._named = [np.sort(rng.choice(_NEURONS, _NAMED, replace=False)).astype(np.int32) for _ in range(_PLACINGS)]
        self._pieces: dict[str, Callable[[], Any]] = {
            "kernel_s": partial(self.kernels, 3),
            "cached_step_s": partial(tiny.steps_s, streamed=False) if tiny else dict,
            "streamed_step_s": partial(tiny.steps_s, streamed=True) if tiny else dict,
            "processor_s": lambda: min(seconds_of(self._place) for _ in range(3)),
            "random_bytes_per_s": lambda: self._reading(_READ_BYTES, _READ_DEPTH, in_order=False),
            "stream_bytes_per_s": lambda: self._reading(_BLOCK_BYTES, _BLOCK_DEPTH, in_order=True),
        }
        self._state = MachineState(**{name: piece() for name, piece in self._pieces.items()})  # compiles

    def measure(self, *fields: str) -> MachineState:
        """About half a second, each reading an eighth; the tiny model's steps take as long, and those that stream a second.

        Args:
          fields: of the state that are measured, the others stay as they were the last time; without any, all are.
        """
        time.sleep(_SETTLING_S)
        self._state = replace(self._state, **{name: self._pieces[name]() for name in fields or self._pieces})
        return self._state

    def product(self, num_seqs: int) -> Callable[[], object]:
        """The piece of work of so many sequences."""
        return self._products[num_seqs]

    def kernels(self, times: int = 2) -> dict[int, float]:
        """Only the products with a matrix that no cache holds."""
        return _medians(self._products, times)

    def _reading(self, size: int, depth: int, *, in_order: bool) -> float:
        file, file_bytes = next(self._files)
        return read_rate(file, file_bytes, min(size, file_bytes), depth, _DISK_S, in_order=in_order)

    def _place(self) -> None:
        cache = make_cache(_NEURONS, _SLOTS, "lfu", None)
        for neuron_ids in self._named:
            cache.begin_token()
            cache.place(neuron_ids)


def neuron_files(store: Store) -> list[tuple[Path, int]]:
    """The files of a store's bundles and their sizes, in an order that has neighbours far apart."""
    layers = np.random.default_rng(0).permutation(store.config.num_layers).tolist()
    return [(open_raw_array(store.path / bundles_path(layer)).file, store.bundles.layer_bytes) for layer in layers]


def _products(batches: Iterable[int], rows: int, columns: int) -> dict[int, Callable[[], object]]:
    """Calls that multiply a [rows, columns] matrix with so many vectors, and wait for the result."""
    product, weight = jit(linear, unrolled=False), jnp.resize(jnp.linspace(-1, 1, 4096, dtype=jnp.bfloat16), (rows, columns))
    vectors = {batch: jnp.ones((batch, columns), jnp.float32) for batch in batches}
    return {batch: partial(_completed, product, each, weight) for batch, each in vectors.items()}


def _completed(product: Callable[..., jax.Array], vectors: jax.Array, weight: jax.Array) -> jax.Array:
    return product(vectors, weight).block_until_ready()


def _medians(products: Mapping[int, Callable[[], object]], times: int) -> dict[int, float]:
    """Median seconds of so many calls, by number of sequences."""
    return {batch: statistics.median(seconds_of(call) for _ in range(times)) for batch, call in products.items()}
