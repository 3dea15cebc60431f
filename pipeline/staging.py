"""Memory beside the slab for stretches of neurons whose rows are a page or less.

A virtual disk takes about as long for a piece of half a KiB as for one of four, and a stretch that is scattered into rows is as many pieces
as it has rows. So it is read in one piece, and the processor puts the rows where they belong.
"""

import numpy as np

from ..storage.large_pages import contiguous_memory

_PAGE = 4096
_MOST_BYTES = 8 << 20  # a block of a stream; a layer that stays in memory is read only once


def is_staged(row_bytes: int, num_bytes: int) -> bool:
    """Whether a stretch of so many bytes, in rows of this size, is read in one piece first."""
    return row_bytes <= _PAGE and num_bytes <= _MOST_BYTES


class Staging:
    """Pieces of memory that are used again and again: as many as requests are under way at a time."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, num_bytes: int) -> np.ndarray:
        """[at least num_bytes] uint8."""
        for number, memory in enumerate(self._free):
            if len(memory) >= num_bytes:
                return self._free.pop(number)
        return contiguous_memory(num_bytes)

    def give_back(self, memory: np.ndarray) -> None:
        self._free.append(memory)
