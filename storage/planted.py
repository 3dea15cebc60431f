"""The arithmetic of planted sparsity: how often normal pre-activations are positive, together, and above a threshold.

Axes: F neurons.
"""

import math
from statistics import NormalDist

import numpy as np

_SPREAD = 1.485  # deviation of the rates' logarithms: the hottest 26 % of the neurons then make 80 % of the activations
_HOTTEST = 0.9
_GRID = np.linspace(-6.0, 6.0, 481)
_WEIGHTS = np.exp(-(_GRID**2) / 2) / np.exp(-(_GRID**2) / 2).sum()
_QUANTILES = 256  # rates that stand for all of them where an average is enough


def hot_rates(active: float, num_neurons: int) -> np.ndarray:
    """[F] f64, ascending: log-normal shares of inputs for which neurons are active, `active` on average."""
    normal = NormalDist()
    quantiles = (np.arange(num_neurons) + 0.5) / num_neurons
    rates = np.exp(_SPREAD * np.array([normal.inv_cdf(quantile) for quantile in quantiles.tolist()]))
    scale = 1.0
    for _ in range(60):  # clipping the hottest takes from the mean, which the others make up for
        scale *= active / np.minimum(rates * scale, _HOTTEST).mean()
    return np.minimum(rates * scale, _HOTTEST)


def rates_to_biases(rates: np.ndarray) -> np.ndarray:
    """[F] f32: biases with which standard normal inputs are positive so often."""
    normal = NormalDist()
    return np.array([normal.inv_cdf(rate) for rate in rates.tolist()], np.float32)


def overlap_of_active(rates: np.ndarray, correlation: float) -> float:
    """Share of the active neurons that were active before, if each pre-activation has this correlation with the one before."""
    rates = _representatives(rates)
    biases = rates_to_biases(rates).astype(np.float64)[:, None]
    deviation = math.sqrt(max(1 - correlation**2, 1e-12))
    again = normal_cdf((correlation * _GRID[None] + biases) / deviation)
    both = ((_GRID[None] + biases > 0) * again * _WEIGHTS[None]).sum()
    return float(both / rates.sum())


def threshold_for(rates: np.ndarray, noise: float, recall: float) -> float:
    """The threshold that finds a share `recall` of the active neurons from scores that lack the share `noise` of the deviation."""
    biases = rates_to_biases(_representatives(rates)).astype(np.float64)[:, None]
    scores = biases + math.sqrt(1 - noise**2) * _GRID[None]
    active = normal_cdf(scores / noise) * _WEIGHTS[None]
    order = np.argsort(scores, axis=None)[::-1]
    found = np.cumsum(active.reshape(-1)[order])
    return float(scores.reshape(-1)[order][np.searchsorted(found, recall * found[-1])])


def normal_cdf(values: np.ndarray) -> np.ndarray:
    """The standard normal distribution function, by interpolation; exact to 1e-6."""
    points = np.linspace(-8.0, 8.0, 8001)
    return np.interp(values, points, _cdf_table(points))


def _cdf_table(points: np.ndarray) -> np.ndarray:
    return np.array([0.5 * (1 + math.erf(point / math.sqrt(2))) for point in points.tolist()])


def _representatives(rates: np.ndarray) -> np.ndarray:
    """Evenly many of the rates, each standing for as many of its like."""
    count = min(_QUANTILES, len(rates))
    return np.sort(rates)[((np.arange(count) + 0.5) * len(rates) / count).astype(int)]
