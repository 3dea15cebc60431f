"""The order in which requests of a batch begin: prompts that begin alike behind each other, as they share blocks of the KV cache.

Blocks that two prompts share are computed once and held once, but only while they are held, or not yet taken for something else.
Where memory has few blocks, requests that begin alike have to run at the same time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from .requests import Request

GROUP_SIZE, GROUP_BYTES = 128, 1 << 20
"""Lines, and bytes of them, that are put in order at a time, and kept for it: so many may begin before one that came before them."""

Line = Sequence[Request] | None
"""The requests of a batch's line; None: it cannot run."""

Make = Callable[[Sequence[int]], Sequence[Line]]
"""From the indices of lines to what they ask."""


NumBytes = Callable[[int], int]
"""How long a line is."""


def in_groups(indices: Iterable[int], make: Make, num_bytes: NumBytes) -> Iterator[list[tuple[int, Line]]]:
    """Lines by their indices, a group at a time; a line that is longer than GROUP_BYTES is one by itself."""
    group: list[int] = []
    held = 0
    for index in indices:
        length = num_bytes(index)
        if group and (len(group) == GROUP_SIZE or held + length > GROUP_BYTES):
            yield list(zip(group, make(group), strict=True))
            group, held = [], 0
        group.append(index)
        held += length
    if group:
        yield list(zip(group, make(group), strict=True))


def alike_together(indices: Iterable[int], make: Make, num_bytes: NumBytes) -> Iterator[tuple[int, Line]]:
    """Lines by their indices, a group at a time in the order of their first prompts' tokens, as words in a dictionary.

    Args:
      indices: in the order of the batch.
      make: what cannot run comes first in its group.
      num_bytes: see `in_groups`.
    """
    for made in in_groups(indices, make, num_bytes):
        yield from sorted(made, key=lambda pair: (list(pair[1][0].prompt_token_ids) if pair[1] else [], pair[0]))
