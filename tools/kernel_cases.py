"""The kernels of a decoding step with operands of any width, to be timed: `bench kernels` and `probe` do so.

Axes: B batch, D d_model, F d_ff, H heads, K gathered neurons, R predictor rank, V vocabulary.

Native kernels do not read the down rows of silent neurons; here all neurons are active, so that every byte that is counted is read.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import native
from ..kernels.compilation import jit
from ..kernels.decoder_layer import LayerShape, attention_decode
from ..kernels.linear import linear
from ..kernels.predictor import LowRank, predict_low_rank
from ..kernels.sparse_ffn import block_ffn, gathered_ffn
from ..pipeline.block_pool import BLOCK_SIZE
from .stopwatch import seconds_of

POSITIONS, FEW_POSITIONS = 256, 32  # that each sequence looks back on
_CAPACITY = 512
_RANK = 128
_WIDEST_OF_SMALL_HEADS = 2048  # of OPT's models: heads of 64 up to 1.3B, larger ones beyond
_ACTIVE_SHARE = 16  # one neuron in sixteen is gathered
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 400

Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel with its operands, and the bytes of weights that it reads; `native` is the form that it is traced in."""

    name: str
    batch: int
    num_bytes: int
    prepare: Callable[["Case"], Call]
    native: bool = False

    def traced(self, function: Callable[..., Any], **jit_arguments: Any) -> Callable[..., Any]:
        """The function compiled in this case's form: one of its own, as JAX would take the other form's trace for it."""

        def form(*operands: Any, **named: Any) -> Any:
            with native.choosing(self.native):
                return function(*operands, **named)

        return jit(form, **jit_arguments)

    def plain(self, function: Callable[..., Any], *operands: jax.Array | LowRank, unrolled: bool = False) -> Call:
        return partial(self.traced(function, unrolled=unrolled), *operands)


class Weights:
    """Random bf16 matrices of one layer and the head, and what the kernels want besides; all but the neurons are made when asked for."""

    def __init__(self, d_model: int, d_ff: int, vocab: int) -> None:
        self._rng = np.random.default_rng()
        self.d_model, self.d_ff, self.vocab = d_model, d_ff, vocab
        self.up, self.down = self.matrix(d_ff, d_model), self.matrix(d_ff, d_model)
        self.bundles = jnp.stack([self.up, self.down], axis=1)
        self.up_bias = self.vectors(d_ff)
        self.loud_bias = jnp.full(d_ff, 100, jnp.float32)  # no ReLU silences such a neuron

    @cached_property
    def head(self) -> jax.Array:
        return self.matrix(self.vocab, self.d_model)

    @cached_property
    def predictors(self) -> list[LowRank]:
        """Two of one layer."""
        threshold = jnp.zeros(1, jnp.float32)
        pairs = [(self.matrix(_RANK, self.d_model), self.matrix(self.d_ff, _RANK)) for _ in range(2)]
        return [LowRank(first, second, self.up_bias, threshold) for first, second in pairs]

    @cached_property
    def attention(self) -> dict[str, jax.Array]:
        """A layer's weights without its feed-forward block."""
        names = (
            "attention_norm_scale",
            "attention_norm_bias",
            "attention_out_bias",
            "ffn_norm_scale",
            "ffn_norm_bias",
            "down_bias",
        )
        return {name: self.vectors(self.d_model) for name in names} | {
            "qkv": self.matrix(3 * self.d_model, self.d_model),
            "qkv_bias": self.vectors(3 * self.d_model),
            "attention_out": self.matrix(self.d_model, self.d_model),
        }

    def vectors(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.standard_normal(shape, np.float32))

    def matrix(self, rows: int, columns: int) -> jax.Array:
        """A few random rows repeated, as the speed does not depend on the values: [rows, columns] bf16."""
        some = (self._rng.standard_normal((min(rows, 64), columns), np.float32) / columns**0.5).astype(jnp.bfloat16)
        repeated = np.empty((rows, columns), some.dtype)
        for start in range(0, rows, len(some)):
            repeated[start : start + len(some)] = some[: rows - start]
        return jnp.asarray(repeated)

    def subsets(self, count: int) -> list[jax.Array]:
        """Different neurons each time, as in a run: [count] int32 each."""
        return [jnp.asarray(self._rng.permutation(self.d_ff)[:count], jnp.int32) for _ in range(8)]


