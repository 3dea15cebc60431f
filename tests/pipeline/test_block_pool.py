from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inflash.pipeline.block_pool import BLOCK_SIZE, BlockPool, num_blocks_for

NUM_BLOCKS = 12
prompts = st.tuples(st.sampled_from([0, 1]), st.integers(1, 5 * BLOCK_SIZE), st.integers(0, 60))
"""Which of two texts it begins, how long, and how much follows."""


@given(st.lists(st.one_of(prompts, st.integers(0, 20)), max_size=40))
def test_blocks_are_shared_by_equal_beginnings_only(steps):
    """Every block is free or held, a sequence's fresh blocks are nobody else's, and shared ones hold what it begins with."""
    pool, running, written = BlockPool(NUM_BLOCKS), [], {}
    for step in steps:
        if isinstance(step, int):
            if running:
                pool.give_back(running.pop(step % len(running)))
        else:
            text, length, more = step
            token_ids = np.full(length, text, np.int32)
            free, held = pool.num_free, Counter(block for blocks in running for block in blocks)
            expected = pool.num_cached(token_ids)
            taken = pool.take(token_ids, length + more)
            if taken is None:
                assert pool.num_free == free < num_blocks_for(length + more)
                continue
            blocks, num_cached = taken
            shared = num_cached // BLOCK_SIZE
            assert num_cached % BLOCK_SIZE == 0 and num_cached == expected < length
            assert len(set(blocks)) == len(blocks) == num_blocks_for(length + more)
            assert all(written[block] == (text, place) for place, block in enumerate(blocks[:shared]))
            assert not any(held[block] for block in blocks[shared:])
            written |= {
                block: (text, place) if (place + 1) * BLOCK_SIZE <= length else None
                for place, block in enumerate(blocks)
                if place >= shared
            }
            running.append(blocks)
        assert pool.num_free == NUM_BLOCKS - len({block for blocks in running for block in blocks})


def test_what_was_given_back_is_found_until_it_is_taken():
    pool, prompt = BlockPool(3), np.arange(BLOCK_SIZE + 1, dtype=np.int32)
    for expected in (0, BLOCK_SIZE):
        blocks, num_cached = pool.take(prompt, len(prompt)) or ([], -1)
        assert num_cached == expected
        pool.give_back(blocks)
    others, _ = pool.take(np.zeros(1, np.int32), 3 * BLOCK_SIZE) or ([], 0)
    assert pool.take(prompt, len(prompt)) is None
    pool.give_back(others)
    assert (pool.take(prompt, len(prompt)) or ([], -1))[1] == 0
