"""The paper's way through a layer's neurons: predicted ones only, out of a cache that loaders fill.

Axes: T tokens of a tile, D d_model, F d_ff, S slots, K padded neurons.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels.compilation import jit
from ..kernels.sparse_ffn import gathered_ffn
from ..storage.store import Store
from .feed_forward import Passing, Tile, shortest_s
from .fixed_shapes import SMALLEST_GATHER, doublings, fitting
from .loader_pool import LoaderPool, Ticket
from .neuron_cache import LeastFrequentlyUsed, Placement, make_cache
from .neuron_rows import NeuronRows, NeuronSlots
from .options import EngineOptions
from .slab import Slab, SlabPlan
from .step_times import StepTimes
from .trace import HITS, LOOK_UP, MISSES, NAMED, PREFETCH, recorder
from .weights import on_device

IdsAndSlots = tuple[np.ndarray, np.ndarray]
"""Neurons [n] int32 and the slots that they are in [n] int32."""


def _gather_places(
    total: jax.Array,
    ffn_in: jax.Array,
    bundles: jax.Array,
    up_bias: jax.Array,
    predicted: jax.Array,
    places: jax.Array,
    *,
    compute_dtype: np.dtype,
) -> jax.Array:
    """`gathered_ffn` with slots, neurons and their number in one array, see `_places`: each argument from NumPy costs a transfer."""
    slots, neuron_ids, count = places[0, 1:], places[1, 1:], places[0, 0]
    return gathered_ffn(total, ffn_in, bundles, up_bias, predicted, slots, neuron_ids, count, compute_dtype=compute_dtype)


_gathered = jit(_gather_places, static_argnames=("compute_dtype",))


@dataclass(frozen=True, slots=True)
class _Prefetch:
    """Neurons on their way because of a guess."""

    ticket: Ticket
    neuron_ids: np.ndarray  # [m] int32
    slots: np.ndarray  # [m] int32


class CachedFeedForward:
    """Predicted neurons, those in the cache computed while the others are being read. See `FeedForward`.

    Attributes:
      slots: neurons that memory has room for, by layer.
      missed: neurons that were read because of guesses and predictions, by layer.
      last_read: the same for each layer's newest token.
    """

    def __init__(
        self,
        store: Store,
        slab: SlabPlan,
        up_bias: Sequence[np.ndarray],
        compute: np.dtype,
        options: EngineOptions,
        slots: dict[int, int],
    ) -> None:
        """`slots`: the neurons that memory has room for, by layer. Regions have addresses for all neurons, so that this can change."""
        d_ff = store.config.d_ff
        self._compute, self._times, self._d_ff, self._overlap = compute, StepTimes(), d_ff, options.overlap
        self.slots, self._trace = dict(slots), recorder()
        self.missed, self.last_read = dict.fromkeys(slots, 0), dict.fromkeys(slots, 0)
        self._gather_sizes = doublings(SMALLEST_GATHER, max(slots.values()))
        self._layers = {layer: NeuronSlots(slab, store.bundles, count) for layer, count in slots.items()}
        self._caches = {layer: make_cache(d_ff, count, options.policy, options.window) for layer, count in slots.items()}
        self._prefetches: dict[int, _Prefetch] = {}
        self._on_the_way = np.zeros(d_ff, bool)  # scratch, all False between calls
        self._bias = {layer: on_device(up_bias[layer]) for layer in slots}

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        self._pool, self._slab = pool, slab
        for places in self._layers.values():
            places.bind(slab)

    def resize(self, slots: dict[int, int]) -> None:
        """Other numbers of slots, between steps and with policy "lfu": layers that lose some give their memory back first."""
        for layer, count in sorted(slots.items(), key=lambda item: item[1] - self.slots[item[0]]):
            cache = self._caches[layer]
            assert isinstance(cache, LeastFrequentlyUsed)
            cache.resize(count)
            if count < self.slots[layer]:
                self._layers[layer].discard(self._slab, count)
            self.slots[layer] = count

    def has_room(self, layer: int) -> bool:
        """Whether neurons that pass by may be kept: some slots were never used, and the policy does not mind who fills them."""
        cache = self._caches[layer]
        return isinstance(cache, LeastFrequentlyUsed) and not cache.full

    def keep_passing(self, layer: int, votes: np.ndarray) -> Passing:
        """What is to be shown the layer's blocks, so that the neurons with most votes [F] are kept, as many as there is room for."""
        cache, places = self._caches[layer], self._layers[layer]
        assert isinstance(cache, LeastFrequentlyUsed)
        wanted = cache.wanted(votes)

        def keep(first: int, count: int, passing: NeuronRows) -> None:
            some = wanted[slice(*np.searchsorted(wanted, (first, first + count)))]
            places.copy_from(passing, some - first, cache.fill(some, votes[some]))

        return keep

    def observe(self, times: StepTimes) -> None:
        """Counts hits, misses and memory management into `times` from now on."""
        self._times = times

    def add_neurons(self, layer: int, tiles: Sequence[Tile]) -> list[jax.Array]:
        (tile,) = tiles  # decoding steps are one tile
        assert tile.predicted is not None
        with self._trace.span(NAMED, layer):
            neuron_ids = _named(tile.predicted, tile.active)
            self._trace.tell(len(neuron_ids))
        if layer not in self._prefetches:
            self._caches[layer].begin_token()
            self.last_read[layer] = 0
        most = min(self.slots[layer], self._gather_sizes[-1])
        self._times.neurons += self._d_ff
        total = tile.residual
        # Nearly always one turn; a token that needs more neurons than there are slots takes several.
        for start in range(0, max(len(neuron_ids), 1), most):
            if start:
                total.block_until_ready()  # the slots are about to be overwritten
            some = neuron_ids[start : start + most]
            total = self._add_turn(layer, some, total, tile, named=neuron_ids if start == 0 else None)
        return [total]

    def _add_turn(
        self,
        layer: int,
        neuron_ids: np.ndarray,
        total: jax.Array,
        tile: Tile,
        *,
        named: np.ndarray | None,
    ) -> jax.Array:
        """Some of a token's neurons; `named`: in its first turn, all of them."""
        with self._managing_memory(LOOK_UP, layer):
            placement = self._caches[layer].place(neuron_ids)
            prefetch = self._take_prefetch(layer, placement)
            ticket = self._ask(layer, placement)
            ready, late = self._split(placement, prefetch)
            self._times.count(hits=len(placement.hit_ids), misses=len(placement.miss_ids))
            self.missed[layer] += len(placement.miss_ids)
            self.last_read[layer] += len(placement.miss_ids)
            self._trace.tell(len(placement.hit_ids), len(placement.miss_ids))
        if named is not None:
            self.prefetch(layer + 1, tile)
        if self._overlap:
            with self._trace.span(HITS, layer, len(ready[0])):
                total = self._gather(layer, *ready, total, tile)
        if named is not None:
            self._trace.names(layer, named)  # while the misses are on their way
        self._pool.wait(ticket if prefetch is None else (*prefetch.ticket, *ticket))
        if not self._overlap:
            late = np.concatenate((ready[0], late[0])), np.concatenate((ready[1], late[1]))
        with self._trace.span(MISSES, layer, len(late[0])):
            return self._gather(layer, *late, total, tile)

    @contextmanager
    def _managing_memory(self, kind: int, layer: int) -> Iterator[None]:
        """Counts the time inside, less what is waited for loaders, which is counted as such."""
        began, waited = time.perf_counter_ns(), self._pool.wait_ns
        with self._trace.span(kind, layer):
            yield
        self._times.memory_ns += time.perf_counter_ns() - began - (self._pool.wait_ns - waited)

    def prefetch(self, layer: int, before: Tile) -> None:
        """Asks for the neurons that the tile of the layer before guesses; of too many, half a cache's: the others have to fit, too."""
        if before.guessed is None:
            return
        neuron_ids = _named(before.guessed, before.active)[: self.slots[layer] // 2]
        with self._managing_memory(PREFETCH, layer):
            self._caches[layer].begin_token()
            placement = self._caches[layer].place(neuron_ids)
            self._times.prefetched += len(placement.miss_ids)
            self.missed[layer] += len(placement.miss_ids)
            self.last_read[layer] = len(placement.miss_ids)
            self._trace.tell(len(placement.miss_ids), len(neuron_ids))
            self._prefetches[layer] = _Prefetch(self._ask(layer, placement, ahead=True), placement.miss_ids, placement.miss_slots)

    def _take_prefetch(self, layer: int, placement: Placement) -> _Prefetch | None:
        """What was asked for early and has not arrived; afterwards nothing is on its way to the slots of the misses."""
        prefetch = self._prefetches.pop(layer, None)
        if prefetch is None:
            return None
        if self._pool.finished(prefetch.ticket):
            self._trace.arrived(prefetch.ticket)
            return None
        if np.isin(placement.miss_slots, prefetch.slots).any():  # a wrong guess has lost its slot to a miss already
            self._pool.wait(prefetch.ticket)
            return None
        return prefetch

    def _ask(self, layer: int, placement: Placement, *, ahead: bool = False) -> Ticket:
        return self._pool.scatter(layer, placement.miss_ids, placement.miss_slots, self._layers[layer].offset, ahead=ahead)

    def _split(self, placement: Placement, prefetch: _Prefetch | None) -> tuple[IdsAndSlots, IdsAndSlots]:
        """The neurons that can be computed now, and those that have to arrive first."""
        ids, slots = placement.hit_ids, placement.hit_slots
        if prefetch is None:
            return (ids, slots), (placement.miss_ids, placement.miss_slots)
        self._on_the_way[prefetch.slots] = True
        late = self._on_the_way[slots]
        self._on_the_way[prefetch.slots] = False
        late_ids = np.concatenate((ids[late], placement.miss_ids))
        return (ids[~late], slots[~late]), (late_ids, np.concatenate((slots[late], placement.miss_slots)))

    def _gather(self, layer: int, neuron_ids: np.ndarray, slots: np.ndarray, total: jax.Array, tile: Tile) -> jax.Array:
        if not len(neuron_ids):
            return total
        size = fitting(len(neuron_ids), self._gather_sizes)
        return _gathered(
            total,
            tile.ffn_in,
            self._layers[layer].bundles,
            self._bias[layer],
            tile.predicted,
            _places(slots, neuron_ids, size),
            compute_dtype=self._compute,
        )

    def names(self, layer: int, tile: Tile) -> tuple[int, int, bool]:
        """How many neurons a tile names, how many of them are not in memory, and whether the layer's cache is full; with policy "lfu"."""
        assert tile.predicted is not None
        cache, neuron_ids = self._caches[layer], _named(tile.predicted, tile.active)
        assert isinstance(cache, LeastFrequentlyUsed)
        return len(neuron_ids), cache.num_missing(neuron_ids), cache.full

    def row_s(self, tile: Tile) -> float:
        """Seconds that a neuron takes to compute with from its slot for tiles of this shape, all of which name it, nothing read."""
        assert tile.predicted is not None
        layer, slots = next(iter(self.slots.items()))
        slots = min(slots, self._gather_sizes[-1])  # the layer may have been given more than kernels are compiled for
        some, all_named = np.arange(slots, dtype=np.int32), replace(tile, predicted=jnp.ones_like(tile.predicted))
        return shortest_s(lambda: self._gather(layer, some, some, tile.residual, all_named)) / slots

    def warm_up(self, tile: Tile) -> None:
        assert tile.predicted is not None
        for size in self._gather_sizes:
            some = np.zeros(size, np.int32)
            self._gather(next(iter(self._layers)), some, some, tile.residual, tile)


def _places(slots: np.ndarray, neuron_ids: np.ndarray, size: int) -> np.ndarray:
    """[2, 1 + size] int32: their number, then slots and neurons, each followed by zeros."""
    places = np.zeros((2, 1 + size), np.int32)
    places[:, 0] = count = len(slots)
    places[0, 1 : 1 + count], places[1, 1 : 1 + count] = slots, neuron_ids
    return places


def _named(predicted: jax.Array, active: np.ndarray) -> np.ndarray:
    """The neurons that any active token names: [T, F] bool and [T] bool to [n] int32, ascending."""
    named = np.asarray(predicted)[active]
    return np.flatnonzero(named[0] if len(named) == 1 else named.any(axis=0)).astype(np.int32)
