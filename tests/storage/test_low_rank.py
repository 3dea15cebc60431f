"""The training-free predictor. Axes: F d_ff, D d_model, R rank, N inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fresh_seed

from inflash.storage.low_rank import LowRankPredictor, default_rank, low_rank_predictor, recall_threshold, weighted_low_rank

D_MODEL, D_FF = 96, 400


def in_blocks(up: np.ndarray, sizes: tuple[int, ...] = (150, 1, 249)):
    return lambda: iter(np.split(up, np.cumsum(sizes)[:-1]))


def predicted(predictor: LowRankPredictor, inputs: np.ndarray) -> np.ndarray:
    return inputs @ predictor.first.T @ predictor.second.T + predictor.bias > predictor.threshold


def planted(rng: np.random.Generator, rank: int) -> np.ndarray:
    """[F, D] of exactly this rank."""
    return (rng.standard_normal((D_FF, rank)) @ rng.standard_normal((rank, D_MODEL)) / rank**0.5).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_a_matrix_of_low_rank_is_found_whole(rank: int) -> None:
    rng = np.random.default_rng(fresh_seed())
    up, bias = planted(rng, rank), rng.standard_normal(D_FF).astype(np.float32)
    scale, shift = rng.uniform(0.2, 3, D_MODEL).astype(np.float32), rng.standard_normal(D_MODEL).astype(np.float32)
    predictor = low_rank_predictor(in_blocks(up), bias, scale, shift, rank, seed=0)
    assert predictor.first.shape == (rank, D_MODEL)
    assert predictor.second.shape == (D_FF, rank)
    np.testing.assert_allclose(predictor.second @ predictor.first, up, atol=2e-3)
    np.testing.assert_array_equal(predictor.bias, bias)


def test_most_active_neurons_are_predicted_and_most_others_are_not() -> None:
    """A planted signal and noise a fifth of its size: with Gaussian inputs the threshold keeps 99 % of the active ones."""
    rng = np.random.default_rng(fresh_seed())
    up = planted(rng, 12) + 0.2 * rng.standard_normal((D_FF, D_MODEL)).astype(np.float32) / 12**0.5
    bias = np.full(D_FF, -1.5 * np.sqrt((up**2).sum(1).mean()), np.float32)  # sparse: about 7 % are active
    ones, zeros = np.ones(D_MODEL, np.float32), np.zeros(D_MODEL, np.float32)
    predictor = low_rank_predictor(in_blocks(up), bias, ones, zeros, 12, seed=0)
    inputs = rng.standard_normal((4000, D_MODEL)).astype(np.float32)
    active, guess = inputs @ up.T + bias > 0, predicted(predictor, inputs)
    assert 0.02 < active.mean() < 0.15
    assert 0.98 < (guess & active).sum() / active.sum() <= 1
    assert guess.mean() < 2.5 * active.mean()


def test_inputs_of_any_scale_and_shift_are_calibrated_for() -> None:
    """What the LayerNorm makes of Gaussian inputs, some directions a hundred times the others."""
    rng = np.random.default_rng(fresh_seed())
    up, bias = rng.standard_normal((D_FF, D_MODEL)).astype(np.float32) / 10, rng.standard_normal(D_FF).astype(np.float32)
    scale = np.where(np.arange(D_MODEL) < 10, 10, 0.1).astype(np.float32)
    shift = rng.standard_normal(D_MODEL).astype(np.float32) * scale
    predictor = low_rank_predictor(in_blocks(up), bias, scale, shift, 16, seed=0)
    inputs = scale * rng.standard_normal((4000, D_MODEL)).astype(np.float32) + shift
    active, guess = inputs @ up.T + bias > 0, predicted(predictor, inputs)
    assert (guess & active).sum() / active.sum() > 0.975
    assert (guess == active).mean() > 0.9  # the ten directions that matter fit into the rank


def test_the_same_seed_gives_the_same_predictor() -> None:
    rng = np.random.default_rng(fresh_seed())
    arguments = [in_blocks(planted(rng, 20)), *(np.ones(size, np.float32) for size in (D_FF, D_MODEL, D_MODEL)), 8]
    first, again = low_rank_predictor(*arguments, seed=3), low_rank_predictor(*arguments, seed=3)
    assert first.second.tobytes() == again.second.tobytes()
    assert first.threshold == again.threshold


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e31])
def test_a_damaged_neuron_does_not_spoil_its_layer(value: float) -> None:
    rng = np.random.default_rng(fresh_seed())
    up = planted(rng, 8)
    damaged = up.copy()
    damaged[7, 3] = value
    ones, zeros = np.ones(D_MODEL, np.float32), np.zeros(D_MODEL, np.float32)
    predictor = low_rank_predictor(in_blocks(damaged), np.zeros(D_FF, np.float32), ones, zeros, 9, seed=0)
    others = np.arange(D_FF) != 7
    np.testing.assert_allclose((predictor.second @ predictor.first)[others], up[others], atol=2e-3)


@pytest.mark.parametrize("special", ["no scale", "never active", "all zero"])
def test_degenerate_layers_give_numbers(special: str) -> None:
    rng = np.random.default_rng(fresh_seed())
    up, bias, scale = planted(rng, 20), np.zeros(D_FF, np.float32), np.ones(D_MODEL, np.float32)
    if special == "no scale":
        scale[::2] = 0  # a norm that ignores some inputs
    elif special == "never active":
        bias[:] = -1e6
    else:
        up[:] = 0
    predictor = low_rank_predictor(in_blocks(up), bias, scale, np.zeros(D_MODEL, np.float32), 8, seed=0)
    assert np.isfinite(predictor.first).all()
    assert np.isfinite(predictor.second).all()
    assert not np.isnan(predictor.threshold).any()
    if special != "no scale":  # nothing is ever active, so nothing need be read
        assert not predicted(predictor, rng.standard_normal((50, D_MODEL)).astype(np.float32)).any()


@given(d_model=st.integers(8, 12288).map(lambda n: n // 8 * 8), ratio=st.sampled_from([1, 2, 4, 8]))
def test_the_default_rank_is_at_most_five_percent_of_the_weights(d_model: int, ratio: int) -> None:
    d_ff = ratio * d_model
    rank = default_rank(d_model, d_ff)
    assert 1 <= rank <= d_model
    layer_weights = 2 * d_model * d_ff + 4 * d_model**2
    predictor_weights = rank * (d_model + d_ff)
    if d_model >= 256:
        assert rank % 8 == 0
        assert 0.025 < predictor_weights / layer_weights <= 0.05
    assert rank == 1 or predictor_weights <= 0.05 * layer_weights


@pytest.mark.parametrize(("d_model", "d_ff"), [(768, 3072), (2048, 8192), (4096, 16384), (9216, 36864)])
def test_opts_ranks(d_model: int, d_ff: int) -> None:
    assert default_rank(d_model, d_ff) / d_model == pytest.approx(0.12, abs=0.01)


def correlated_inputs(rng: np.random.Generator, count: int = 1000) -> np.ndarray:
    """[N, D] float64 with a mean, and a covariance whose eigenvalues fall from 4 to 0.0004 in random directions."""
    directions, _ = np.linalg.qr(rng.standard_normal((D_MODEL, D_MODEL)))
    scales = np.geomspace(2, 0.02, D_MODEL)
    return rng.standard_normal((count, D_MODEL)) * scales @ directions.T + rng.standard_normal(D_MODEL)


def moments_of(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = inputs.mean(0)
    return mean.astype(np.float32), ((inputs - mean).T @ (inputs - mean) / len(inputs)).astype(np.float32)


def fitted(up: np.ndarray, bias: np.ndarray, inputs: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, found_bias = weighted_low_rank(in_blocks(up), bias, *moments_of(inputs), rank, seed=1)
    assert (first.shape, second.shape, found_bias.shape) == ((rank, D_MODEL), (D_FF, rank), (D_FF,))
    assert {first.dtype, second.dtype, found_bias.dtype} == {np.dtype(np.float32)}
    return tuple(part.astype(np.float64) for part in (first, second, found_bias))  # pyright: ignore[reportReturnType]


def squared_error(
    up: np.ndarray, bias: np.ndarray, inputs: np.ndarray, parts: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float:
    first, second, found_bias = parts
    return float((((inputs @ first.T) @ second.T + found_bias - inputs @ up.T.astype(np.float64) - bias) ** 2).sum(1).mean())


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_weighted_a_matrix_of_low_rank_is_found_whole(rank: int) -> None:
    """The scores are then the pre-activations, so the bias has made up for the mean."""
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs = planted(rng, rank), rng.standard_normal(D_FF).astype(np.float32), correlated_inputs(rng)
    first, second, found_bias = fitted(up, bias, inputs, rank)
    np.testing.assert_allclose(second @ first, up, atol=5e-3)
    np.testing.assert_allclose(inputs @ first.T @ second.T + found_bias, inputs @ up.T + bias, atol=5e-3)


def test_the_mean_is_in_the_bias() -> None:
    """At the mean the scores are the pre-activations, however much the rank drops."""
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs = planted(rng, 60), rng.standard_normal(D_FF).astype(np.float32), correlated_inputs(rng)
    first, second, found_bias = fitted(up, bias, inputs, 4)
    mean = inputs.mean(0)
    np.testing.assert_allclose(second @ (first @ mean) + found_bias, up @ mean + bias, atol=1e-4)
    assert np.abs(found_bias - bias).max() > 0.1  # there was something to make up for


def test_coordinates_are_uncorrelated_of_unit_variance_and_in_order() -> None:
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs = planted(rng, 60), np.zeros(D_FF, np.float32), correlated_inputs(rng)
    first, second, _ = fitted(up, bias, inputs, 12)
    coordinates = (inputs - inputs.mean(0)) @ first.T
    np.testing.assert_allclose(coordinates.T @ coordinates / len(inputs), np.eye(12), atol=2e-2)
    explained = (second**2).sum(0)
    assert (np.diff(explained) < 1e-3 * explained[0]).all()


def test_weighting_is_close_to_the_best_there_is_and_better_than_none() -> None:
    """The least error of any approximation is known: the singular values of W L beyond the rank."""
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs, rank = planted(rng, 90), rng.standard_normal(D_FF).astype(np.float32), correlated_inputs(rng), 16
    root = np.linalg.cholesky(np.cov(inputs.T, bias=True))
    singular = np.linalg.svd(up.astype(np.float64) @ root, compute_uv=False)
    least = float((singular[rank:] ** 2).sum())
    found = squared_error(up, bias, inputs, fitted(up, bias, inputs, rank))
    left, values, right = np.linalg.svd(up.astype(np.float64), full_matrices=False)
    plain = (right[:rank], left[:, :rank] * values[:rank], bias.astype(np.float64))
    assert least * 0.999 < found < 1.05 * least
    assert found < 0.5 * squared_error(up, bias, inputs, plain)


@pytest.mark.parametrize("small", [1, 5, 16])
def test_a_smaller_rank_is_a_cut_of_a_larger_one(small: int) -> None:
    """Not bitwise, as fewer random directions look for it; but it errs as little as one made of that rank."""
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs = planted(rng, 90), rng.standard_normal(D_FF).astype(np.float32), correlated_inputs(rng)
    mean = inputs.mean(0)
    first, second, found_bias = fitted(up, bias, inputs, 32)
    dropped = second[:, small:] @ (first[small:] @ mean)  # what the dropped directions say at the mean
    cut = first[:small], second[:, :small], found_bias + dropped
    own = fitted(up, bias, inputs, small)
    assert squared_error(up, bias, inputs, cut) < 1.02 * squared_error(up, bias, inputs, own)


@pytest.mark.parametrize("special", ["few inputs", "one input", "no inputs' variance", "unused directions"])
def test_degenerate_inputs_give_numbers(special: str) -> None:
    """And scores that are right on those inputs, as they span no more than the rank."""
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs = planted(rng, 60), rng.standard_normal(D_FF).astype(np.float32), correlated_inputs(rng)
    if special == "few inputs":
        inputs = inputs[:10]
    elif special == "one input":
        inputs = inputs[:1]
    elif special == "no inputs' variance":
        inputs = np.zeros((5, D_MODEL))
    else:
        inputs[:, 12:] = 0
    first, second, found_bias = fitted(up, bias, inputs, 12)
    for part in (first, second, found_bias):
        assert np.isfinite(part).all()
    np.testing.assert_allclose(inputs @ first.T @ second.T + found_bias, inputs @ up.T + bias, atol=3e-2)


def test_a_covariance_that_rounding_made_indefinite() -> None:
    """As float32 sums of products do where the mean is many times what varies, and inputs span fewer directions than there are."""
    rng = np.random.default_rng(fresh_seed())
    up, bias = planted(rng, 60), np.zeros(D_FF, np.float32)
    directions, _ = np.linalg.qr(rng.standard_normal((D_MODEL, D_MODEL)))
    variances = np.where(np.arange(D_MODEL) < 30, 1.0, -2e-4)
    covariance, mean = directions * variances @ directions.T, 100 * directions[0]
    parts = weighted_low_rank(in_blocks(up), bias, mean.astype(np.float32), covariance.astype(np.float32), 8, seed=1)
    for part in parts:
        assert np.isfinite(part).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e31])
def test_weighted_a_damaged_neuron_does_not_spoil_its_layer(value: float) -> None:
    rng = np.random.default_rng(fresh_seed())
    up, bias, inputs = planted(rng, 8), np.zeros(D_FF, np.float32), correlated_inputs(rng)
    damaged, others = up.copy(), np.arange(D_FF) != 7
    damaged[7, 3] = value
    first, second, found_bias = fitted(damaged, bias, inputs, 9)
    np.testing.assert_allclose((inputs @ first.T @ second.T + found_bias)[:, others], inputs @ up[others].T, atol=1e-2)


def test_rank_beyond_the_width_is_the_width() -> None:
    rng = np.random.default_rng(fresh_seed())
    up, inputs = planted(rng, 60), correlated_inputs(rng)
    first, second, _ = weighted_low_rank(in_blocks(up), np.zeros(D_FF, np.float32), *moments_of(inputs), 500, seed=1)
    assert (first.shape, second.shape) == ((D_MODEL, D_MODEL), (D_FF, D_MODEL))
    np.testing.assert_allclose(second @ first, up, atol=2e-2)


@pytest.mark.parametrize(
    ("recall", "count", "exceeding"),
    [
        (0.5, 10, 5),
        (0.75, 400, 300),
        (0.99, 50, 50),
        (0.99, 100, 99),
        (0.99, 1000, 990),
        (0.875, 17, 15),
        (0.01, 3, 1),
        (0.5, 1, 1),
    ],
)
def test_the_threshold_lets_the_asked_share_through(recall: float, count: int, exceeding: int) -> None:
    """As few as that share allows."""
    scores = np.random.default_rng(fresh_seed()).standard_normal(count).astype(np.float32)
    assert len(set(scores.tolist())) == count
    threshold = recall_threshold(scores, recall)
    assert threshold == np.float32(threshold)
    assert (scores > threshold).sum() == (scores.astype(np.float64) > threshold).sum() == exceeding


@given(
    scores=st.lists(st.floats(-10, 10, width=32).map(lambda x: float(np.float32(round(x, 1)))), min_size=1, max_size=60),
    recall=st.floats(0.001, 0.999),
)
def test_no_larger_threshold_would_do(scores: list[float], recall: float) -> None:
    """With many ties. The share is a rounded number, hence one neuron more or less."""
    values = np.asarray(scores, np.float32)
    threshold = recall_threshold(values, recall)
    exceeding = values[values > threshold]
    assert len(exceeding) >= recall * len(values) - 1e-6
    without_the_lowest = exceeding[exceeding > exceeding.min()]
    assert len(without_the_lowest) <= recall * len(values) + 1e-6


def test_ties_are_let_through_together() -> None:
    scores = np.asarray([[1.0, 2.0, 2.0], [2.0, 2.0, 3.0]], np.float32)
    threshold = recall_threshold(scores, 0.4)
    assert threshold < 2.0
    assert (scores > threshold).sum() == 5
    assert threshold == np.nextafter(np.float32(2.0), np.float32(0))


def test_a_threshold_below_zero_is_below_zero_for_kernels_too() -> None:
    """They flush subnormal numbers."""
    threshold = recall_threshold(np.zeros(5, np.float32), 0.99)
    assert threshold <= -np.finfo(np.float32).tiny


def test_nine_of_ten_are_nine() -> None:
    scores = np.arange(10, dtype=np.float32)
    assert (scores > recall_threshold(scores, 0.9)).sum() == 9


def test_nothing_active_is_never_exceeded() -> None:
    threshold = recall_threshold(np.zeros(0, np.float32), 0.99)
    assert np.isfinite(threshold)
    assert not (np.asarray([0.0, 1e30, np.finfo(np.float32).max], np.float32) > threshold).any()
