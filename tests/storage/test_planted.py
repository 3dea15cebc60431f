"""The arithmetic of planting against plain chance. Axes: F neurons, T inputs."""

import numpy as np
import pytest

from inflash.storage.planted import hot_rates, normal_cdf, overlap_of_active, rates_to_biases, threshold_for

INPUTS = 4000


@pytest.mark.parametrize("active", [0.005, 0.033, 0.1, 0.5])
def test_few_neurons_are_hot(active: float) -> None:
    rates = hot_rates(active, 5000)
    assert rates.mean() == pytest.approx(active, rel=1e-3)
    assert (np.diff(rates) >= 0).all() and rates[0] > 0 and rates[-1] <= 0.9
    if active <= 0.033:
        assert rates[-1300:].sum() / rates.sum() == pytest.approx(0.8, abs=0.03)


def test_biases_give_the_rates() -> None:
    rates = np.array([0.01, 0.2, 0.5, 0.8])
    inputs = np.random.default_rng().standard_normal((100_000, 1)) + rates_to_biases(rates)[None]
    np.testing.assert_allclose((inputs > 0).mean(axis=0), rates, atol=0.01)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_overlap_is_what_chance_gives(correlation: float) -> None:
    rng, rates = np.random.default_rng(), hot_rates(0.05, 500)
    biases = rates_to_biases(rates)[None]
    before = rng.standard_normal((INPUTS, 500))
    after = correlation * before + np.sqrt(1 - correlation**2) * rng.standard_normal((INPUTS, 500))
    both = ((before + biases > 0) & (after + biases > 0)).sum() / (before + biases > 0).sum()
    assert overlap_of_active(rates, correlation) == pytest.approx(both, abs=0.02)


@pytest.mark.parametrize(("noise", "recall"), [(0.15, 0.99), (0.2, 0.95), (0.5, 0.9)])
def test_thresholds_reach_the_recall_and_no_more(noise: float, recall: float) -> None:
    rng, rates = np.random.default_rng(), hot_rates(0.05, 500)
    seen = np.sqrt(1 - noise**2) * rng.standard_normal((INPUTS, 500)) + rates_to_biases(rates)[None]
    active = seen + noise * rng.standard_normal(seen.shape) > 0
    named = seen > threshold_for(rates, noise, recall)
    assert (named & active).sum() / active.sum() == pytest.approx(recall, abs=0.01)


def test_the_distribution_function() -> None:
    np.testing.assert_allclose(normal_cdf(np.array([-9.0, -1.959964, 0.0, 1.0, 9.0])), [0, 0.025, 0.5, 0.841345, 1], atol=1e-5)
