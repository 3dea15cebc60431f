"""Who says which neurons a token needs. Behind one interface: a predictor of the store, the truth, or all of them.

Axes: T tokens (the rows of a batch, or of a prompt), D d_model, F d_ff.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import ml_dtypes
import numpy as np

from ..errors import InflashError
from ..kernels.compilation import jit
from ..kernels.predictor import LowRank, low_rank_scores, predict_exact, predict_low_rank, predict_signs, sign_scores
from ..storage import predictor_layout
from ..storage.predictor_layout import BY_NEURON, LOW_RANK, PredictorInfo
from ..storage.predictor_store import load_predictor_layer
from ..storage.store import Store
from .weights import ModelWeights, alias, aligned_empty, on_device

_predict_exact = jit(predict_exact)
_low_rank_scores = jit(low_rank_scores, static_argnames="between")
_predict_low_rank = jit(predict_low_rank, unrolled=False, static_argnames="between")
_sign_scores = jit(sign_scores)
_predict_signs = jit(predict_signs)

UpRows = Callable[[int], np.ndarray]
"""Reads one layer's up rows [F, D], in the order of the neurons on flash, in the dtype of products."""

_WORST_FIRST = ("svd", "sign_bits", "weighted_svd")
"""Methods that saw less of the model's real inputs than training or an import did."""


class Predictor(Protocol):
    """Names the neurons that a layer's FFN needs.

    Attributes:
      ahead: 0: it reads the layer's own FFN input; 1: that of the layer before (for the first layer, its own).
    """

    ahead: int

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        """From the FFN input that it reads [T, D] f32 to [T, F] bool, neurons in the order of the store."""
        ...


class AllNeurons:
    """Dense: every neuron, whatever the input."""

    ahead = 0

    def __init__(self, d_ff: int) -> None:
        self._d_ff = d_ff

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        return on_device(np.ones((ffn_in.shape[0], self._d_ff), bool))


class ExactPredictor:
    """The truth, from the up projection itself, which it keeps in memory: half of the neurons' bytes. For tests and comparisons."""

    ahead = 0

    def __init__(self, weights: ModelWeights, up_rows: UpRows, layers: Sequence[int]) -> None:
        self._up = {layer: alias(up_rows(layer)) for layer in layers}
        self._bias = {layer: on_device(weights.up_bias[layer]) for layer in layers}

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        return _predict_exact(ffn_in, self._up[layer], self._bias[layer])


class LayerPredictor:
    """One layer of a predictor, in memory.

    Attributes:
      threshold: neurons with a larger score are named.
      low_rank: two matrices; else sign bits.
      between: what is done between the matrices.
    """

    def __init__(self, info: PredictorInfo, tensors: dict[str, np.ndarray]) -> None:
        """Takes the tensors of `predictor_specs`, neurons in the order of the store."""
        self.low_rank, self.between = info.kind == LOW_RANK, info.between
        self._weights = {name: alias(_usable(values)) for name, values in tensors.items()}
        self.threshold = float(self._weights["threshold"][0])
        self._operands = LowRank(**self._weights) if self.low_rank else None

    def scores(self, ffn_in: jax.Array) -> jax.Array:
        """[T, D] f32 to [T, F] f32."""
        weights = {name: values for name, values in self._weights.items() if name != "threshold"}
        return _low_rank_scores(ffn_in, **weights, between=self.between) if self.low_rank else _sign_scores(ffn_in, **weights)

    def predict(self, ffn_in: jax.Array) -> jax.Array:
        """[T, D] f32 to [T, F] bool."""
        return self.predict_with(ffn_in)[0] if self.low_rank else _predict_signs(ffn_in, **self._weights)

    def predict_with(self, ffn_in: jax.Array, *others: "LayerPredictor") -> list[jax.Array]:
        """What this one and the others, all of low rank, name from the same inputs, in one call: [T, F] bool each."""
        predictors = (self, *others)
        return _predict_low_rank(
            ffn_in, *[each._operands for each in predictors], between=tuple([each.between for each in predictors])
        )


class StoredPredictor:
    """A predictor of the store, some layers of it in memory.

    Attributes:
      layers: by number.
    """

    def __init__(self, store: Store, name: str, layers: Sequence[int], *, verify: bool = False) -> None:
        self.ahead = store.predictors[name].ahead
        self.layers = {layer: load_layer(store, name, layer, verify=verify) for layer in layers}

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        return self.layers[layer].predict(ffn_in)


