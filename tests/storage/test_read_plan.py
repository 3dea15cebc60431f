"""Plans against a model in plain Python: every row is filled once, from its place, with as few reads as allowed. n neurons, P parts."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from inflash.storage import read_plan
from inflash.storage.read_plan import MOST_BYTES, plan_bytes, plan_rows

SCRATCH = 1 << 40


@settings(max_examples=200)
@given(data=st.data())
def test_every_row_is_filled_once_and_gaps_go_to_scratch(data: st.DataObject) -> None:
    num_parts, row_bytes = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([8, 512, 20_000]))
    stride = num_parts * row_bytes
    places = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=40, unique=True))
    if data.draw(st.booleans()):
        places.sort()
    merge_gap = data.draw(st.sampled_from([0, stride - 1, stride, 3 * stride]))
    offsets = np.asarray(places, np.int64) * stride
    addresses = (np.arange(len(places) * num_parts).reshape(len(places), num_parts) * row_bytes + 4096).astype(np.uint64)
    plan = plan_rows(offsets, addresses, row_bytes, merge_gap=merge_gap, scratch=SCRATCH)

    filled: dict[int, int] = {}  # address: offset in the file, a part's bytes at a time
    for read in range(len(plan)):
        at, segments = int(plan.offsets[read]), plan.segments_of(read)
        assert int(segments["length"].sum()) == plan.lengths[read] <= MOST_BYTES + stride
        for address, length in segments.tolist():
            if address == SCRATCH:
                assert 0 < length <= merge_gap
            else:
                assert length == row_bytes and address not in filled
                filled[address] = at
            at += length
    expected = {
        int(addresses[n, part]): place * stride + part * row_bytes for n, place in enumerate(places) for part in range(num_parts)
    }
    assert filled == expected
    breaks = sum(not 0 <= after - before - 1 <= merge_gap // stride for before, after in pairwise(places))
    most = max(1, MOST_BYTES // (stride + merge_gap))
    assert breaks + 1 <= len(plan) <= breaks + 1 + len(places) // most


def test_a_read_takes_no_more_segments_than_the_kernel_allows() -> None:
    offsets = np.arange(5000) * 64
    plan = plan_rows(offsets, np.arange(10_000, dtype=np.uint64).reshape(5000, 2), 32)
    assert np.diff(plan.first_segments).max() <= read_plan._MOST_SEGMENTS
    assert len(plan) == -(-5000 // (read_plan._MOST_SEGMENTS // 3))
    assert plan.num_bytes == 5000 * 64


@given(offset=st.integers(0, 10_000), length=st.integers(1, 5 * MOST_BYTES))
def test_bytes_are_cut_into_reads_that_follow_each_other(offset: int, length: int) -> None:
    plan = plan_bytes(offset, length, 77)
    assert plan.offsets[0] == offset and plan.num_bytes == length and plan.lengths.max() <= MOST_BYTES
    np.testing.assert_array_equal(plan.offsets[1:], (plan.offsets + plan.lengths)[:-1])
    np.testing.assert_array_equal(plan.segments["address"].astype(np.int64) - 77, plan.offsets - offset)
    np.testing.assert_array_equal(plan.segments["length"].astype(np.int64), plan.lengths)
