"""The native kernels against sums in float64, and every way in which there are none.

They are built once, into a temporary folder. Without a compiler only the ways without them are tested.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from low_rank_predictors import assert_named, random_predictor
from paged import random_cache, random_tables, spoil

from inflash.errors import InflashError, RunError
from inflash.kernels import native, reference
from inflash.kernels.attention import attend_decode
from inflash.kernels.compilation import jit
from inflash.kernels.linear import linear
from inflash.kernels.predictor import predict_low_rank
from inflash.kernels.sparse_ffn import block_ffn, gathered_ffn
from inflash.pipeline import native_library

BFLOAT16 = ml_dtypes.bfloat16
BATCHES = [1, 2, 3, 4, 5, 8, 9, 35]  # the kernels are compiled for 1, 2, 4 and 8, and for many
DTYPES = [np.float32, BFLOAT16]
EDGES = [1, 2, 31, 32, 33, 200, 257, 300]  # around cache lines, walks of rows and spans of columns


@pytest.fixture
def kernels(built: Path) -> Iterator[None]:
    with native.choosing(True):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    native_library.choose.cache_clear()
    yield
    native_library.choose.cache_clear()
    native.use(False)


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def added(x, up, down, bias, kept, dtype) -> np.ndarray:
    """What the kept neurons add: [B, D] float64, activations rounded to the dtype."""
    hidden = np.where(kept, np.maximum(wide(x.astype(dtype)) @ wide(up).T + bias, 0), 0).astype(np.float32)
    return wide(hidden.astype(dtype)) @ wide(down)


def assert_near(found, expected: np.ndarray, dtype) -> None:
    """An activation next to the middle of two bfloat16 numbers may be rounded to the other one."""
    tolerance = 1e-5 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_linear(rng, kernels, batch, dtype):
    for _ in range(2):
        num_outputs, num_inputs = (int(size) for size in rng.choice(EDGES, 2))
        x, weight = normal(rng, batch, num_inputs), normal(rng, num_outputs, num_inputs, dtype=dtype)
        bias = normal(rng, num_outputs)
        expected = wide(x.astype(dtype)) @ wide(weight).T
        plain = native.native_linear(jnp.asarray(x), jnp.asarray(weight), None)
        chosen = linear(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias))
        np.testing.assert_allclose(plain, expected, rtol=0, atol=2e-6 * num_inputs + 1e-6)
        np.testing.assert_allclose(chosen, expected + bias, rtol=0, atol=2e-6 * num_inputs + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_predict_low_rank(rng, kernels, batch, dtype):
    """One, two and three of them in one call, of different ranks and numbers of neurons."""
    betweens = ("none", "relu", "none")
    for count in (1, 2, 3):
        width = int(rng.choice(EDGES[2:]))
        h = normal(rng, batch, width)
        sizes = [(int(rng.choice([200, 257, 1000])), int(rng.choice([5, 31, 32, 40, 129]))) for _ in range(count)]
        predictors = [random_predictor(rng, width, d_ff, rank, dtype) for d_ff, rank in sizes]
        for between, predictor, found in zip(
            betweens, predictors, predict_low_rank(jnp.asarray(h), *predictors, between=betweens[:count]), strict=False
        ):
            assert_named(np.asarray(found), h, predictor, between)


@pytest.mark.parametrize(
    "shape", [(1, 4, 64, 32, 16), (3, 3, 50, 17, 5), (5, 2, 33, 20, 33), (11, 12, 128, 8, 32)]
)  # B, H, positions, head_dim, size
def test_attend_decode(rng, kernels, shape):
    """No position from a sequence's length on is read; those of length 0 give zeros."""
    batch, num_heads, capacity, head_dim, size = shape
    tables, num_blocks = random_tables(rng, batch, capacity, size)
    query, keys, values = (
        normal(rng, batch, num_heads, head_dim),
        *(random_cache(rng, num_heads, num_blocks, size, head_dim) for _ in "kv"),
    )
    lengths = rng.integers(1, capacity + 1, batch).astype(np.int32)
    lengths[0] = capacity
    expected = reference.attend_decode(query, keys, values, tables, lengths)
    if batch > 1:
        lengths[-1], expected[-1] = 0, 0
    for sequence, length in enumerate(lengths):
        spoil(keys, tables[sequence], length)
        spoil(values, tables[sequence], length)
    operands = [jnp.asarray(operand) for operand in (query, keys, values, tables, lengths)]
    np.testing.assert_allclose(attend_decode(*operands), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_hands_on_nan_and_infinity(rng, kernels, dtype):
    weight = normal(rng, 64, 95, dtype=dtype)
    weight[3, 94], weight[7, 2] = np.nan, np.inf
    found = np.asarray(linear(jnp.ones((3, 95)), jnp.asarray(weight)))
    assert np.isnan(found[:, 3]).all() and np.isposinf(found[:, 7]).all()
    assert np.isfinite(np.delete(found, [3, 7], axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_gathered_ffn(rng, kernels, batch, dtype):
    """Rows that are not named, and places beyond count, hold NaN."""
    width, num_neurons, num_slots = int(rng.choice(EDGES)), 300, 150
    for places, count in ((40, 0), (40, 1), (40, 29), (61, 61)):
        slots, ids = (rng.permutation(n)[:places].astype(np.int32) for n in (num_slots, num_neurons))
        used = slots[:count]
        bundles = np.full((num_slots, 2, width), np.nan, dtype)
        bundles[used] = normal(rng, count, 2, width, dtype=dtype)
        accumulator, x, bias = normal(rng, batch, width), normal(rng, batch, width), normal(rng, num_neurons)
        predicted = rng.random((batch, num_neurons)) < 0.6
        expected = added(x, bundles[used, 0], bundles[used, 1], bias[ids[:count]], predicted[:, ids[:count]], dtype)
        slots[count:], ids[count:] = -5, 10**6
        operands: Any = (accumulator, x, bundles, bias, predicted, slots, ids, np.int32(count))
        found = gathered_ffn(*(jnp.asarray(operand) for operand in operands), compute_dtype=dtype)
        assert_near(found - accumulator, expected, dtype)
        if count == 0:
            np.testing.assert_array_equal(found, accumulator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_block_ffn(rng, kernels, batch, dtype):
    width, num_rows = int(rng.choice(EDGES)), int(rng.choice(EDGES))
    for count in (0, num_rows // 2, num_rows):
        for predicted in (None, rng.random((batch, num_rows)) < 0.5):
            accumulator, x, bias = normal(rng, batch, width), normal(rng, batch, width), normal(rng, num_rows)
            up, down = normal(rng, 2, num_rows, width, dtype=dtype)
            kept = True if predicted is None else predicted[:, :count]
            expected = added(x, up[:count], down[:count], bias[:count], kept, dtype)
            up[count:] = down[count:] = bias[count:] = np.nan
            operands = [jnp.asarray(operand) for operand in (accumulator, x, up, down, bias, np.int32(count))]
            mask = None if predicted is None else jnp.asarray(predicted)
            found = block_ffn(*operands, predicted=mask, compute_dtype=dtype)
            assert_near(found - accumulator, expected, dtype)


def test_a_slot_outside_is_refused(kernels):
    ones, slots, ids = jnp.ones((1, 8)), jnp.asarray([1, 4], jnp.int32), jnp.zeros(2, jnp.int32)
    bundles, mask, count = jnp.ones((4, 2, 8)), jnp.ones((1, 4), bool), jnp.int32(2)
    with pytest.raises(Exception, match="lies outside"):
        found = gathered_ffn(ones, ones, bundles, jnp.ones(4), mask, slots, ids, count, compute_dtype="float32")
        found.block_until_ready()


def test_threads_call_at_once_and_get_the_same_bits(rng, kernels):
    """Also the same as alone: who computes which part does not matter."""
    x, up, down = (jnp.asarray(normal(rng, n, 512, dtype=BFLOAT16)) for n in (4, 3000, 3000))
    x, bias = x.astype(jnp.float32), jnp.zeros(3000)
    product = jit(lambda: linear(x, up))
    ffn = jit(lambda: block_ffn(x, x, up, down, bias, 3000, compute_dtype="bfloat16"))
    alone = [np.asarray(call()) for call in (product, ffn)]
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: [np.asarray(call()) for call in (product, ffn)], range(100)):
            np.testing.assert_array_equal(found[0], alone[0])
            np.testing.assert_array_equal(found[1], alone[1])


def test_what_they_do_not_serve(kernels):
    bf16, f16, f32 = (jnp.ones((4, 4), dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
    assert native.serves(8, "bfloat16", bf16) and native.serves(1, "float32", f32)
    assert not native.serves(9, "bfloat16", bf16)
    assert not native.serves(1, "float32", bf16) and not native.serves(1, "bfloat16", f32)
    assert not native.serves(1, "float16", f16)
    assert not native.serves(1, "float32", jnp.ones((0, 4)))


def test_the_library_found_is_the_one_built(built, monkeypatch, fresh_choice):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    for choice, expected in (("auto", True), ("native", True), ("xla", False)):
        native_library.choose.cache_clear()
        monkeypatch.setenv("INFLASH_KERNELS", choice)
        assert native_library.choose() is expected
    assert [path.name for path in (built / "inflash").iterdir()] == [native_library.path().name]


def test_without_a_library(tmp_path, monkeypatch, fresh_choice):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("INFLASH_KERNELS", "auto")
    assert native_library.choose() is False
    native_library.choose.cache_clear()
    monkeypatch.setenv("INFLASH_KERNELS", "native")
    with pytest.raises(InflashError, match="run inflash build-kernels"):
        native_library.choose()
    monkeypatch.setenv("INFLASH_KERNELS", "fast")
    with pytest.raises(InflashError, match="one of auto, native, xla, found fast"):
        native_library.choose()
    assert list(tmp_path.iterdir()) == [], "nothing is compiled unasked"


@pytest.mark.parametrize("content", [b"not a library", b""])
def test_a_broken_library_is_a_warning(tmp_path, monkeypatch, fresh_choice, content):
    monkeypatch.setattr(native, "_registered", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("INFLASH_KERNELS", "auto")
    native_library.path().parent.mkdir()
    native_library.path().write_bytes(content)
    with pytest.warns(RuntimeWarning, match="does not load") as warned:
        assert native_library.choose() is False
    assert "\n" not in str(warned[0].message)
    native_library.choose.cache_clear()
    monkeypatch.setenv("INFLASH_KERNELS", "native")
    with pytest.raises(InflashError, match="does not load"):
        native_library.choose()


@pytest.mark.parametrize("compiler", ["", "no-such-compiler -x"])
def test_without_a_compiler(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(InflashError, match=r"C\+\+ compiler") as refused:
        native_library.build()
    assert not isinstance(refused.value, RunError)


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "")
    with pytest.raises(RunError, match="does not compile"):
        native_library.build()
    assert not list((tmp_path / "inflash").iterdir())


def test_the_name_depends_on_the_processor(monkeypatch):
    before = native_library.path()
    monkeypatch.setattr(native_library, "processor", lambda: ["another"])
    assert native_library.path() != before and native_library.path().parent == before.parent


@pytest.mark.integration
def test_one_thread_is_enough(built):
    """XLA's pool then has nobody to help."""
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np, jax.numpy as jnp
from inflash.kernels.linear import linear
from inflash.pipeline import native_library
assert native_library.choose()
x, weight = np.random.default_rng().standard_normal((2, 64, 700), np.float32)
np.testing.assert_allclose(linear(jnp.asarray(x[:3]), jnp.asarray(weight)), x[:3] @ weight.T, atol=1e-3)
"""
    environment = {**os.environ, "INFLASH_KERNELS": "native", "XDG_CACHE_HOME": str(built)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