def kernel_cases(weights: Weights, batch: int) -> list[Case]:
    """Every kernel at one batch size."""
    d_model, d_ff, active = weights.d_model, weights.d_ff, max(1, weights.d_ff // _ACTIVE_SHARE)
    x = weights.vectors(batch, d_model)
    itemsize = weights.up.dtype.itemsize
    ffn_bytes, projection_bytes = 2 * itemsize * d_ff * d_model, 4 * itemsize * d_model**2
    position_bytes = 2 * batch * d_model * np.dtype(np.float32).itemsize  # of keys and values
    predictor_bytes = itemsize * _RANK * (d_model + d_ff)
    predict, predict_two = (partial(predict_low_rank, between=("none",) * number) for number in (1, 2))
    dense = partial(block_ffn, count=d_ff, compute_dtype="bfloat16")
    kernels: dict[str, tuple[int, Callable[[Case], Call]]] = {
        "nothing": (0, lambda case: case.plain(jnp.negative, x)),
        "linear": (weights.up.nbytes, lambda case: case.plain(linear, x, weights.up, weights.up_bias)),
        "attention projections": (
            projection_bytes,
            lambda case: case.plain(_projections, x, weights.attention["qkv"], weights.attention["attention_out"]),
        ),
        "head": (itemsize * weights.vocab * d_model, lambda case: case.plain(linear, x, weights.head)),
        "predictor": (predictor_bytes, lambda case: case.plain(predict, x, weights.predictors[0])),
        "predictor and look-ahead": (2 * predictor_bytes, lambda case: case.plain(predict_two, x, *weights.predictors)),
        "attention": (projection_bytes + POSITIONS * position_bytes, lambda case: _attention(case, weights, x, POSITIONS)),
        "short attention": (
            projection_bytes + FEW_POSITIONS * position_bytes,
            lambda case: _attention(case, weights, x, FEW_POSITIONS),
        ),
        "gathered_ffn": (ffn_bytes * active // d_ff, lambda case: _gathered(case, weights, x, active)),
        "dense_ffn": (
            ffn_bytes,
            lambda case: case.plain(dense, x, x, weights.up, weights.down, weights.loud_bias, unrolled=True),
        ),
    }
    return [Case(name=name, batch=batch, num_bytes=size, prepare=prepare) for name, (size, prepare) in kernels.items()]


def _projections(x: jax.Array, qkv: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    return linear(x, qkv), linear(x, out)


def _attention(case: Case, weights: Weights, x: jax.Array, num_positions: int) -> Call:
    """A decoding step that keeps its cache, as the engine does."""
    batch, d_model = x.shape
    head_dim = math.gcd(d_model, 128 if d_model > _WIDEST_OF_SMALL_HEADS else 64)
    shape = LayerShape(num_heads=d_model // head_dim)
    step = case.traced(partial(attention_decode, shape=shape, num_positions=num_positions), unrolled=False, donate_argnums=(2, 3))
    blocks = _CAPACITY // BLOCK_SIZE
    cache = [jnp.zeros((shape.num_heads, batch * blocks, BLOCK_SIZE, head_dim), jnp.float32) for _ in range(2)]
    tables = jnp.asarray(np.random.default_rng(0).permutation(batch * blocks).reshape(batch, blocks).astype(np.int32))
    positions = jnp.full(batch, num_positions - 1, jnp.int32)

    def call() -> object:
        residual, ffn_in, *cache[:] = step(x, weights.attention, *cache, tables, positions)
        return residual, ffn_in

    return call


def _gathered(case: Case, weights: Weights, x: jax.Array, active: int) -> Call:
    """Another set of neurons at each call, so that no cache holds them."""
    predicted = jnp.ones((x.shape[0], weights.d_ff), bool)
    ffn = case.traced(partial(gathered_ffn, compute_dtype="bfloat16"))
    subsets, count = weights.subsets(active), jnp.int32(active)
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(subsets)
        return ffn(x, x, weights.bundles, weights.loud_bias, predicted, subsets[turn], subsets[turn], count)

    return call


def compile_all(calls: Sequence[Call]) -> None:
    """Makes every call once, on all processors: XLA compiles without the interpreter's lock."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(lambda call: call(), calls):
            jax.block_until_ready(result)


def timed_rounds(calls: list[Call], seconds: float, before: Callable[[], object] = lambda: None) -> list[list[float]]:
    """The seconds of each call in each round, of calls that are compiled; `before` is called before a round."""
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds * len(calls)
    while len(rounds) < _FEWEST_ROUNDS or (time.perf_counter() < end and len(rounds) < _MOST_ROUNDS):
        before()
        rounds.append([seconds_of(lambda call=call: jax.block_until_ready(call())) for call in calls])
    return rounds
