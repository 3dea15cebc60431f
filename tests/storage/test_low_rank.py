"""The training-free predictor. Axes: F d_ff, D d_model, R rank, N inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fresh_seed

from inflash.storage.low_rank import LowRankPredictor, default_rank, low_rank_predictor

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
