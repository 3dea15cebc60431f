"""Like prompts together, and nobody waits for more than a group."""

from collections.abc import Sequence
from itertools import pairwise, zip_longest

from hypothesis import given
from hypothesis import strategies as st

from inflash import SamplingParams
from inflash.pipeline.grouping import GROUP_BYTES, GROUP_SIZE, alike_together, in_groups
from inflash.pipeline.requests import Request

PARAMS = SamplingParams()


def request(number: int, token_ids: list[int]) -> Request:
    return Request(request_id="", prompt=None, prompt_token_ids=token_ids, sampling_params=PARAMS, number=number)


@given(st.integers(0, 3 * GROUP_SIZE), st.integers(1, 9), st.integers(2, 40))
def test_prompts_that_begin_alike_are_neighbours_and_nobody_starves(count: int, num_beginnings: int, refused_every: int) -> None:
    made: list[int] = []

    def make(indices: Sequence[int]) -> list[list[Request] | None]:
        made.extend(indices)
        beginnings = [[index % num_beginnings] * 40 for index in indices]
        return [
            [request(index, [*beginning, index]), request(index, [0])] if index % refused_every else None
            for index, beginning in zip(indices, beginnings, strict=True)
        ]

    order = []
    for place, (index, one) in enumerate(alike_together(range(count), make, lambda index: 100)):
        assert len(made) <= place + GROUP_SIZE  # no more are kept
        assert abs(place - index) < GROUP_SIZE
        assert (one is None) == (index % refused_every == 0) and (one is None or one[0].number == index)
        order.append((index, one))
    assert sorted(index for index, _ in order) == list(range(count)) == made
    for start in range(0, count, GROUP_SIZE):
        runs = [one[0].prompt_token_ids[0] for _, one in order[start : start + GROUP_SIZE] if one]
        assert sum(before != after for before, after in pairwise(runs)) == max(len(set(runs)) - 1, 0)


@given(st.lists(st.sampled_from([1, 9000, GROUP_BYTES // 3, GROUP_BYTES, 4 * GROUP_BYTES]), max_size=3 * GROUP_SIZE))
def test_a_group_holds_no_more_than_its_bytes_or_one_line(lengths: list[int]) -> None:
    groups = [
        [index for index, _ in group]
        for group in in_groups(range(len(lengths)), lambda indices: [None] * len(indices), lengths.__getitem__)
    ]
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    for group, following in zip_longest(groups, groups[1:], fillvalue=[]):
        held = sum(lengths[index] for index in group)
        assert group and len(group) <= GROUP_SIZE and (held <= GROUP_BYTES or len(group) == 1)
        if following:  # it ended for a reason
            assert len(group) == GROUP_SIZE or held + lengths[following[0]] > GROUP_BYTES
