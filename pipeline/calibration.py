"""Seeing what a model names: a short pass over text, layer by layer, in little memory, from which the hit curves are counted.

Axes: W windows, C tokens of a window, T all of them, D d_model, F d_ff.
"""

from collections.abc import Callable

import numpy as np

from ..errors import InflashError
from ..storage.store import Store
from .hit_curves import BATCHES, HitCurves, curves_from_bits
from .layerwise import LayerwisePass
from .options import EngineOptions
from .predictors import LayerPredictor, choose_predictor, choose_prefetch, load_layer
from .weights import on_device

TOKENS, CONTEXT = 2048, 256
"""A window of its own for each of eight sequences, and enough for the cache's counts to settle, at a cost of a minute or two."""


def calibration_steps(store: Store) -> int:
    """How often `calibrate` calls its progress: a layer once for the pass, and for each batch."""
    return store.config.num_layers * (1 + len(BATCHES))


def calibrate(
    store: Store, options: EngineOptions, token_ids: np.ndarray, source: str, progress: Callable[[], object] = lambda: None
) -> HitCurves:
    """Runs the dense model over windows of text and counts what its predictors name.

    Args:
      store, options: which model and predictors.
      token_ids: [W, C] int32.
      source: where the text is from, for people.
      progress: called after each step, see `calibration_steps`.

    Raises:
      InflashError: the store has no such predictor, or not even one layer fits into memory.
    """
    name = choose_predictor(store, options.predictor)
    if name == "none":
        raise InflashError("calibration: --predictor none names every neuron, so there is nothing to see")
    ahead = choose_prefetch(store, options.prefetch, name)
    layers, before = [], None
    with LayerwisePass(store, token_ids.shape[1], compute_dtype=options.compute_dtype) as run:
        hidden = run.embed(token_ids)
        for layer in range(store.config.num_layers):
            with run.attention(layer) as weights:
                output = run.run(layer, weights, hidden)
            hidden, read = output.hidden, output.ffn_in
            if name == "exact":
                named = np.packbits(output.active.reshape(-1, store.config.d_ff), axis=1)
            else:
                behind = before if store.predictors[name].ahead and before is not None else read
                named = _names(load_layer(store, name, layer), behind)
            guessed = None if ahead is None or before is None else _names(load_layer(store, ahead, layer), before)
            layers.append((named, guessed))
            before = read
            progress()
    return curves_from_bits(source, name, ahead or "", layers, store.config.d_ff, progress)


def _names(predictor: LayerPredictor, ffn_in: np.ndarray) -> np.ndarray:
    """[W, C, D] f32 to bits of the neurons that each token needs, [T, F / 8] uint8."""
    return np.concatenate([np.packbits(np.asarray(predictor.predict(on_device(window))), axis=1) for window in ffn_in])
