"""The order in which requests of a batch begin: prompts that begin alike behind each other, as they share blocks of the KV cache.

Blocks that two prompts share are computed once and held once, but only while they are held, or not yet taken for something else.
Where memory has few blocks, requests that begin alike have to run at the same time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from .requests import Request

GROUP_SIZE = 128
"""Lines that are put in order at a time, and kept for it: so many may begin before one that came before them."""


Line = Sequence[Request] | None
"""The requests of a batch's line; None: it cannot run."""

Make = Callable[[Sequence[int]], Sequence[Line]]
"""From the indices of lines to what they ask."""


def in_groups(indices: Iterable[int], make: Make) -> Iterator[list[tuple[int, Line]]]:
    """Lines by their indices, `GROUP_SIZE` at a time."""
    indices = iter(indices)
    while group := list(islice(indices, GROUP_SIZE)):
        yield list(zip(group, make(group), strict=True))


def alike_together(indices: Iterable[int], make: Make) -> Iterator[tuple[int, Line]]:
    """Lines by their indices, `GROUP_SIZE` at a time in the order of their first prompts' tokens, as words in a dictionary.

    Args:
      indices: in the order of the batch.
      make: what cannot run comes first in its group.
    """
    for made in in_groups(indices, make):
        yield from sorted(made, key=lambda pair: (list(pair[1][0].prompt_token_ids) if pair[1] else [], pair[0]))
