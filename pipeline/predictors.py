"""Who says which neurons a token needs. Behind one interface: low rank from the store, the truth, or all of them.

Axes: T tokens (the rows of a batch, or of a prompt), D d_model, F d_ff, R predictor rank.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from ..errors import InflashError
from ..kernels.compilation import jit
from ..kernels.predictor import predict, predict_exact
from ..storage.layout import predictor_specs
from ..storage.resident import load_tensors
from ..storage.store import Store
from .weights import ModelWeights, alias, gather_pieces, on_device

_predict = jit(predict)
_predict_exact = jit(predict_exact)

UpRows = Callable[[int], np.ndarray]
"""Reads one layer's up rows [F, D], in the order of the neurons on flash, in the dtype of products."""


class Predictor(Protocol):
    """Names the neurons that a layer's FFN needs.

    Attributes:
      name: as in `EngineOptions.predictor`.
      num_bytes: memory it holds.
    """

    name: str
    num_bytes: int

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        """From the layer's FFN input [T, D] f32 to [T, F] bool, neurons in the order of the store."""
        ...


class AllNeurons:
    """Dense: every neuron, whatever the input."""

    name = "none"
    num_bytes = 0

    def __init__(self, d_ff: int) -> None:
        self._d_ff = d_ff

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        return on_device(np.ones((ffn_in.shape[0], self._d_ff), bool))


class ExactPredictor:
    """The truth, from the up projection itself, which it keeps in memory: half of the neurons' bytes. For tests and comparisons."""

    name = "exact"

    def __init__(self, weights: ModelWeights, up_rows: UpRows) -> None:
        self._up = [alias(up_rows(layer)) for layer in range(len(weights.layers))]
        self._bias = [on_device(bias) for bias in weights.up_bias]
        self.num_bytes = sum(up.nbytes for up in self._up)

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        return _predict_exact(ffn_in, self._up[layer], self._bias[layer])


class LowRankPredictor:
    """The paper's: active where B(A h) + bias > threshold. Reference: arXiv:2312.11514, 3.1."""

    def __init__(self, store: Store, name: str, dtype: np.dtype, *, verify: bool = False) -> None:
        self.name = name
        self._layers = []
        ranks = store.predictors[name].get("ranks", [])
        if len(ranks) != store.config.num_layers:
            raise InflashError(
                f"{store.path}: predictor {name!r}: expected {store.config.num_layers} ranks, found {len(ranks)}; convert again"
            )
        for layer, rank in enumerate(ranks):
            specs = predictor_specs(store.config.d_model, store.config.d_ff, rank, store.dtype)
            tensors = gather_pieces(load_tensors(store.predictor_folder(name, layer), specs, verify=verify), dtype)
            order = store.neuron_order(layer)
            tensors["second"][:] = tensors["second"][order]
            tensors["bias"][:] = tensors["bias"][order]
            self._layers.append({key: alias(tensor) for key, tensor in tensors.items()})
        self.num_bytes = sum(array.nbytes for tensors in self._layers for array in tensors.values())

    def predict(self, layer: int, ffn_in: jax.Array) -> jax.Array:
        tensors = self._layers[layer]
        return _predict(ffn_in, tensors["first"], tensors["second"], tensors["bias"], tensors["threshold"])


def choose_predictor(store: Store, requested: str) -> str:
    """Resolves "auto", and checks that the store has what was asked for.

    Raises:
      InflashError: there is no such predictor.
    """
    if requested == "auto":
        if not store.predictors:
            raise InflashError(
                f"{store.path}: this store has no predictor; use --ffn hybrid, or --predictor exact (keeps the up projection in memory)"
            )
        # Trained ones know the model's real inputs, so the training-free one comes last.
        return min(store.predictors, key=lambda name: (store.predictors[name].get("method") == "svd", name))
    if requested not in ("exact", "none") and requested not in store.predictors:
        found = ", ".join(["exact", "none", *store.predictors])
        raise InflashError(f"{store.path}: predictor should be one of auto, {found}; found {requested!r}")
    return requested


def predictor_bytes(store: Store, name: str, dtype: np.dtype) -> int:
    """Memory that the predictor will hold."""
    config = store.config
    if name == "none":
        return 0
    if name == "exact":
        return config.num_layers * config.d_ff * config.d_model * dtype.itemsize
    ranks = store.predictors[name].get("ranks", [])
    return sum(rank * (config.d_model + config.d_ff) * dtype.itemsize + 4 * config.d_ff for rank in ranks)
