"""Every layer's neurons by the way that the plan gives it: cached, streamed or resident; prompts go their own."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from ..storage.store import Store
from .cached_feed_forward import CachedFeedForward
from .feed_forward import FeedForward, ResidentFeedForward, StreamedFeedForward, Tile
from .loader_pool import LoaderPool
from .options import EngineOptions
from .plan import CACHED, RESIDENT, STREAMED, Plan
from .slab import Slab, SlabPlan


class LayeredFeedForward:
    """What the engine asks for neurons.

    Attributes:
      cached, streamed, resident: the ways that the plan needs; None for others. Prompts stream all layers that are not resident.
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
        self._ways = plan.ffn
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

    def add_step(self, layer: int, tile: Tile) -> jax.Array:
        """A decoding step's residual [T, D] with the layer's neurons added."""
        if self._ways[layer] == CACHED:
            assert self.cached is not None
            (total,) = self.cached.add_neurons(layer, [tile])
            return total
        if self.cached is not None and tile.guessed is not None:
            self.cached.prefetch(layer + 1, tile)
        if self._ways[layer] == STREAMED:
            assert self.streamed is not None
            return self.streamed.add_step(layer, tile)
        (total,) = self._of_prompts(layer).add_neurons(layer, [tile])
        return total

    def add_prompt(self, layer: int, tiles: Sequence[Tile]) -> list[jax.Array]:
        """Prompts' residuals [T, D] with the layer's neurons added."""
        return self._of_prompts(layer).add_neurons(layer, tiles)

    def _of_prompts(self, layer: int) -> FeedForward:
        way = self.resident if self._ways[layer] == RESIDENT else self.streamed
        assert way is not None
        return way

    def warm_up_step(self, tile: Tile) -> None:
        """Compiles what steps with tiles of this shape need; the tile has a prediction where there is a predictor."""
        if self.cached is not None:
            self.cached.warm_up(tile)
        self.warm_up_prompt(replace(tile, predicted=None), streamed=STREAMED in self._ways)

    def warm_up_prompt(self, tile: Tile, *, streamed: bool = True) -> None:
        """Compiles what prompts in chunks of this shape need."""
        for part in (self.streamed if streamed else None, self.resident):
            if part is not None:
                part.warm_up(tile)
