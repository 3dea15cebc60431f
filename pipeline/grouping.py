"""The order in which requests of a batch begin: prompts that begin alike behind each other, as they share blocks of the KV cache.

Blocks that two prompts share are computed once and held once, but only while they are held, or not yet taken for something else.
Where memory has few blocks, requests that begin alike have to run at the same time.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from .requests import Request

GROUP_SIZE = 128
"""Requests that are put in order at a time, and kept for it: so many may begin before one that came before them."""


def alike_together(indices: Iterable[int], make: Callable[[int], Request | None]) -> Iterator[tuple[int, Request | None]]:
    """Requests by their indices, `GROUP_SIZE` at a time in the order of their prompts' tokens, as words in a dictionary.

    Args:
      indices: in the order of the batch.
      make: from an index to the request; None: it cannot run, and comes first in its group.
    """
    indices = iter(indices)
    while made := [(index, make(index)) for index in islice(indices, GROUP_SIZE)]:
        yield from sorted(made, key=lambda pair: (list(pair[1].prompt_token_ids) if pair[1] else [], pair[0]))
