"""What predictors are trained to make small. Axes: B tokens, D d_model, F d_ff, R rank."""

import jax
import numpy as np
import pytest
from tiny_models import fresh_seed

from inflash.kernels.compilation import jit
from inflash.kernels.predictor_loss import balanced_loss

NUM_TOKENS, D_MODEL, D_FF, RANK = 24, 20, 50, 6

LOSS = jit(balanced_loss)
GRADIENTS = jit(jax.grad(balanced_loss))


def problem(share: float) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Parameters, inputs [B, D], and active neurons [B, F], about this share of them."""
    rng = np.random.default_rng(fresh_seed())
    parameters = {
        "first": rng.standard_normal((RANK, D_MODEL)) / D_MODEL**0.5,
        "second": rng.standard_normal((D_FF, RANK)),
        "bias": rng.standard_normal(D_FF),
        "log_sharpness": rng.uniform(-1, 1, ()),
    }
    floats = {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    return floats, rng.standard_normal((NUM_TOKENS, D_MODEL)).astype(np.float32), rng.random((NUM_TOKENS, D_FF)) < share


def slow_loss(parameters: dict[str, np.ndarray], h: np.ndarray, active: np.ndarray, share: float) -> float:
    """Cross-entropies of a sigmoid, float64; active pairs weigh 1 / (2 share) each, the others 1 / (2 (1 - share))."""
    exact = {name: value.astype(np.float64) for name, value in parameters.items()}
    scores = h @ exact["first"].T @ exact["second"].T + exact["bias"]
    odds = np.exp(np.exp(exact["log_sharpness"]) * scores)  # that a neuron is active
    return float(np.where(active, np.log1p(1 / odds) / (2 * share), np.log1p(odds) / (2 - 2 * share)).mean())


@pytest.mark.parametrize("share", [0.04, 0.5, 0.9])
def test_agrees_with_float64(share: float) -> None:
    """The share is of the layer, not of the batch."""
    parameters, h, active = problem(share)
    found = LOSS(parameters, h, active, np.float32(share))
    assert found.shape == () and found.dtype == np.float32
    np.testing.assert_allclose(float(found), slow_loss(parameters, h, active, share), rtol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.97])
def test_to_know_nothing_costs_log_two(share: float) -> None:
    """Scores of zero, whatever the neurons do, and however sharp; active and inactive neurons have half of it each."""
    parameters, h, active = problem(share)
    active[0, 0], active[0, 1] = True, False
    parameters["second"][:], parameters["bias"][:] = 0, 0
    true_share = np.float32(active.mean())
    # A float32 mean of thousands of terms in whatever order: a few hundred roundings of 6e-8.
    np.testing.assert_allclose(float(LOSS(parameters, h, active, true_share)), np.log(2), rtol=3e-5)
    parameters["bias"][:] = 1e4  # all are named: what is active costs nothing, what is not nearly everything
    sharpness = float(np.exp(parameters["log_sharpness"]))
    np.testing.assert_allclose(float(LOSS(parameters, h, active, true_share)), 1e4 * sharpness / 2, rtol=1e-4)
    parameters["bias"][:] = -1e4  # balanced: to name none is as bad
    np.testing.assert_allclose(float(LOSS(parameters, h, active, true_share)), 1e4 * sharpness / 2, rtol=1e-4)


def test_a_perfect_guess_costs_nothing() -> None:
    parameters, h, active = problem(0.3)
    active[:] = active[0]
    parameters["second"][:], parameters["bias"] = 0, np.where(active[0], 1e4, -1e4).astype(np.float32)
    parameters["log_sharpness"][()] = 0
    assert float(LOSS(parameters, h, active, np.float32(0.3))) == 0


def test_descent_raises_active_neurons_and_lowers_the_others() -> None:
    parameters, h, active = problem(0.3)
    active[:] = active[0]
    gradients = {name: np.asarray(value) for name, value in GRADIENTS(parameters, h, active, np.float32(0.3)).items()}
    assert (gradients["bias"][active[0]] < 0).all()
    assert (gradients["bias"][~active[0]] > 0).all()


@pytest.mark.parametrize("name", ["first", "second", "bias", "log_sharpness"])
def test_gradients_are_differences(name: str) -> None:
    """Along a random direction, against float64."""
    parameters, h, active = problem(0.2)
    gradient = np.asarray(GRADIENTS(parameters, h, active, np.float32(0.2))[name], np.float64)
    direction = np.asarray(np.random.default_rng(fresh_seed()).standard_normal(gradient.shape))
    losses = []
    for step in (1e-5, -1e-5):
        moved = {**parameters, name: parameters[name].astype(np.float64) + step * direction}
        losses.append(slow_loss(moved, h, active, 0.2))
    slope = (losses[0] - losses[1]) / 2e-5
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3, atol=1e-5)


def test_extreme_scores_have_finite_gradients() -> None:
    parameters, h, active = problem(0.2)
    parameters["second"] *= 1e6
    assert np.isfinite(float(LOSS(parameters, h, active, np.float32(0.2))))
    for gradient in GRADIENTS(parameters, h, active, np.float32(0.2)).values():
        assert np.isfinite(np.asarray(gradient)).all()
