import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from inflash.kernels import reference
from inflash.kernels.compilation import jit
from inflash.kernels.linear import linear
from inflash.kernels.row_products import join_spans, row_spans

# Operands are compared after rounding, so only float32 sums differ: random-walk growth of 2**-24, with room to spare.
SUM_TOLERANCE = 2e-6


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


SHAPES = [(96, 200), (201, 96), (7, 64), (16, 33)]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
# Compiling is what takes time, so dtypes take turns: every pair of values occurs, not every triple.
CASES = [(batch, shape, DTYPES[(i + j) % 3]) for i, batch in enumerate([1, 3, 4, 8, 9, 33]) for j, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("batch", "shape", "dtype"), CASES)
def test_agrees_with_reference(rng, batch, shape, dtype):
    num_outputs, num_inputs = shape
    x = rng.standard_normal((batch, num_inputs)).astype(np.float32)
    weight = rng.standard_normal(shape).astype(dtype)
    bias = rng.standard_normal(num_outputs).astype(np.float32)
    expected = reference.linear(x.astype(dtype), weight, bias)
    found = np.asarray(jit(linear)(x, jnp.asarray(weight), bias))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=SUM_TOLERANCE * num_inputs)


@pytest.mark.parametrize("batch", [1, 4, 17])
def test_float32_products_of_bfloat16_weights_keep_all_of_x(rng, batch):
    x = rng.standard_normal((batch, 200)).astype(np.float32)
    weight = rng.standard_normal((96, 200)).astype(ml_dtypes.bfloat16)
    found = np.asarray(jit(linear, static_argnames="compute_dtype")(x, jnp.asarray(weight), compute_dtype="float32"))
    np.testing.assert_allclose(found, reference.linear(x, weight), atol=SUM_TOLERANCE * 200)
    rounded = reference.linear(x.astype(ml_dtypes.bfloat16), weight)
    assert np.abs(found - rounded).max() > 10 * SUM_TOLERANCE * 200, "rounding x to bfloat16 would not have shown"


@pytest.mark.parametrize("batch", [1, 12])
def test_nan_and_infinity_pass_through(rng, batch):
    weight = rng.standard_normal((64, 96)).astype(ml_dtypes.bfloat16)
    weight[3, 5], weight[7, 2] = np.nan, np.inf
    found = np.asarray(jit(linear)(np.ones((batch, 96), np.float32), jnp.asarray(weight)))
    assert np.isnan(found[:, 3]).all() and np.isposinf(found[:, 7]).all()
    assert np.isfinite(np.delete(found, [3, 7], axis=1)).all()


@pytest.mark.parametrize("num_spans", [1, 2, 4])
def test_spans_cover_every_row_once_when_joined(num_spans):
    for num_rows in (1, 2, 3, 5, 9, 16, 17, 66, 200):
        spans = row_spans(num_rows, num_spans)
        parts = [jnp.arange(start, stop) for start, stop in spans]
        assert len({stop - start for start, stop in spans}) == 1
        np.testing.assert_array_equal(np.asarray(join_spans(parts, num_rows)), np.arange(num_rows))
