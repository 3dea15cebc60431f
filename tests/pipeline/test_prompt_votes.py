"""Tokens that are asked, against counting by hand."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from inflash.pipeline.feed_forward import Tile
from inflash.pipeline.prompt_votes import count_votes


def tile_of(values: list[int], count: int) -> Tile:
    """Tokens that each see one number; those from `count` on are padding."""
    x = jnp.asarray(values, jnp.float32)[:, None]
    return Tile(residual=x, ffn_in=x, active=np.arange(len(values)) < count)


@pytest.mark.parametrize("num_seqs", [1, 3, 8])
@pytest.mark.parametrize("counts", [[1], [5], [32, 32], [64, 1, 7], [8] * 40])
def test_every_tile_is_asked_and_no_padding(num_seqs: int, counts: list[int]) -> None:
    """A token of number n names neuron n and, through the layer before, neuron n + 100."""
    asked: list[int] = []

    def predict(tile: Tile, last: Tile | None) -> Tile:
        assert tile.ffn_in.shape == (num_seqs, 1) and last is not None
        asked.extend(np.asarray(tile.ffn_in)[tile.active, 0].astype(int).tolist())
        named = np.asarray(tile.ffn_in) == np.arange(200)
        return replace(tile, predicted=jnp.asarray(named | (np.asarray(last.ffn_in) == np.arange(200) - 100)))

    tiles = [tile_of([number] * 64, count) for number, count in enumerate(counts)]
    votes = count_votes(predict, tiles, tiles, num_seqs)
    assert votes.tolist() == [asked.count(neuron % 100) for neuron in range(200)]
    assert set(asked) == set(range(len(counts)))
    assert len(asked) <= 16 + 16 + len(counts)
