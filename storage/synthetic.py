"""Models of any size with planted sparsity: honest weights for measuring speed, whose text means nothing.

Axes: D d_model, F d_ff, R planted rank, V vocabulary, n neurons of a block.

Nothing is faked at run time: the model is an ordinary OPT, and the sparsity comes out of its arithmetic. Three plans lie in the weights.

- Which neurons are active follows from few directions: `up = sqrt(1 - noise**2) C A + noise N` with A [R, D] orthonormal, the rows of C
  [F, R] of length 1, and N white. The FFN's input leaves a LayerNorm, so that C A h and N h are close to standard normal, and neuron i is
  active for a share p_i of all inputs if its bias is the p_i-quantile of a normal distribution. p_i is log-normal: few neurons are hot,
  as in trained models (PowerInfer, arXiv:2312.12456: 26 % of OPT-30B's neurons make 80 % of its activations).
- What repeats from token to token: the first layer's attention is a moving average over the newest tokens. Queries and keys see only
  sines and cosines of the position, at random frequencies, so that a score depends on the distance alone and falls off as a normal
  distribution does; values are the tokens' own embeddings. The average is far larger than what any token brings itself.
- Layers change the residual stream a little, as in trained models: neighbouring layers' inputs are alike, not equal.

Some dimensions hold white noise a position. The output head looks at these, and away from what the newest tokens have in common, so that
greedy text does not run in circles.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from types import TracebackType
from typing import Self

import numpy as np

from ..errors import InflashError
from .layout import dtype_of, resident_specs
from .model_config import ModelConfig
from .planted import hot_rates, overlap_of_active, rates_to_biases, threshold_for

DTYPE = "bfloat16"
NOISE = 0.15
"""Share of a pre-activation's deviation that no predictor of the planted rank sees: a recall of 99 % then names 1.45 times as many."""
AHEAD_NOISE = 0.2
"""The same for a guess from the layer before, whose input differs besides."""
_LAYER_CHANGE = 0.15  # deviation that a layer's neurons add to the residual stream
_ATTENTION_CHANGE = 0.3  # the same for attention, before its average over many tokens makes it small
_TOKEN_SCALE = 0.1  # a token's own embedding beside the moving average
_SHARPNESS = 40.0  # the score at distance 0; what far tokens get by chance stays exp(-20) below
_LOGIT_SCALE = 0.3  # deviation of either part of the logits
_PERSISTENCE = 0.25  # a window of four tokens then reads about what the paper's did: 2.4 % of the neurons
_BLOCK = 256  # neurons whose noise is drawn together
_WIDEST = 200.0  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Planting:
    """What is planted.

    Attributes:
      active: share of a layer's neurons that an average token activates.
      rank: R.
      persistence: share of a token's active neurons that were active for the token before; None: 0.25, or the least that can be.
      seed: two sources with the same are the same.
    """

    active: float = 0.033
    rank: int = 128
    persistence: float | None = None
    seed: int = 0


