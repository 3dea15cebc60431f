"""`inflash build-kernels`: compiles the native kernels for this machine and checks them against XLA's on random inputs.

Axes: B batch, D d_model, F d_ff, K gathered neurons, R predictor rank.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import RunError
from ..kernels import native
from ..kernels.attention import attend_decode
from ..kernels.compilation import jit
from ..kernels.linear import linear
from ..kernels.predictor import LowRank, low_rank_scores, predict_low_rank
from ..kernels.sparse_ffn import block_ffn, gathered_ffn
from ..pipeline import native_library
from ..pipeline.block_pool import BLOCK_SIZE

BATCHES = (1, 3, 8, 19)
D_MODEL, D_FF, ACTIVE, RANK = 200, 500, 97, 40
HEADS, POSITIONS, HEAD_DIM = 3, 50, 20
TOLERANCE = 1e-2  # of the largest value: an activation may be rounded to the other of two neighbours in bfloat16


def run(arguments: argparse.Namespace) -> int:
    """Builds, checks, and says what was found.

    Raises:
      InflashError: there is no compiler.
      RunError: the compiler fails, or the kernels do not agree with XLA's; then they are removed.
    """
    start = time.monotonic()
    differences: dict[str, float] = {}

    def check(library: Path) -> None:
        native_library.load(library)
        differences.update(_differences())
        if not all(difference <= TOLERANCE for difference in differences.values()):  # nor NaN
            raise RunError(
                f"build-kernels: the kernels differ from XLA's by {differences}, expected at most {TOLERANCE}: not kept"
            )

    built = native_library.build(check)
    print(f"Built {built.path} in {time.monotonic() - start:.0f} s with: {' '.join(built.command[:-5])}")
    for name, difference in differences.items():
        print(f"{name} agrees with XLA to {difference:.1e} of the largest value")
    print(
        "From now on inflash uses them on this machine; INFLASH_KERNELS=xla does without. `inflash bench kernels` compares both."
    )
    return 0


def _differences() -> dict[str, float]:
    """For each kernel and dtype, the largest difference of the two forms as a share of the largest value."""
    rng = np.random.default_rng()
    found: dict[str, float] = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        for batch in BATCHES:
            for name, (function, operands) in _calls(rng, batch, jnp.dtype(dtype)).items():
                xla, own = (_traced(function, choice)(*operands) for choice in (False, True))
                name = f"{name} {jnp.dtype(dtype).name}"
                difference = float(np.abs(own - xla).max() / np.abs(xla).max())
                found[name] = float(np.maximum(found.get(name, 0.0), difference))  # NaN stays, where max() may lose it
    return found


def _named_scores(x: jax.Array, predictor: LowRank) -> jax.Array:
    """How far above the threshold a named neuron's score lies, 0 for the others: continuous, whoever lies next to the threshold."""
    first, second, bias, threshold = predictor
    (named,) = predict_low_rank(x, predictor, between=("relu",))
    return jnp.where(named, low_rank_scores(x, first, second, bias, between="relu") - threshold, 0.0)


def _traced(function: Callable[..., jax.Array], native_form: bool) -> Callable[..., np.ndarray]:
    def form(*operands: Any) -> jax.Array:
        with native.choosing(native_form):
            return function(*operands)

    compiled = jit(form)
    return lambda *operands: np.asarray(compiled(*operands))


def _calls(rng: np.random.Generator, batch: int, dtype: np.dtype) -> dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]]:
    """Every kernel that has two forms, with operands."""

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    x, up, down = array(batch, D_MODEL), array(D_FF, D_MODEL).astype(dtype), array(D_FF, D_MODEL).astype(dtype)
    bias, predicted = array(D_FF), jnp.asarray(rng.random((batch, D_FF)) < 0.7)
    slots, neuron_ids = (jnp.asarray(rng.permutation(D_FF)[:ACTIVE], jnp.int32) for _ in range(2))
    count = jnp.int32(ACTIVE - 5)
    predictor = LowRank(array(RANK, D_MODEL).astype(dtype), array(D_FF, RANK).astype(dtype), bias, array(1))
    num_blocks = batch * -(-POSITIONS // BLOCK_SIZE)
    query, keys, values = array(batch, HEADS, HEAD_DIM), *(array(HEADS, num_blocks, BLOCK_SIZE, HEAD_DIM) for _ in range(2))
    tables = jnp.asarray(rng.permutation(num_blocks).reshape(batch, -1), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, POSITIONS + 1, batch), jnp.int32)
    return {
        "attend_decode": (attend_decode, (query, keys, values, tables, lengths)),
        "linear": (linear, (x, up, bias)),
        "predict_low_rank": (_named_scores, (x, predictor)),
        "gathered_ffn": (
            partial(gathered_ffn, compute_dtype=dtype),
            (x, x, jnp.stack([up, down], 1), bias, predicted, slots, neuron_ids, count),
        ),
        "block_ffn": (partial(block_ffn, compute_dtype=dtype), (x, x, up, down, bias, count, predicted)),
    }
