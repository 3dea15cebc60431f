"""How much of the truth a stored predictor would have named, counted on a traced run that has the truth (`--predictor exact`).

Axes: B sequences, D d_model, F d_ff.

Only a few layers at every fourth step are looked at, and only their part of the predictor is loaded: the run stays what it is.
"""

import numpy as np

from ..storage.store import Store
from .feed_forward import Tile
from .predictors import choose_predictor, load_layer
from .trace import RECALL, Off

_EVERY = 4  # steps


class RecallProbe:
    """Counts into a trace.

    Attributes:
      name: of the predictor that is judged; None: the store has none, and nothing is counted.
    """

    def __init__(self, store: Store, trace: Off) -> None:
        self._trace = trace
        usable = [name for name, info in store.predictors.items() if not info.ahead]
        self.name = choose_predictor(store, "auto") if usable and trace.on else None
        self._layers = {layer: load_layer(store, self.name, layer) for layer in trace.sampled} if self.name else {}

    def look(self, layer: int, tile: Tile) -> None:
        """Compares with what the exact predictor has named for a tile [B, F]."""
        if layer not in self._layers or self._trace.step % _EVERY:
            return
        with self._trace.span(RECALL, layer):
            named = np.asarray(self._layers[layer].predict(tile.ffn_in))[tile.active]
            truth = np.asarray(tile.predicted)[tile.active]
            both, active = int(np.count_nonzero(named & truth)), int(np.count_nonzero(truth))
            self._trace.tell(both << 32 | active, int(np.count_nonzero(named)))
