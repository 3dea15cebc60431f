"""One shared-memory mapping for everything that loaders fill and kernels read.

It is a memfd: nothing has a name in the file system, so nothing can be left behind, whichever process is killed. Regions are carved
from it once, before any loader starts, and never move.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..errors import RunError
from ..storage.large_pages import LARGE_PAGE, advise, make_contiguous, map_aligned

ALIGNMENT = 4096  # a page, and what any disk asks of a direct read's memory


class SlabPlan:
    """Adds up regions before the slab is made.

    Attributes:
      num_bytes: of all regions. What nobody touches takes no memory.
      large: (offset, length) of stretches that large pages may serve.
      contiguous: likewise, of those that are to lie in one piece from the beginning.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.large: list[tuple[int, int]] = []
        self.contiguous: list[tuple[int, int]] = []

    def reserve(self, num_bytes: int, used_bytes: int | None = None) -> int:
        """Takes `num_bytes`, of which the first `used_bytes` (None: all) will be used; returns the region's offset.

        It is a multiple of `ALIGNMENT`, and of a large page where the region has room for one.
        """
        offset = self._align(LARGE_PAGE if num_bytes >= LARGE_PAGE else ALIGNMENT)
        self.num_bytes = offset + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        # Only whole large pages of what is used: the rest of one would be memory that no account has.
        if whole := (num_bytes if used_bytes is None else used_bytes) // LARGE_PAGE * LARGE_PAGE:
            self.large.append((offset, whole))
        return offset

    @contextmanager
    def in_one_piece(self) -> Iterator[None]:
        """What is reserved meanwhile is filled by long reads, all of it and soon."""
        start = self._align(LARGE_PAGE)
        yield
        self.contiguous.append((start, self._align(LARGE_PAGE) - start))

    def _align(self, alignment: int) -> int:
        self.num_bytes = -(-self.num_bytes // alignment) * alignment
        return self.num_bytes


class Slab:
    """The mapping, in the engine (which makes it) or in a loader (which is given its descriptor)."""

    def __init__(
        self,
        num_bytes: int,
        descriptor: int | None = None,
        large: Sequence[tuple[int, int]] = (),
        contiguous: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Makes the mapping, or maps what a descriptor stands for; `large` and `contiguous` are those of `SlabPlan`."""
        self.num_bytes, self.large = num_bytes, large
        made = descriptor is None
        descriptor = os.memfd_create("inflash-slab") if descriptor is None else descriptor
        try:
            if made:
                os.ftruncate(descriptor, num_bytes)
            self._bytes = map_aligned(num_bytes, descriptor)
        except OSError as error:
            os.close(descriptor)
            raise RunError(f"shared memory: {num_bytes} bytes cannot be had: {error.strerror}") from error
        # Rows are taken from all over the slab, and the kernel pins the pages of each read: few large pages make both cheaper.
        for offset, length in large:
            advise(self._bytes[offset : offset + length], mmap.MADV_HUGEPAGE)  # a kernel may have none
        for offset, length in contiguous:
            make_contiguous(self._bytes[offset : offset + length])
        self.descriptor: int | None = descriptor

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
        """A writable view of `shape` at `offset` bytes."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if offset + num_bytes > self.num_bytes:
            raise RunError(f"slab: a region of {num_bytes} bytes at {offset} ends past the slab's {self.num_bytes} bytes")
        return self._bytes[offset : offset + num_bytes].view(dtype).reshape(shape)

    def discard(self, offset: int, num_bytes: int) -> None:
        """Gives the memory of whole pages back to the system; they read as zeros from now on."""
        first, last = -(-offset // ALIGNMENT) * ALIGNMENT, (offset + num_bytes) // ALIGNMENT * ALIGNMENT
        if last > first:
            advise(self._bytes[first:last], mmap.MADV_REMOVE)

    def close(self) -> None:
        """Gives the descriptor back; the memory goes when the last view of it does. Idempotent."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
