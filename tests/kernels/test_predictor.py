import ml_dtypes
import numpy as np
import pytest
from low_rank_predictors import assert_named, random_predictor

from inflash.kernels import reference
from inflash.kernels.compilation import jit
from inflash.kernels.predictor import low_rank_scores, predict_exact, predict_low_rank, sign_scores
from inflash.storage.sign_bits import packed_signs

SIZES = [(96, 200, 8), (256, 1024, 32), (200, 97, 5)]  # D, F, R
DTYPES = [np.float32, ml_dtypes.bfloat16]
# Compiling is what takes time, so dtypes take turns: every pair of values occurs, not every triple.
CASES = [(batch, sizes, DTYPES[(i + j) % 2]) for i, batch in enumerate([1, 4, 11]) for j, sizes in enumerate(SIZES)]


@pytest.mark.parametrize(("batch", "sizes", "dtype"), CASES)
def test_low_rank_agrees_away_from_the_threshold(batch, sizes, dtype):
    rng = np.random.default_rng()
    d_model, d_ff, rank = sizes
    h = rng.standard_normal((batch, d_model)).astype(np.float32)
    predictors = [random_predictor(rng, d_model, d_ff, r, dtype) for r in (rank, 3 * rank)]
    alone = jit(predict_low_rank, static_argnames="between")(h, predictors[0], between=("none",))
    both = jit(predict_low_rank, static_argnames="between")(h, *predictors, between=("none", "relu"))
    np.testing.assert_array_equal(alone[0], both[0])
    for found, predictor, between in zip(both, predictors, ("none", "relu"), strict=True):
        assert_named(np.asarray(found), h, predictor, between)


@pytest.mark.parametrize("batch", [1, 9])
def test_exact_is_the_sign_of_the_up_projection(batch):
    rng = np.random.default_rng()
    h, up = rng.standard_normal((batch, 96)).astype(np.float32), rng.standard_normal((200, 96)).astype(np.float32)
    bias = rng.standard_normal(200).astype(np.float32)
    exact = reference.linear(h, up, bias)
    found = np.asarray(jit(predict_exact)(h, up, bias))
    clear = np.abs(exact) > 1e-4
    np.testing.assert_array_equal(found[clear], exact[clear] > 0)


@pytest.mark.parametrize("between", ["none", "relu"])
def test_what_stands_between_the_products(between):
    rng = np.random.default_rng()
    h, first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 64), (16, 64), (100, 16)))
    bias = rng.standard_normal(100).astype(np.float32)
    coordinates = h.astype(np.float64) @ first.T
    expected = (np.maximum(coordinates, 0) if between == "relu" else coordinates) @ second.T + bias
    found = jit(low_rank_scores, static_argnames="between")(h, first, second, bias, between=between)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("sizes", [(64, 200), (100, 97), (5, 33)])
def test_sign_bits_score_as_the_signs_do(batch, sizes):
    rng = np.random.default_rng()
    d_model, d_ff = sizes
    up, h = rng.standard_normal((d_ff, d_model)), rng.standard_normal((batch, d_model)).astype(np.float32)
    scale, bias = rng.uniform(0.1, 2, d_ff).astype(np.float32), rng.standard_normal(d_ff).astype(np.float32)
    found = jit(sign_scores)(h, packed_signs(up), scale, bias)
    expected = scale * (h.astype(np.float64) @ np.where(up > 0, 1, -1).T) + bias
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