class SyntheticSource:
    """A checkpoint that is made up as it is read; see `CheckpointSource`."""

    dtype = DTYPE

    def __init__(self, config: ModelConfig, name: str, planting: Planting, tokenizer_folder: Path | None = None) -> None:
        """Reads nothing yet.

        Raises:
          InflashError: the planting cannot be had in this model.
        """
        self.config, self.planting, self.tokenizer_folder = config, planting, tokenizer_folder
        self.description = f"synthetic weights in the shape of {name}, for measuring speed"
        _check(config, planting)
        self._rates = hot_rates(planting.active, config.d_ff)
        self._width = _average_width(self._rates, planting.persistence)
        self._clock = min(64, config.d_model // 16)
        self._position = config.head_dim // 2 * 2
        self._layer = lru_cache(maxsize=1)(self._make_layer)

    def resident_tensor(self, name: str, layer: int | None) -> np.ndarray:
        spec = next(spec for spec in resident_specs(self.config, layer, DTYPE) if spec.name == name)
        if name.endswith("_scale"):
            values = self._final_scale() if name == "final_norm_scale" else np.ones(spec.shape, np.float32)
        elif name == "up_bias":
            assert layer is not None
            values = rates_to_biases(self._layer_rates(layer))
        elif name == "down_bias":
            assert layer is not None
            values = -self._mean_output(layer)
        elif len(spec.shape) == 1:
            values = np.zeros(spec.shape, np.float32)
        else:
            values = self._matrix(name, layer, spec.shape)
        return values.astype(dtype_of(spec.dtype))

    def neuron_rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        first = start // _BLOCK * _BLOCK
        blocks = [self._neuron_block(layer, begin) for begin in range(first, stop, _BLOCK)]
        return np.concatenate(blocks)[start - first : stop - first]

    def predictor_tensors(self, layer: int, *, recall: float = 0.99, ahead: bool = False) -> dict[str, np.ndarray]:
        """The planted predictor of a layer, from the layer's own FFN input or from that of the layer before."""
        basis, mixing, _ = self._layer(layer)
        dtype, seen = dtype_of(DTYPE), math.sqrt(1 - NOISE**2)
        threshold = threshold_for(self._rates, AHEAD_NOISE if ahead and layer else NOISE, recall)
        return {
            "first": basis.astype(dtype),
            "second": (seen * mixing).astype(dtype),
            "bias": rates_to_biases(self._layer_rates(layer)),
            "threshold": np.array([threshold], np.float32),
        }

    def close(self) -> None:
        self._layer.cache_clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /) -> None:
        self.close()

    def _random(self, *key: int | str) -> np.random.Generator:
        numbers = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in key]
        return np.random.default_rng([self.planting.seed, *numbers])

    def _layer_rates(self, layer: int) -> np.ndarray:
        """[F] f64: how often each neuron is active; hot and cold ones in an order of the layer's own."""
        return self._random("rates", layer).permutation(self._rates)

    def _make_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray, float]:
        """A [R, D], C [F, R] and the deviation of down rows."""
        rng, config, rank = self._random("basis", layer), self.config, self.planting.rank
        basis, _ = np.linalg.qr(rng.standard_normal((config.d_model, rank)))
        mixing = rng.standard_normal((config.d_ff, rank), np.float32)
        mixing /= np.linalg.norm(mixing, axis=1, keepdims=True)
        _, squares = _activation_moments(rates_to_biases(self._layer_rates(layer)))
        return np.ascontiguousarray(basis.T, np.float32), mixing, _LAYER_CHANGE / math.sqrt(squares.sum())

    def _neuron_block(self, layer: int, start: int) -> np.ndarray:
        """[up to _BLOCK, 2, D] bf16."""
        basis, mixing, down_scale = self._layer(layer)
        rows = mixing[start : start + _BLOCK]
        block = np.empty((len(rows), 2, self.config.d_model), dtype_of(DTYPE))
        up = math.sqrt(1 - NOISE**2) * (rows @ basis)
        up += _white(self._random("up", layer, start), up.shape, NOISE / math.sqrt(self.config.d_model))
        block[:, 0] = up
        block[:, 1] = _white(self._random("down", layer, start), up.shape, down_scale)
        return block

    def _mean_output(self, layer: int) -> np.ndarray:
        """[D] f32: what the layer's neurons add on average; the bias takes it away, or hot neurons would pull all tokens together."""
        means, _ = _activation_moments(rates_to_biases(self._layer_rates(layer)))
        _, _, down_scale = self._layer(layer)
        total = np.zeros(self.config.d_model, np.float32)
        for start in range(0, self.config.d_ff, _BLOCK):
            some = means[start : start + _BLOCK].astype(np.float32)
            total += some @ _white(self._random("down", layer, start), (len(some), self.config.d_model), down_scale)
        return total

    def _matrix(self, name: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
        if name == "positions":
            return self._position_table(shape)
        rng = self._random(name, 0 if layer is None else layer + 1)
        if name in ("tokens", "head"):
            values = _white(rng, shape, _TOKEN_SCALE)
            values[:, : self._position] = 0
            return values
        scale = 1 / math.sqrt(self.config.d_model)
        if layer == 0:
            return self._moving_average(name, _white(rng, shape, 0.01 * scale))
        return _white(rng, shape, _ATTENTION_CHANGE * scale if name == "attention_out" else scale)

    def _position_table(self, shape: tuple[int, ...]) -> np.ndarray:
        """Sines and cosines, then the clock."""
        rng, count = self._random("positions"), self._position // 2
        # The product of two positions' vectors is close to exp(-(distance / reach)**2 / 2): random Fourier features.
        angles = np.arange(shape[0])[:, None] * rng.standard_normal(count)[None] / (self._width * math.sqrt(_SHARPNESS))
        table = np.zeros(shape, np.float32)
        table[:, :count], table[:, count : 2 * count] = np.cos(angles), np.sin(angles)
        table[:, self._position : self._position + self._clock] = rng.standard_normal((shape[0], self._clock))
        return table

    def _moving_average(self, name: str, values: np.ndarray) -> np.ndarray:
        """The first layer's attention: `values` [outputs, D] small noise, on which the plan is laid."""
        config, head_dim = self.config, self.config.head_dim
        d_model, content = config.d_model, np.arange(self._position, config.d_model)
        variance = (_TOKEN_SCALE**2 * (d_model - self._position) + self._position / 2 + self._clock) / d_model
        if name == "attention_out":
            weights = np.exp(-((np.arange(4 * _WIDEST) / self._width) ** 2) / 2)
            weights /= weights.sum()
            values[content, content] += math.sqrt(variance / (weights**2).sum()) / _TOKEN_SCALE
            return values
        look = math.sqrt(_SHARPNESS * math.sqrt(head_dim) / (self._position / 2) * variance)
        for head in range(config.num_heads):
            for part in (0, 1):  # queries, keys
                rows = part * d_model + head * head_dim + np.arange(self._position)
                values[rows, np.arange(self._position)] += look
        values[2 * d_model + content, content] += 1
        return values

    def _final_scale(self) -> np.ndarray:
        scale = np.zeros(self.config.d_model, np.float32)
        content = self._position + self._clock
        scale[self._position : content] = _LOGIT_SCALE / _TOKEN_SCALE / math.sqrt(self._clock)
        scale[content:] = -_LOGIT_SCALE / _TOKEN_SCALE / math.sqrt(self.config.d_model - content)
        return scale


def _check(config: ModelConfig, planting: Planting) -> None:
    if not config.norm_first or config.embed_dim != config.d_model or not config.final_norm:
        raise InflashError("synth: expected a pre-LN model whose embeddings are as wide as its layers; opt-350m is neither")
    if not 0.001 <= planting.active <= 0.5:
        raise InflashError(f"--active: expected a share from 0.001 to 0.5, found {planting.active}")
    if not 1 <= planting.rank <= config.d_model:
        raise InflashError(f"--rank: expected 1 to d_model = {config.d_model}, found {planting.rank}")
    if planting.seed < 0:
        raise InflashError(f"--seed: expected 0 or more, found {planting.seed}")
    if config.d_model < 64 or config.num_heads < 2:
        raise InflashError(
            f"synth: expected a d_model of at least 64 and two heads or more, found {config.d_model} and {config.num_heads}"
        )


def _white(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """f32 of mean 0, a byte of chance each: ten times as fast as normal ones, and a sum of many of them is as good."""
    chance = np.frombuffer(rng.bytes(math.prod(shape)), np.int8).reshape(shape)
    values = chance.astype(np.float32)
    values += 0.5
    values *= deviation * math.sqrt(12) / 256
    return values


def _average_width(rates: np.ndarray, persistence: float | None) -> float:
    """Deviation in tokens of the moving average whose tokens share so many active neurons."""

    def reached(width: float) -> float:
        weights = np.exp(-((np.arange(4 * _WIDEST) / width) ** 2) / 2)
        return overlap_of_active(rates, float((weights[:-1] * weights[1:]).sum() / (weights**2).sum()))

    low, high = 0.2, _WIDEST
    least, most = reached(low), reached(high)
    if persistence is None:
        persistence = max(_PERSISTENCE, least)
    if not least <= persistence <= most:
        raise InflashError(
            f"--persistence: expected {least:.2f} to {most:.2f} for these shares of active neurons, found {persistence}"
        )
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) < persistence else (low, middle)
    return low


def _activation_moments(biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square of relu(g + bias) for a standard normal g, [F] each."""
    normal = NormalDist()
    density = np.exp(-(biases.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
    rates = np.array([normal.cdf(bias) for bias in biases.tolist()])
    return biases * rates + density, (1 + biases.astype(np.float64) ** 2) * rates + biases * density
