"""How near the kernels come to this machine's memory: `inflash bench kernels`.

Axes: B batch, D d_model, F d_ff, H heads, K gathered neurons, R predictor rank, V vocabulary.

A token reads every weight that it uses once and does two operations with it, so on any machine that can multiply faster than it can
read, decoding takes bytes / bandwidth. The floor is measured in the same run, as the best of a few plain sums over an array much larger
than any cache. Each kernel's bytes are those of its weights (and of the KV positions that it looks at), however large the batch.

Every round times every kernel once, so that other work on the machine disturbs all of them alike and each finds cold caches: not of weights
alone, but of the code that starts a kernel, too. `nothing` is a call with next to no work: what any call costs before its first byte.
Where native kernels are built and not refused, each kernel is measured in both forms in the same rounds. Native kernels do not read the
down rows of silent neurons; here all neurons are active, so that every byte that is counted is read.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InflashError
from ..kernels import native
from ..kernels.compilation import jit
from ..kernels.decoder_layer import LayerShape, attention_decode
from ..kernels.linear import linear
from ..kernels.predictor import LowRank, predict_low_rank
from ..kernels.sparse_ffn import block_ffn, gathered_ffn
from ..pipeline import native_library
from ..pipeline.block_pool import BLOCK_SIZE
from .table import table

BATCHES = (1, 2, 4, 8)
FLOOR_BYTES = 256 << 20
SIZES = ("d_model", "d_ff", "vocab")
POSITIONS, FEW_POSITIONS = 256, 32  # that each sequence looks back on
CAPACITY = 512
RANK = 128
_WIDEST_OF_SMALL_HEADS = 2048  # of OPT's models: heads of 64 up to 1.3B, larger ones beyond
ACTIVE_SHARE = 16  # one neuron in sixteen is gathered
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 400

Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One line of the table: bytes of weights read a second, and as a share of the memory's own rate."""

    name: str
    batch: int
    gb_per_s: float
    share: float
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A kernel with its operands, and the bytes of weights that it reads; `native` is the form that it is traced in."""

    name: str
    batch: int
    num_bytes: int
    prepare: Callable[["_Case"], Call]
    native: bool = False

    def traced(self, function: Callable[..., Any], **jit_arguments: Any) -> Callable[..., Any]:
        """The function compiled in this case's form: one of its own, as JAX would take the other form's trace for it."""

        def form(*operands: Any, **named: Any) -> Any:
            with native.choosing(self.native):
                return function(*operands, **named)

        return jit(form, **jit_arguments)

    def plain(self, function: Callable[..., Any], *operands: jax.Array | LowRank) -> Call:
        return partial(self.traced(function), *operands)


class _Weights:
    """Random bf16 matrices of one layer and the head, and the arrays that the kernels want besides."""

    def __init__(self, d_model: int, d_ff: int, vocab: int) -> None:
        self._rng = np.random.default_rng()
        self.d_model, self.d_ff = d_model, d_ff
        self.up, self.down = self.matrix(d_ff, d_model), self.matrix(d_ff, d_model)
        self.up_bias = self.vectors(d_ff)
        self.loud_bias = jnp.full(d_ff, 100, jnp.float32)  # no ReLU silences such a neuron
        self.head = self.matrix(vocab, d_model)
        self.predictors = [(self.matrix(RANK, d_model), self.matrix(d_ff, RANK)) for _ in range(2)]
        names = (
            "attention_norm_scale",
            "attention_norm_bias",
            "attention_out_bias",
            "ffn_norm_scale",
            "ffn_norm_bias",
            "down_bias",
        )
        self.attention = {name: self.vectors(d_model) for name in names}
        self.attention |= {
            "qkv": self.matrix(3 * d_model, d_model),
            "qkv_bias": self.vectors(3 * d_model),
            "attention_out": self.matrix(d_model, d_model),
        }

    def vectors(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.standard_normal(shape, np.float32))

    def matrix(self, rows: int, columns: int) -> jax.Array:
        """A few random rows repeated, as the speed does not depend on the values: [rows, columns] bf16."""
        some = self.vectors(min(rows, 64), columns) / columns**0.5
        return jnp.resize(some.astype(jnp.bfloat16), (rows, columns))

    def subsets(self, count: int) -> list[jax.Array]:
        """Different neurons each time, as in a run: [count] int32 each."""
        return [jnp.asarray(self._rng.permutation(self.d_ff)[:count], jnp.int32) for _ in range(8)]


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and, as the last line, one JSON document.

    Args:
      arguments: `d_model`, `d_ff`, `vocab`, and `seconds`, the length of each measurement.

    Raises:
      InflashError: a size or the time is not positive.
    """
    for name in (*SIZES, "seconds"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise InflashError(f"bench kernels: {name} should be a positive number, found {getattr(arguments, name)}")
    weights = _Weights(arguments.d_model, arguments.d_ff, arguments.vocab)
    floors = _floor_cases()
    cases = [case for batch in BATCHES for case in _cases(weights, batch)]
    if native_library.choose():  # after all the others, so that they do not find each other's weights in a cache
        cases += [replace(case, name=f"{case.name} native", native=True) for case in cases if case.num_bytes]
    times = _interleaved([case.prepare(case) for case in floors + cases], arguments.seconds)
    rates = [case.num_bytes / seconds / 1e9 for case, seconds in zip(floors + cases, times, strict=True)]
    bandwidth = max(rates[: len(floors)])
    results = [
        KernelResult(name=case.name, batch=case.batch, gb_per_s=rate, share=rate / bandwidth, ms=1e3 * seconds)
        for case, rate, seconds in zip(cases, rates[len(floors) :], times[len(floors) :], strict=True)
    ]
    _report(arguments, bandwidth, results)
    return 0


def kernel_seconds(
    widths: Sequence[int], batches: Sequence[int], names: Sequence[str], seconds: float, pace: Callable[[], Mapping[int, float]]
) -> tuple[dict[tuple[str, int, int], tuple[int, float]], Mapping[int, float]]:
    """Bytes of weights, and the seconds of a call, by kernel, d_model and batch, in the form that runs use.

    Args:
      widths: d_model; d_ff is four times as much, the head has as many rows.
      batches: numbers of sequences.
      names: of `_cases`.
      seconds: length of each measurement.
      pace: the seconds of a piece of work that never changes, by batch; done once a round, so that all calls can be told for the same pace.

    Returns:
      What was measured, for the median pace, and that.
    """
    is_native, cases = native_library.choose(), []
    for width in widths:
        weights = _Weights(width, 4 * width, 4 * width)
        for batch in batches:
            cases += [(width, replace(case, native=is_native)) for case in _cases(weights, batch) if case.name in names]
    paces: list[Mapping[int, float]] = []
    rounds = _rounds([case.prepare(case) for _, case in cases], seconds, lambda: paces.append(pace()))
    median = {batch: float(np.median([each[batch] for each in paces])) for batch in batches}
    found = {}
    for (width, case), times in zip(cases, zip(*rounds, strict=True), strict=True):
        paced = [time * median[case.batch] / each[case.batch] for time, each in zip(times, paces, strict=True)]
        found[case.name, width, case.batch] = case.num_bytes, float(np.median(paced))
    return found, median


def _report(arguments: argparse.Namespace, bandwidth: float, results: list[KernelResult]) -> None:
    print(f"Memory reads {bandwidth:.1f} GB/s. Weights are bf16, d_model {arguments.d_model}, d_ff {arguments.d_ff}.\n")
    ordered = sorted(results, key=lambda result: (result.name, result.batch))
    rows = [[r.name, r.batch, f"{r.gb_per_s:.1f}", f"{100 * r.share:.0f}%", f"{r.ms:.2f}"] for r in ordered]
    print(table(["kernel", "batch", "GB/s", "of memory", "ms"], rows), end="\n\n")
    document = {
        "bandwidth_gb_per_s": round(bandwidth, 3),
        **{name: getattr(arguments, name) for name in SIZES},
        "kernels": [
            {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(result).items()}
            for result in results
        ],
    }
    print(json.dumps(document))


def _floor_cases() -> list[_Case]:
    """Plain sums over one large array, in the two ways that XLA runs fastest."""
    array = jnp.ones((FLOOR_BYTES // 4 // 4096, 4096), jnp.float32)
    sums = (jit(jnp.sum), jit(partial(jnp.sum, axis=1)))
    return [
        _Case(name="floor", batch=0, num_bytes=array.nbytes, prepare=lambda _, each=each: partial(each, array)) for each in sums
    ]


def _cases(weights: _Weights, batch: int) -> list[_Case]:
    """Every kernel at one batch size."""
    d_model, d_ff, active = weights.d_model, weights.d_ff, max(1, weights.d_ff // ACTIVE_SHARE)
    x = weights.vectors(batch, d_model)
    threshold = jnp.zeros(1, jnp.float32)
    qkv, out = weights.attention["qkv"], weights.attention["attention_out"]
    ffn_bytes, projection_bytes = weights.up.nbytes + weights.down.nbytes, qkv.nbytes + out.nbytes
    position_bytes = 2 * batch * d_model * np.dtype(np.float32).itemsize  # of keys and values
    now, soon = (LowRank(first, second, weights.up_bias, threshold) for first, second in weights.predictors)
    predict, predict_two = (partial(predict_low_rank, between=("none",) * number) for number in (1, 2))
    predictor_bytes = now.first.nbytes + now.second.nbytes
    dense = partial(block_ffn, count=d_ff, compute_dtype="bfloat16")
    kernels: dict[str, tuple[int, Callable[[_Case], Call]]] = {
        "nothing": (0, lambda case: case.plain(jnp.negative, x)),
        "linear": (weights.up.nbytes, lambda case: case.plain(linear, x, weights.up, weights.up_bias)),
        "attention projections": (projection_bytes, lambda case: case.plain(_projections, x, qkv, out)),
        "head": (weights.head.nbytes, lambda case: case.plain(linear, x, weights.head)),
        "predictor": (predictor_bytes, lambda case: case.plain(predict, x, now)),
        "predictor and look-ahead": (2 * predictor_bytes, lambda case: case.plain(predict_two, x, now, soon)),
        "attention": (projection_bytes + POSITIONS * position_bytes, lambda case: _attention(case, weights, x, POSITIONS)),
        "short attention": (
            projection_bytes + FEW_POSITIONS * position_bytes,
            lambda case: _attention(case, weights, x, FEW_POSITIONS),
        ),
        "gathered_ffn": (ffn_bytes * active // d_ff, lambda case: _gathered(case, weights, x, active)),
        "dense_ffn": (ffn_bytes, lambda case: case.plain(dense, x, x, weights.up, weights.down, weights.loud_bias)),
    }
    return [_Case(name=name, batch=batch, num_bytes=size, prepare=prepare) for name, (size, prepare) in kernels.items()]


def _projections(x: jax.Array, qkv: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    return linear(x, qkv), linear(x, out)


def _attention(case: _Case, weights: _Weights, x: jax.Array, num_positions: int) -> Call:
    """A decoding step that keeps its cache, as the engine does."""
    batch, d_model = x.shape
    head_dim = math.gcd(d_model, 128 if d_model > _WIDEST_OF_SMALL_HEADS else 64)
    shape = LayerShape(num_heads=d_model // head_dim)
    step = case.traced(partial(attention_decode, shape=shape, num_positions=num_positions), donate_argnums=(2, 3))
    blocks = CAPACITY // BLOCK_SIZE
    cache = [jnp.zeros((shape.num_heads, batch * blocks, BLOCK_SIZE, head_dim), jnp.float32) for _ in range(2)]
    tables = jnp.asarray(np.random.default_rng(0).permutation(batch * blocks).reshape(batch, blocks).astype(np.int32))
    positions = jnp.full(batch, num_positions - 1, jnp.int32)

    def call() -> object:
        residual, ffn_in, *cache[:] = step(x, weights.attention, *cache, tables, positions)
        return residual, ffn_in

    return call


def _gathered(case: _Case, weights: _Weights, x: jax.Array, active: int) -> Call:
    """Another set of neurons at each call, so that no cache holds them."""
    predicted = jnp.ones((x.shape[0], weights.d_ff), bool)
    ffn = case.traced(partial(gathered_ffn, compute_dtype="bfloat16"))
    subsets, count = weights.subsets(active), jnp.int32(active)
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(subsets)
        return ffn(x, x, weights.up, weights.down, weights.loud_bias, predicted, subsets[turn], subsets[turn], count)

    return call


def _interleaved(calls: list[Call], seconds: float) -> list[float]:
    """The median seconds of each call, over rounds in which every call is made once, `seconds` for each call in all."""
    return [float(np.median(times)) for times in zip(*_rounds(calls, seconds), strict=True)]


def _rounds(calls: list[Call], seconds: float, before: Callable[[], object] = lambda: None) -> list[list[float]]:
    """The seconds of each call in each round; `before` is called before a round."""
    for call in calls:
        jax.block_until_ready(call())
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds * len(calls)
    while len(rounds) < _FEWEST_ROUNDS or (time.perf_counter() < end and len(rounds) < _MOST_ROUNDS):
        before()
        rounds.append([_seconds(call) for call in calls])
    return rounds


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
