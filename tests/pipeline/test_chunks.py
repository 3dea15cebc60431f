"""Packing: every token of every prompt once, in order, in pieces that attention can take."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inflash.kernels.attention import PIECE
from inflash.pipeline.chunks import cut, num_tokens, pack_prompts, sizes_for

prompts = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 299)), min_size=1, max_size=20)
"""Of each its length, and about where it begins to pass."""


@given(prompts, st.sampled_from([32, 100, 1024]))
def test_every_token_passes_once_in_order(lengths: list[tuple[int, int]], most_tokens: int) -> None:
    given_prompts = [
        (sequence, np.arange(length, dtype=np.int32) + 1000 * sequence, min(first, length - 1))
        for sequence, (length, first) in enumerate(lengths)
    ]
    wanted = [(sequence, at, ids[at]) for sequence, ids, first in given_prompts for at in range(first, len(ids))]
    seen, attending, last = [], [], {}
    sizes = sizes_for(sum(map(len, (ids for _, ids, _ in given_prompts))))  # which are compiled
    for chunks in pack_prompts(given_prompts, most_tokens):
        assert 0 < num_tokens(chunks) <= most_tokens
        for chunk in chunks:
            assert len(chunk.token_ids) in sizes and chunk.active.sum() == chunk.count
            assert all(chunk.sequences[chunk.count :] >= len(lengths))
            columns = (chunk.sequences, chunk.positions, chunk.token_ids)
            seen += list(zip(*(column[: chunk.count].tolist() for column in columns), strict=True))
            assert chunk.pieces[:, 3].sum() == chunk.count
            place = 0
            for sequence, start, row, count in chunk.pieces.tolist():
                assert row == place and 0 < count <= PIECE
                attending += [(sequence, start + i) for i in range(count)]
                place += count
            rows = chunk.last_rows(len(lengths))
            last |= {sequence: chunk.token_ids[row] for sequence, row in enumerate(rows) if row < len(chunk.token_ids)}
    assert seen == wanted
    assert attending == [(sequence, at) for sequence, at, _ in wanted]
    assert last == {sequence: ids[-1] for sequence, ids, _ in given_prompts}


def test_chunks_are_not_mostly_padding() -> None:
    assert cut(0, 7) == [(0, 7, 64)]
    assert cut(100, 292) == [(100, 164, 64), (164, 228, 64), (228, 292, 64)]
    assert cut(0, 193) == [(0, 193, 256)]
    assert cut(0, 300) == [(0, 256, 256), (256, 300, 64)]
    assert [sizes_for(count) for count in (1, 192, 193, 5000)] == [[64], [64], [64, 256], [64, 256]]