def predict_and_guess(
    predictor: Predictor, ahead: StoredPredictor, layer: int, read: jax.Array, ffn_in: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The neurons that a layer needs, and those that the next one will likely need: [T, F] bool each.

    Two predictors of low rank that read the same cost one call, which is what small products mostly cost.

    Args:
      predictor, ahead: for this layer and for the next.
      layer: this one.
      read: [T, D] f32, what `predictor` reads.
      ffn_in: [T, D] f32, this layer's FFN input, which `ahead` reads.
    """
    if read is ffn_in and isinstance(predictor, StoredPredictor):
        now, soon = predictor.layers[layer], ahead.layers[layer + 1]
        if now.low_rank and soon.low_rank:
            predicted, guessed = now.predict_with(ffn_in, soon)
            return predicted, guessed
    return predictor.predict(layer, read), ahead.predict(layer + 1, ffn_in)


def load_layer(store: Store, name: str, layer: int, *, verify: bool = False) -> LayerPredictor:
    """Reads one layer of the predictor `name`.

    Raises:
      InflashError: it is damaged.
    """
    tensors = load_predictor_layer(store, name, layer, verify=verify)
    order = store.neuron_order(layer)
    return LayerPredictor(
        store.predictors[name], {key: values[order] if key in BY_NEURON else values for key, values in tensors.items()}
    )


def choose_predictor(store: Store, requested: str) -> str:
    """Resolves "auto", and checks that the store has what was asked for.

    Raises:
      InflashError: there is no such predictor.
    """
    if requested == "auto":
        usable = [name for name, info in store.predictors.items() if not info.ahead]
        if not usable:
            raise InflashError(
                f"{store.path}: this store has no predictor; make one with inflash train-predictor, "
                "use --ffn hybrid, or --predictor exact (keeps the up projection in memory)"
            )
        return min(usable, key=lambda name: (*_worth(store.predictors[name]), name))
    if requested not in ("exact", "none") and requested not in store.predictors:
        found = ", ".join(["exact", "none", *store.predictors])
        raise InflashError(f"{store.path}: predictor should be one of auto, {found}; found {requested!r}")
    return requested


def choose_prefetch(store: Store, requested: str, predictor: str | None) -> str | None:
    """The look-ahead predictor's name, or None. "auto" takes the store's best where `predictor` is itself one of the store's.

    Raises:
      InflashError: there is no such look-ahead predictor.
    """
    ahead = [name for name, info in store.predictors.items() if info.ahead]
    if requested == "none" or predictor is None:
        return None
    if requested == "auto":
        usable = ahead if predictor in store.predictors else []
        return min(usable, key=lambda name: (*_worth(store.predictors[name]), name), default=None)
    if requested not in ahead:
        found = ", ".join(["auto", "none", *ahead])
        raise InflashError(
            f"{store.path}: prefetch should be one of {found}; found {requested!r}; make one with inflash train-predictor --look-ahead"
        )
    return requested


def predictor_memory_bytes(store: Store, name: str, dtype: np.dtype, layers: Sequence[int]) -> int:
    """Memory that these layers of the predictor will hold."""
    config = store.config
    if name == "none":
        return 0
    if name == "exact":
        return len(layers) * config.d_ff * config.d_model * dtype.itemsize
    specs = [spec for layer in layers for spec in predictor_layout.predictor_specs(config, store.predictors[name], layer)]
    return sum(spec.nbytes for spec in specs)


def _worth(info: PredictorInfo) -> tuple[int, int]:
    """The smaller the better: by method, then by the text that it has seen."""
    place = _WORST_FIRST.index(info.method) if info.method in _WORST_FIRST else len(_WORST_FIRST)
    return -place, -info.tokens


def _usable(values: np.ndarray) -> np.ndarray:
    """An aligned copy; float16, which is 15 times slower on a CPU, as bfloat16."""
    dtype = np.dtype(ml_dtypes.bfloat16) if values.dtype == np.float16 else values.dtype
    copy = aligned_empty(values.shape, dtype)
    copy[:] = values
    return copy
