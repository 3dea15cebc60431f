"""One step of the model: the life of a token, and prompts layer by layer.

Axes: B sequences in lockstep, T tokens of a chunk of prompts, D d_model, F d_ff, V vocabulary, C positions of a sequence.

The letters are those of the drawing in docs/architecture.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InflashError
from ..kernels.compilation import jit
from ..kernels.decoder_layer import LayerShape, after_ffn
from ..storage.readers import DirectReader
from ..storage.store import Store
from . import native_library
from .block_pool import BLOCK_SIZE
from .chunks import Chunk, num_tokens, pack_prompts, sizes_for
from .feed_forward import Tile
from .fixed_shapes import SMALLEST_CAPACITY, capacity_for, doublings, fitting
from .host_memory import check_fits, keep_few_arenas, trim
from .kv_cache import KVCache, num_cache_blocks
from .layered_feed_forward import LayeredFeedForward
from .live import LivePage, about_run
from .loader_pool import LoaderPool
from .matrix_source import MatrixSource, ResidentMatrices, StreamedMatrices
from .memory_parts import check_kv_cache, fitting_positions, memory_parts
from .neuron_rows import NeuronRows
from .options import EngineOptions
from .plan import CACHED, Plan, guessed_layers, plan_from_options
from .predictors import (
    AllNeurons,
    ExactPredictor,
    Predictor,
    StoredPredictor,
    predict_and_guess,
)
from .prompt_votes import count_votes, take_rows
from .recall_probe import RecallProbe
from .slab import Slab, SlabPlan
from .step_timer import StepTimer
from .step_times import StepTimes
from .trace import ATTENTION, COMPILE, HEAD, LAYER, PREDICT, START, recorder
from .weights import compute_dtype, load_weights, zeros

_after_ffn = jit(after_ffn, static_argnames="shape")
_put_rows = jit(lambda hidden, x, rows: jnp.where((rows < len(x))[:, None], x.at[rows].get(mode="clip"), hidden))


class Engine:
    """A model over its store: resident weights, loaders, cache, and KV cache. A context manager.

    Attributes:
      config, store, options, plan: what it was made from.
      times: what the run has cost so far.
      kv_cache: keys and values of as many sequences as `prepare` has made room for.
      weights, matrices, neurons, shape, compute: what is resident, where matrices and neurons come from, the layers' static shape
        and the products' dtype, for passes over a model that go another way than `process_prompts` and `decode`.
    """

    def __init__(
        self,
        store: Store,
        options: EngineOptions,
        *,
        plan: Plan | None = None,
        times: StepTimes | None = None,
        split_rows: Path | None = None,
    ) -> None:
        """Loads the resident weights, makes the slab and starts the loaders.

        Args:
          store, options: which model, and how it runs.
          plan: what is in memory; None: as the options say.
          times: to be counted on; None: from zero.
          split_rows: a copy of the neurons without bundles to decode from, see `storage.split_rows`; for comparisons.

        Raises:
          InflashError: the options do not fit the store, or memory is too small for them; nothing was started then.
        """
        self._native = native_library.choose()  # before anything is traced
        keep_few_arenas()
        self.plan = plan or plan_from_options(store, options)
        self.store, self.config, self.options = store, store.config, options
        self.times, self._trace = times or StepTimes(), recorder()
        self._closed, self._split_rows = False, split_rows
        self._live: LivePage | None = None
        self._recall: RecallProbe | None = None
        self.compute = compute_dtype(options.compute_dtype, store.dtype)
        self.shape = LayerShape(
            num_heads=store.config.num_heads,
            norm_first=store.config.norm_first,
            norm_epsilon=store.config.norm_epsilon,
            compute_dtype=self.compute.name,
        )
        self.kv_cache = KVCache(self.config, self.shape, 0, 0)
        self._nothing = zeros((0, self.config.d_model))
        self._memory_parts = memory_parts(store, options, self.plan)
        check_fits(self._memory_parts, "use --ffn hybrid, a smaller --cache-neurons, or a machine with more memory")
        with self._trace.span(START):
            self.weights = load_weights(store, self.compute, self.plan.streamed_names, verify=options.verify)
            self._open()

    def _open(self) -> None:
        options, plan, layout = self.options, self.plan, SlabPlan()
        regions = LoaderPool.reserve(layout, plan.loaders, self.config.d_ff)
        streamed = StreamedMatrices(self.store, layout, self.weights, self.shape, plan) if plan.streams_matrices else None
        self.matrices: MatrixSource = streamed or ResidentMatrices(self.store, self.weights, self.shape)
        self.neurons = LayeredFeedForward(self.store, layout, self.weights.up_bias, self.compute, options, plan)
        probe = NeuronRows(layout, self.store.bundles, 1)
        self._slab = Slab(layout.num_bytes, large=layout.large, contiguous=layout.contiguous)
        try:
            with DirectReader(self.store.path, 0) as reader:
                direct = probe.probe(self._slab, reader)  # warns here, once, rather than in every loader
            self._pool = LoaderPool(
                self.store,
                self._slab,
                regions,
                depth=plan.queue_depth,
                direct=direct,
                merge_gap=plan.merge_gap,
                files=streamed.files if streamed else (),
                verify=options.verify,
                split_rows=self._split_rows,
            )
        except BaseException:
            self._slab.close()
            raise
        try:
            if streamed:
                streamed.bind(self._slab, self._pool)
            self.neurons.bind(self._slab, self._pool)
            about = about_run(self.store, options, plan, native=self._native)
            assert self._slab.descriptor is not None
            self._live = LivePage(about, self._slab.descriptor, self._pool.counter_places)
            self._timer = StepTimer(self.times, self._pool, self._live, self.config.d_model)
            self._predictor = self._make_predictor()
            self._ahead = self._load_predictor(plan.prefetch, guessed_layers(plan)) if plan.prefetch else None
        except BaseException:
            self.close()
            raise

    def _make_predictor(self) -> Predictor | None:
        if self.neurons.cached is None:
            return None
        self.neurons.observe(self.times)
        if self.plan.predictor == "none":
            return AllNeurons(self.config.d_ff)
        if self.plan.predictor == "exact":
            assert self.neurons.streamed is not None
            self._recall = RecallProbe(self.store, self._trace)
            return ExactPredictor(self.weights, self.neurons.streamed.up_rows, self.plan.layers(CACHED))
        assert self.plan.predictor is not None
        return self._load_predictor(self.plan.predictor, self.plan.layers(CACHED))

    def _load_predictor(self, name: str, layers: Sequence[int]) -> StoredPredictor:
        return StoredPredictor(self.store, name, layers, verify=self.options.verify)

    def prepare(self, num_seqs: int, max_length: int, num_positions: int | None = None, *, prompts: bool = True) -> None:
        """Makes room for `num_seqs` sequences of up to `max_length` tokens and compiles everything they need.

        Afterwards every sequence has the blocks of the KV cache that `KVCache.share_out` gives it.

        Args:
          num_seqs, max_length: B, and the longest of them.
          num_positions: of the KV cache, in all, or as many of them as fit, which are enough for one sequence; None: room for all
            sequences at their longest.
          prompts: whether there will be any; without, only decoding is compiled.

        Raises:
          InflashError: the model has fewer positions, or the KV cache does not fit.
        """
        if self._closed:
            raise InflashError("this model was closed; make a new LLM")
        if max_length > self.config.max_positions:
            raise InflashError(f"length: the model has {self.config.max_positions} positions, found {max_length} asked for")
        capacity, room = capacity_for(max_length), BLOCK_SIZE * num_cache_blocks(num_seqs, max_length, num_positions)
        least = room if num_positions is None else capacity
        to_be_had = fitting_positions(self.store, room, least, given_back=self.kv_cache.num_bytes)
        if num_seqs == self.num_seqs and capacity <= self.capacity and to_be_had <= self.kv_cache.num_positions:
            self.kv_cache.share_out()
            return
        self.kv_cache = KVCache(self.config, self.shape, 0, 0)  # before the next one, and should what follows be refused
        room = fitting_positions(self.store, room, least)
        check_kv_cache(self.store, room)
        self.kv_cache = KVCache(self.config, self.shape, num_seqs, max_length, num_blocks=room // BLOCK_SIZE)
        with self._trace.span(COMPILE):
            self._warm_up(prompts=prompts)
            trim()  # compiling leaves much behind

    def process_prompts(self, prompts: Sequence[tuple[int, np.ndarray]]) -> jax.Array:
        """Runs prompts (sequence, token ids) into the KV cache, from the position on that its `num_cached` says.

        At most `plan.prompt_tokens` pass at a time, layer by layer, and every streamed block is used for all of them.

        Returns:
          [B, V] f32: row s is the logits after the last token of sequence s; rows of other sequences mean nothing.
        """
        num_cached, hidden = self.kv_cache.num_cached, self._nothing
        passes = pack_prompts(((sequence, ids, num_cached[sequence]) for sequence, ids in prompts), self.plan.prompt_tokens)
        logits = hidden
        for chunks in passes:
            with self._timer.prompt(num_tokens(chunks)):
                for chunk, x in zip(chunks, self._run_chunks(chunks), strict=True):  # a sequence's last token comes last
                    hidden = _put_rows(hidden, x, chunk.last_rows(self.num_seqs))
                logits = self._head(hidden)
        return logits

    def all_logits(self, token_ids: np.ndarray) -> np.ndarray:
        """[T] token ids to [T, V] f32 logits, each token's feed-forward neurons chosen as a decoding step would."""
        longest = max(len(token_ids), min(self.capacity, self.config.max_positions))
        self.prepare(max(self.num_seqs, 1), longest, max(self.kv_cache.num_positions, len(token_ids)))
        parts = []
        for chunks in pack_prompts([(0, token_ids, 0)], self.plan.prompt_tokens):
            with self._timer.prompt(num_tokens(chunks)):
                logits = self.matrices.logits(self._run_chunks(chunks, predict=True))
                parts += [np.asarray(rows)[: chunk.count] for chunk, rows in zip(chunks, logits, strict=True)]
        return np.concatenate(parts)

    def decode(self, token_ids: np.ndarray, positions: np.ndarray, active: np.ndarray) -> jax.Array:
        """One token for every sequence.

        Args:
          token_ids: [B] int32, the newest tokens.
          positions: [B] int32, theirs; below C.
          active: [B] bool; the others are padding and need no neurons.

        Returns:
          [B, V] f32 logits of the next tokens.
        """
        with self._timer.step(int(active.sum())):
            bound = fitting(int(positions.max()) + 1, doublings(SMALLEST_CAPACITY, self.capacity))
            x = self.matrices.embed(token_ids, positions)
            places, before = self.kv_cache.places(positions, active), None
            for layer in range(self.config.num_layers):
                with self._trace.span(LAYER, layer):
                    tile = self._attend_step(layer, x, places, active, bound)  # A
                    with self._trace.span(PREDICT, layer):
                        tile = self._predicting(layer, tile, before, guess=True)
                    self.matrices.give_back_attention(layer, tile.residual)
                    if self._recall is not None:
                        self._recall.look(layer, tile)
                    x = self.neurons.add_step(layer, tile)  # B to F
                    x, before = self.after_ffn(layer, x), tile
            return self._head(x)  # H

    def _attend_step(self, layer: int, x: jax.Array, places: np.ndarray, active: np.ndarray, bound: int) -> Tile:
        with self._trace.span(ATTENTION, layer):
            weights = self.matrices.take_attention(layer)
            residual, ffn_in = self.kv_cache.attend_step(layer, x, weights, places, bound)
            return Tile(residual=residual, ffn_in=ffn_in, active=active)

    def _head(self, x: jax.Array) -> jax.Array:
        with self._trace.span(HEAD):
            (logits,) = self.matrices.logits([x])
            return logits.block_until_ready()

    def memory_bytes(self) -> dict[str, int]:
        """What the engine holds, in bytes by name."""
        return {**self._memory_parts, "KV cache": self.kv_cache.num_bytes, "slab": self._slab.num_bytes}

    def neuron_memory_bytes(self) -> int:
        """Of that, what keeps or finds feed-forward neurons while decoding: cached rows and the predictor."""
        return self._memory_parts["neurons"] + self._memory_parts["predictor"]

    @property
    def num_seqs(self) -> int:
        """B, which `prepare` sets."""
        return self.kv_cache.num_seqs

    @property
    def capacity(self) -> int:
        """C, which `prepare` sets."""
        return self.kv_cache.capacity

    @property
    def pool(self) -> LoaderPool:
        return self._pool

    def close(self) -> None:
        """Stops the loaders and gives the memory back. Idempotent."""
        self._closed = True
        self._pool.close()
        self._slab.close()
        if self._live is not None:
            self._live.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_chunks(self, chunks: Sequence[Chunk], *, predict: bool = False) -> list[jax.Array]:
        """The last layer's outputs, [T, D] a chunk."""
        outputs = [self.matrices.embed(chunk.token_ids, chunk.positions) for chunk in chunks]
        tables = self.kv_cache.tables()
        before: Sequence[Tile | None] = [None] * len(chunks)
        for layer in range(self.config.num_layers):
            weights = self.matrices.take_attention(layer)
            with self._trace.span(ATTENTION, layer):
                tiles = [self._attend(layer, weights, tables, chunk, x) for chunk, x in zip(chunks, outputs, strict=True)]
                self.matrices.give_back_attention(layer, tiles[-1].residual)
            votes = None
            if predict:
                tiles = [self._predicting(layer, tile, last) for tile, last in zip(tiles, before, strict=True)]
            elif self.neurons.has_room(layer):
                votes = self._votes(layer, tiles, before)
            outputs, before = [self.after_ffn(layer, x) for x in self.neurons.add_prompt(layer, tiles, votes)], tiles
        return outputs

    def _votes(self, layer: int, tiles: Sequence[Tile], before: Sequence[Tile | None]) -> np.ndarray:
        with self._trace.span(PREDICT, layer):
            predict = partial(self._predicting, layer, guess=True)  # the kernel that steps use
            return count_votes(predict, tiles, before, self.num_seqs)

    def _attend(self, layer: int, weights: dict[str, jax.Array], tables: np.ndarray, chunk: Chunk, x: jax.Array) -> Tile:
        residual, ffn_in = self.kv_cache.attend_chunk(layer, x, weights, tables, chunk)
        return Tile(residual=residual, ffn_in=ffn_in, active=chunk.active)

    def _predicting(self, layer: int, tile: Tile, before: Tile | None, *, guess: bool = False) -> Tile:
        """The tile with its predicted neurons, where the layer is cached.

        Args:
          layer, tile: whose neurons.
          before: the same tokens' tile of the layer before.
          guess: also what the next layer will likely need (G), where that is read early.
        """
        ahead = self._ahead if guess and self.neurons.reads_early(layer + 1) else None
        if self._predictor is None or not self.neurons.is_cached(layer):
            return tile if ahead is None else replace(tile, guessed=ahead.predict(layer + 1, tile.ffn_in))
        read = before.ffn_in if self._predictor.ahead and before is not None else tile.ffn_in
        if ahead is not None:
            predicted, guessed = predict_and_guess(self._predictor, ahead, layer, read, tile.ffn_in)
            return replace(tile, predicted=predicted, guessed=guessed)
        return replace(tile, predicted=self._predictor.predict(layer, read))

    def after_ffn(self, layer: int, x: jax.Array) -> jax.Array:
        """What follows the layer's neurons, [B, D] to [B, D]: the post-LN norm, or nothing."""
        return x if self.shape.norm_first else _after_ffn(x, self.weights.layers[layer], self.shape)

    def _warm_up(self, *, prompts: bool) -> None:
        """Compiles every kernel for this batch and capacity by running it once, on layer 0 and on nothing."""
        examples = self.matrices.examples()
        nothing, nobody = np.zeros(self.num_seqs, np.int32), np.zeros(0, np.int32)
        x = self._nothing = zeros((self.num_seqs, self.config.d_model))
        for bound in doublings(SMALLEST_CAPACITY, self.capacity):
            for weights in examples:
                self.kv_cache.attend_step(0, x, weights, self.kv_cache.places(nothing, nothing > 0), bound)
        self.after_ffn(0, x)
        tile = Tile(residual=x, ffn_in=x, active=nothing > 0)
        for layer in range(self.config.num_layers):  # ranks may differ from layer to layer
            predicted = self._predicting(layer, tile, None, guess=True)
            if predicted.predicted is not None:
                tile = predicted
        self.neurons.warm_up_step(tile)
        self.matrices.warm_up(x)
        for size in sizes_for(self.kv_cache.num_positions) if prompts else []:
            chunk = Chunk.pack(nobody, nobody, nobody, size)
            for weights in examples:
                tile = self._attend(0, weights, self.kv_cache.tables(), chunk, zeros((size, self.config.d_model)))
            self.neurons.warm_up_prompt(tile)
            self.after_ffn(0, tile.residual)
            self.matrices.embed(chunk.token_ids, chunk.positions)
            _put_rows(x, tile.residual, nothing)
            take_rows(tile, nothing, self.num_seqs)
