"""Every layer's neurons by the way that the plan gives it: cached, streamed or resident; prompts go their own."""

import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from ..storage.store import Store
from .cached_feed_forward import CachedFeedForward
from .device_file import find_device
from .feed_forward import FeedForward, ResidentFeedForward, StreamedFeedForward, Tile
from .loader_pool import LoaderPool
from .options import EngineOptions
from .path_choice import PathChoice, RowRates
from .plan import CACHED, RESIDENT, STREAMED, Plan
from .slab import Slab, SlabPlan
from .step_times import StepTimes


class LayeredFeedForward:
    """What the engine asks for neurons.

    Attributes:
      cached, streamed, resident: the ways that the plan needs; None for others. Prompts stream all layers that are not resident.
      choice: how cached layers' neurons come, where several sequences decode and nobody has said how; None elsewhere.
    """

    def __init__(
        self,
        store: Store,
        slab: SlabPlan,
        up_bias: Sequence[np.ndarray],
        compute: np.dtype,
        options: EngineOptions,
        plan: Plan,
    ) -> None:
        self._ways, self._store, self._plan = plan.ffn, store, plan
        self._path = options.path if options.policy == "lfu" or options.path == "dense" else "sparse"
        self._times = StepTimes()
        self.choice: PathChoice | None = None
        self.cached = self.streamed = self.resident = None
        if resident := plan.layers(RESIDENT):
            self.resident = ResidentFeedForward(store, slab, up_bias, compute, resident)
        if len(resident) < len(plan.ffn):
            self.streamed = StreamedFeedForward(store, slab, up_bias, compute, plan)
        if cached := plan.layers(CACHED):
            slots = {layer: plan.slots[layer] for layer in cached}
            self.cached = CachedFeedForward(store, slab, up_bias, compute, options, slots)

    def _parts(self) -> list[FeedForward]:
        return [part for part in (self.streamed, self.resident, self.cached) if part is not None]

    def bind(self, slab: Slab, pool: LoaderPool) -> None:
        for part in self._parts():
            part.bind(slab, pool)

    def is_cached(self, layer: int) -> bool:
        """Whether the layer needs a prediction; False for layers that there are not."""
        return 0 <= layer < len(self._ways) and self._ways[layer] == CACHED

    def reads_early(self, layer: int) -> bool:
        """Whether a guess of the layer's neurons is wanted."""
        return self.is_cached(layer) and not self._is_dense(layer)

    def has_room(self, layer: int) -> bool:
        """Whether the layer's cache can keep some of what prompts stream."""
        return self._ways[layer] == CACHED and self.cached is not None and self.cached.has_room(layer)

    def observe(self, times: StepTimes) -> None:
        """Counts what steps cost into `times` from now on."""
        self._times = times
        if self.cached is not None:
            self.cached.observe(times)

    def add_step(self, layer: int, tile: Tile) -> jax.Array:
        """A decoding step's residual [T, D] with the layer's neurons added."""
        choice = self.choice
        if self._ways[layer] == CACHED:
            total = self._add_timed(choice, layer, tile) if choice is not None and choice.timed else self._add_cached(layer, tile)
        else:
            total = self._add_all(layer, tile)
        if layer == len(self._ways) - 1 and choice is not None:
            choice.next_step()
            self._stream_dense(choice.dense, again=not choice.on_trial)
        return total

    def _add_all(self, layer: int, tile: Tile) -> jax.Array:
        if self.cached is not None and tile.guessed is not None:
            self.cached.prefetch(layer + 1, tile)
        if self._ways[layer] != RESIDENT:
            assert self.streamed is not None
            return self.streamed.add_step(layer, tile)
        (total,) = self._of_prompts(layer).add_neurons(layer, [tile])
        return total

    def _is_dense(self, layer: int) -> bool:
        return self._path == "dense" if self.choice is None else layer in self.choice.dense

    def _add_cached(self, layer: int, tile: Tile) -> jax.Array:
        assert self.cached is not None
        if self._is_dense(layer):
            self._times.dense_layers += 1
            # Each sequence uses its own predicted neurons here, too: else its text would depend on how many others there are.
            return self._add_all(layer, tile)
        self._times.sparse_layers += 1
        (total,) = self.cached.add_neurons(layer, [tile])
        return total

    def _add_timed(self, choice: PathChoice, layer: int, tile: Tile) -> jax.Array:
        assert self.cached is not None
        jax.block_until_ready((tile.ffn_in, tile.predicted))
        began = time.perf_counter()
        total = self._add_cached(layer, tile).block_until_ready()
        seconds = time.perf_counter() - began
        named, missing, full = self.cached.names(layer, tile)
        if self._is_dense(layer):
            choice.took_dense(seconds)
        else:
            missing = self.cached.last_read[layer]
            choice.took_sparse(named, missing, seconds)
        choice.saw(layer, named, missing, full=full)
        return total

    def _stream_dense(self, layers: frozenset[int], *, again: bool) -> None:
        assert self.streamed is not None
        self.streamed.stream_in_steps(layers, again=again)

    def add_prompt(self, layer: int, tiles: Sequence[Tile], votes: np.ndarray | None = None) -> list[jax.Array]:
        """Prompts' residuals [T, D] with the layer's neurons added; those with most votes [F] are kept where `has_room` said so."""
        if votes is None:
            return self._of_prompts(layer).add_neurons(layer, tiles)
        assert self.streamed is not None and self.cached is not None
        return self.streamed.add_neurons(layer, tiles, self.cached.keep_passing(layer, votes))

    def _of_prompts(self, layer: int) -> FeedForward:
        way = self.resident if self._ways[layer] == RESIDENT else self.streamed
        assert way is not None
        return way

    def warm_up_step(self, tile: Tile) -> None:
        """Compiles what steps with tiles of this shape need; the tile has a prediction where there is a predictor."""
        if self.cached is not None:
            assert self.streamed is not None
            self.cached.warm_up(tile)
            self._choose(self.cached, self.streamed, tile)
        self.warm_up_prompt(replace(tile, predicted=None), streamed=STREAMED in self._ways)

    def _choose(self, cached: CachedFeedForward, streamed: StreamedFeedForward, tile: Tile) -> None:
        """Gets ready for both ways, where there is a choice: rates begin as this machine's and these kernels' are."""
        self.choice = None
        self._stream_dense(frozenset(), again=True)  # not what the last choice streamed
        if self._path == "sparse" or (self._path == "auto" and len(tile.active) == 1):
            return
        streamed.warm_up(tile)
        if self._path == "auto":
            device, size = find_device(self._store.path)[0], self._store.bundles.bundle_bytes
            depth = self._plan.queue_depth * self._plan.loaders
            rates = RowRates(
                gathered_s=cached.row_s(tile),
                missed_s=size / (device.loader_share * device.rate_at(size, depth)),
                streamed_s=max(streamed.row_s(tile), size / device.stream_bytes_per_s),
            )
            self.choice = PathChoice(self._plan.layers(CACHED), self._store.config.d_ff, rates)
        else:
            self._stream_dense(frozenset(self._plan.layers(CACHED)), again=True)

    def warm_up_prompt(self, tile: Tile, *, streamed: bool = True) -> None:
        """Compiles what prompts in chunks of this shape need."""
        for part in (self.streamed if streamed else None, self.resident):
            if part is not None:
                part.warm_up(tile)
