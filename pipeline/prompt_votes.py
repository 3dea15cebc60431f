"""What prompts name of a layer's neurons, so that of those that stream by the right ones are kept and decoding begins with full caches.

A few tokens are asked, in the shape of a decoding step: the predictor's kernel for that is there anyway.

Axes: B sequences of a step, T tokens of a tile, D d_model, F d_ff.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..kernels.compilation import jit
from .feed_forward import Tile

_ASKED = 16  # tokens of a pass, about

_rows_of = jit(lambda x, rows: x[rows])


def count_votes(
    predict: Callable[[Tile, Tile | None], Tile], tiles: Sequence[Tile], before: Sequence[Tile | None], num_seqs: int
) -> np.ndarray:
    """How many of some evenly spread tokens name each neuron: [F] int64.

    Args:
      predict: from B tokens at the door of the layer's neurons, and the same of the layer before, to these with their predicted neurons.
      tiles, before: tokens of prompts in both places.
      num_seqs: B.
    """
    active = [np.flatnonzero(tile.active) for tile in tiles]
    every = max(1, sum(map(len, active)) // _ASKED)
    votes = None
    for number, rows in enumerate(active):
        stride = min(every, len(rows))  # every tile is asked, however short
        some = rows[stride // 2 :: stride]
        for start in range(0, len(some), num_seqs):
            asked = some[start : start + num_seqs]
            last = before[number]
            tile = predict(take_rows(tiles[number], asked, num_seqs), None if last is None else take_rows(last, asked, num_seqs))
            assert tile.predicted is not None
            named = np.asarray(tile.predicted)[: len(asked)].sum(axis=0)
            votes = named if votes is None else votes + named
    assert votes is not None
    return votes


def take_rows(tile: Tile, rows: np.ndarray, num_seqs: int) -> Tile:
    """Some tokens of a tile, at most B of them, as a tile of B; what pads it repeats them."""
    padded = np.resize(rows.astype(np.int32), num_seqs)
    return Tile(
        residual=_rows_of(tile.residual, padded), ffn_in=_rows_of(tile.ffn_in, padded), active=np.arange(num_seqs) < len(rows)
    )
