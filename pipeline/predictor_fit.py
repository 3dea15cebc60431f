"""Fitting one layer's predictor to pairs of FFN inputs and the neurons that they activated.

Axes: W windows, C tokens of a window, B tokens of a batch, D d_model, F d_ff, R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import numpy as np
import optax

from ..errors import InflashError
from ..kernels.compilation import jit
from ..kernels.predictor_loss import Parameters, balanced_loss
from ..storage.layout import dtype_of
from ..storage.low_rank import recall_threshold, weighted_low_rank
from ..storage.predictor_layout import LOW_RANK, SIGN_BITS, PredictorInfo
from ..storage.scratch import BitArray, WindowArray
from ..storage.sign_bits import packed_signs, sign_scale
from .options import PREDICTOR_METHODS
from .predictors import LayerPredictor
from .weights import on_device

_HELD_OUT = 8  # one window of so many
_MOST_HELD_OUT = 1 << 27  # pairs: enough for a threshold, and what their active ones take stays below a few hundred MiB
_BUFFER_BYTES = 128 << 20  # of pairs shuffled together, or kept
_WORTHWHILE = 0.9  # a larger rank should spare a tenth of the neurons named
_ROWS_TOGETHER = 2048  # of the up projection, in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How predictors are fitted.

    Attributes:
      method: one of PREDICTOR_METHODS.
      rank: R of every layer; None: the smallest that will do, rising while the next one names a tenth fewer neurons.
      recall: share of the active neurons that should be named.
      most_predicted: how many times as many neurons as are active may be named for a rank to do.
      epochs: most passes over the pairs.
      batch_tokens: B.
      learning_rate: of Adam at the beginning; falls to 0 along a cosine.
      seed: of the order of batches.
    """

    method: str = "trained"
    rank: int | None = None
    recall: float = 0.99
    most_predicted: float = 3.0
    epochs: int = 2
    batch_tokens: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in PREDICTOR_METHODS:
            raise InflashError(f"method should be one of {', '.join(PREDICTOR_METHODS)}, found {self.method!r}")
        if not 0 < self.recall < 1:
            raise InflashError(f"recall: expected a share between 0 and 1, such as 0.99, found {self.recall}")
        if not self.most_predicted > 1:
            raise InflashError(f"most predicted: expected more than 1 times the active neurons, found {self.most_predicted}")
        if self.epochs < 1:
            raise InflashError(f"epochs: expected at least 1, found {self.epochs}")
        if self.seed < 0:
            raise InflashError(f"seed: expected 0 or more, found {self.seed}")
        if self.method == "sign-bits" and self.rank is not None:
            raise InflashError(f"rank: sign bits have none, found {self.rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted layer, and how it does on held-out pairs.

    Attributes:
      tensors: of `predictor_specs`, neurons in the order of the pairs.
      rank: R; None for sign bits.
      loss: held-out balanced loss; None where nothing was trained.
      recall, active, predicted: shares, 0 to 1: of the active neurons that are named, of all neurons that are active, that are named.
    """

    tensors: dict[str, np.ndarray]
    rank: int | None
    loss: float | None
    recall: float
    active: float
    predicted: float

    def does(self, options: FitOptions) -> bool:
        """Whether few enough neurons are named. Where many are active, no more than a quarter of the others may be."""
        return self.predicted <= min(options.most_predicted * self.active, self.active + (1 - self.active) / 4)


Report = Callable[[str], object]
"""Told in a few words what is being done."""


class Pairs:
    """What a layer's FFN saw and did. An eighth of the windows, evenly spread, is held out. What is small stays in memory once read.

    Attributes:
      inputs: [W, C, D], of this layer, or of the one before for a predictor that looks ahead.
      active: [W, C, F].
    """

    def __init__(self, inputs: WindowArray, active: BitArray) -> None:
        self.inputs, self.active = inputs, active
        windows, context, d_ff = active.shape
        num_bytes = windows * context * (4 * inputs.shape[2] + d_ff)
        self._kept = (inputs.read(0, windows), active.read(0, windows)) if num_bytes <= _BUFFER_BYTES else None

    @property
    def num_windows(self) -> int:
        return self.active.shape[0]

    @property
    def held_out(self) -> list[int]:
        windows, context, d_ff = self.active.shape
        count = max(1, min(windows // _HELD_OUT, _MOST_HELD_OUT // (context * d_ff)))
        return np.linspace(0, windows, count, endpoint=False, dtype=int).tolist()

    @property
    def training(self) -> list[int]:
        held_out = set(self.held_out)
        return [window for window in range(self.num_windows) if window not in held_out]

    def read(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """[C, D] f32 and [C, F] bool."""
        if self._kept is not None:
            inputs, active = self._kept
            return inputs[window], active[window]
        return self.inputs.read(window, window + 1)[0], self.active.read(window, window + 1)[0]

    def batches(self, rng: np.random.Generator, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The training pairs in a random order, [B, D] f32 and [B, F] bool; a rest that fills no batch is left out."""
        held: list[tuple[np.ndarray, np.ndarray]] = []
        windows = rng.permutation(self.training)
        together = max(size, _BUFFER_BYTES // (4 * self.inputs.shape[2] + self.active.shape[2]))
        for number, window in enumerate(windows):
            held.append(self.read(int(window)))
            tokens = sum(len(inputs) for inputs, _ in held)
            if tokens < together and number + 1 < len(windows):
                continue
            inputs, active = (np.concatenate([pair[part] for pair in held]) for part in (0, 1))
            order = rng.permutation(tokens)
            whole = tokens - tokens % size
            for start in range(0, whole, size):
                chosen = order[start : start + size]
                yield inputs[chosen], active[chosen]
            held = [(inputs[order[whole:]], active[order[whole:]])]


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a layer's inputs on the training pairs: mean [D] and covariance [D, D], f32, and the share of active neurons."""

    mean: np.ndarray
    covariance: np.ndarray
    active: float


class LayerFit:
    """Fits one layer with any rank, beginning from one decomposition of its up projection."""

    def __init__(
        self,
        pairs: Pairs,
        up_rows: np.ndarray,  # [F, D], the layer's whose neurons are guessed
        up_bias: np.ndarray,  # [F] f32
        options: FitOptions,
        *,
        dtype: str,
        most_rank: int,
        report: Report = lambda words: None,
    ) -> None:
        """Reads nothing yet.

        Args:
          pairs: as collected.
          up_rows, up_bias: neurons in the order of the pairs.
          options: the method and its settings.
          dtype: of the predictor's matrices.
          most_rank: no larger rank is tried.
          report: progress.
        """
        self._pairs, self._up, self._up_bias, self._options, self._report = pairs, up_rows, up_bias, options, report
        self._dtype, self._most_rank = dtype, min(most_rank, up_rows.shape[1])

    def best(self) -> Fit:
        """The predictor asked for: of the given rank, or of the smallest that does and pays, or else of the largest allowed."""
        if self._options.method == "sign-bits":
            return self._sign_bits()
        self._moments = moments(self._pairs)
        ranks = [self._options.rank] if self._options.rank else rank_ladder(self._up.shape[1], self._most_rank)
        self._start = weighted_low_rank(
            self._blocks, self._up_bias, self._moments.mean, self._moments.covariance, max(ranks), self._options.seed
        )
        best = self._low_rank(ranks[0])
        for rank in ranks[1:]:
            fit = self._low_rank(rank)
            if best.does(self._options) and fit.predicted > _WORTHWHILE * best.predicted:
                break
            best = fit
        return best

    def _blocks(self) -> Iterator[np.ndarray]:
        return (self._up[start : start + _ROWS_TOGETHER] for start in range(0, len(self._up), _ROWS_TOGETHER))

    def _sign_bits(self) -> Fit:
        tensors = {"signs": packed_signs(self._up), "scale": sign_scale(self._up), "bias": self._up_bias}
        return self._calibrated(PredictorInfo(kind=SIGN_BITS, method=""), tensors, rank=None, loss=None)

    def _low_rank(self, rank: int) -> Fit:
        first, second, bias = self._start
        scale = max(float(np.sqrt((second**2).sum(1).mean())), 1e-20)  # scores of unit size, whatever the layer
        cut = second[:, rank:] @ (first[rank:] @ self._moments.mean)  # at the mean, the directions left out are made up for
        parameters = {"first": first[:rank], "second": second[:, :rank] / scale, "bias": (bias + cut) / scale}
        loss = None
        if self._options.method == "trained" and 0 < self._moments.active < 1:
            parameters, loss = self._train(parameters, rank)
        dtype = dtype_of(self._dtype)
        tensors = {name: value.astype(np.float32 if name == "bias" else dtype) for name, value in parameters.items()}
        return self._calibrated(PredictorInfo(kind=LOW_RANK, method=""), tensors, rank=rank, loss=loss)

    def _train(self, start: dict[str, np.ndarray], rank: int) -> tuple[dict[str, np.ndarray], float]:
        """Epochs until the held-out loss no longer falls; the best parameters and their loss."""
        options, share = self._options, np.float32(self._moments.active)
        tokens = len(self._pairs.training) * self._pairs.active.shape[1]
        batch = min(options.batch_tokens, tokens)
        steps = options.epochs * (tokens // batch)
        optimiser, step = _training_step(options.learning_rate, steps)
        parameters: Parameters = {name: jax.numpy.asarray(value, "float32") for name, value in start.items()}
        parameters["log_sharpness"] = jax.numpy.asarray(1.0, "float32")
        state = optimiser.init(parameters)
        rng = np.random.default_rng([options.seed, rank])
        best, best_loss = parameters, self._held_out_loss(parameters, share)
        for epoch in range(options.epochs):
            for inputs, active in self._pairs.batches(rng, batch):
                parameters, state = step(parameters, state, inputs, active, share)
            loss = self._held_out_loss(parameters, share)
            self._report(f"rank {rank}, epoch {epoch + 1}: loss {loss:.4f}")
            if not loss < best_loss:  # nor NaN
                break
            best, best_loss = parameters, loss
        return {name: np.asarray(value) for name, value in best.items() if name != "log_sharpness"}, best_loss

    def _held_out_loss(self, parameters: Parameters, share: np.float32) -> float:
        losses = [float(_loss(parameters, *self._pairs.read(window), share)) for window in self._pairs.held_out]
        return float(np.mean(losses))

    def _calibrated(self, info: PredictorInfo, tensors: dict[str, np.ndarray], *, rank: int | None, loss: float | None) -> Fit:
        """Sets the threshold on the held-out pairs, with the very kernel and dtype that decoding uses."""
        layer = LayerPredictor(info, {**tensors, "threshold": np.zeros(1, np.float32)})

        def scored() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for inputs, active in map(self._pairs.read, self._pairs.held_out):
                yield np.asarray(layer.scores(on_device(inputs))), active

        # Scores are computed twice, because all of them together may be far larger than those of the active neurons.
        threshold = recall_threshold(np.concatenate([scores[active] for scores, active in scored()]), self._options.recall)
        counts = np.zeros(4)
        for scores, active in scored():
            named = scores > threshold
            counts += active.size, active.sum(), named.sum(), (named & active).sum()
        pairs, num_active, num_named, hits = counts.tolist()
        fit = Fit(
            tensors={**tensors, "threshold": np.asarray([threshold], np.float32)},
            rank=rank,
            loss=loss,
            recall=hits / num_active if num_active else 1.0,
            active=num_active / pairs,
            predicted=num_named / pairs,
        )
        words = f"rank {rank}, " if rank else ""
        self._report(f"{words}recall {fit.recall:.3f}, predicted {fit.predicted:.1%} of the neurons, active {fit.active:.1%}")
        return fit


def rank_ladder(d_model: int, most: int) -> list[int]:
    """Ranks to try, ascending by a third or a half each: ..., 16, 24, 32, 48, ..., and the largest allowed."""
    smallest = max(2, d_model // 64)
    steps = sorted({size << power for size in (2, 3) for power in range(20)})
    return [*(rank for rank in steps if smallest <= rank < most), max(most, 1)]


def moments(pairs: Pairs) -> Moments:
    """Of the training pairs.

    Sums are of differences from the first window's mean: a mean that is many times what varies would drown it in rounding.
    """
    origin = pairs.read(pairs.training[0])[0].mean(0)
    total, products, count, num_active, num_pairs = 0.0, 0.0, 0, 0, 0
    for window in pairs.training:
        inputs, active = pairs.read(window)
        inputs = inputs - origin
        total = total + inputs.sum(0, dtype=np.float64)
        products = products + (inputs.T @ inputs).astype(np.float64)
        count += len(inputs)
        num_active += int(active.sum())
        num_pairs += active.size
    mean = np.asarray(total) / count
    covariance = np.asarray(products) / count - np.outer(mean, mean)
    return Moments(
        mean=(origin + mean).astype(np.float32), covariance=covariance.astype(np.float32), active=num_active / num_pairs
    )


@lru_cache(maxsize=2)
def _training_step(learning_rate: float, steps: int):
    """The optimiser, and a step of it that is compiled once for all layers."""
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return optimiser, jit(partial(_step, optimiser))


def _step(optimiser, parameters: Parameters, state, inputs, active, share):
    gradients = jax.grad(balanced_loss)(parameters, inputs, active, share)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # whatever the caller's: optax needs it
        updates, state = optimiser.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state


_loss = jit(balanced_loss)
