"""One shared-memory mapping for everything that loaders fill and kernels read.

It is a memfd: nothing has a name in the file system, so nothing can be left behind, whichever process is killed. Regions are carved
from it once, before any loader starts, and never move.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ..errors import RunError

ALIGNMENT = 4096  # a page, and what any disk asks of a direct read's memory


class SlabPlan:
    """Adds up regions before the slab is made."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> int:
        """Takes `num_bytes`; returns the region's offset, a multiple of `ALIGNMENT`."""
        offset = self.num_bytes
        self.num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return offset


class Slab:
    """The mapping, in the engine (which makes it) or in a loader (which is given its descriptor)."""

    def __init__(self, num_bytes: int, descriptor: int | None = None) -> None:
        self.num_bytes = num_bytes
        made = descriptor is None
        descriptor = os.memfd_create("inflash-slab") if descriptor is None else descriptor
        try:
            if made:
                os.ftruncate(descriptor, num_bytes)
            mapping = mmap.mmap(descriptor, num_bytes)
        except OSError as error:
            os.close(descriptor)
            raise RunError(f"shared memory: {num_bytes} bytes cannot be had: {error.strerror}") from error
        # Rows are taken from all over the slab, and the kernel pins the pages of each read: few large pages make both cheaper.
        with suppress(OSError):  # a kernel may have none
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(mapping, np.uint8)
        self.descriptor: int | None = descriptor

    def array(self, offset: int, shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
        """A writable view of `shape` at `offset` bytes."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if offset + num_bytes > self.num_bytes:
            raise RunError(f"slab: a region of {num_bytes} bytes at {offset} ends past the slab's {self.num_bytes} bytes")
        return self._bytes[offset : offset + num_bytes].view(dtype).reshape(shape)

    def close(self) -> None:
        """Gives the descriptor back; the memory goes when the last view of it does. Idempotent."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
