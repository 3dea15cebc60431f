"""Memory that direct reads fill fast: physically in one piece.

A read's target is named to the disk one piece of physical memory at a time, and a virtual disk takes time for each. The memory of a
machine that has run for hours is in pieces of a page: reads of a megabyte then come at a third of the rate (docs/performance.md).
Moving pages into large ones asks no privilege and no setting of the system; where the kernel cannot (before Linux 6.1, or no memory is
left in one piece), they stay as they are.
"""

import mmap
from contextlib import suppress

LARGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # mmap has no name for it


def make_contiguous(mapping: mmap.mmap, offset: int, length: int) -> None:
    """Moves what lies in a mapping's large pages [offset, offset + length), multiples of `LARGE_PAGE`, into memory in one piece."""
    for page in range(offset, offset + length, LARGE_PAGE):
        mapping[page] = mapping[page]  # a large page of which nothing was touched is left out
    with suppress(OSError):
        mapping.madvise(_MADV_COLLAPSE, offset, length)


def contiguous_memory(num_bytes: int) -> mmap.mmap:
    """Memory of this process, in one piece as far as whole large pages reach; its length is a multiple of those."""
    length = -(-num_bytes // LARGE_PAGE) * LARGE_PAGE
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    make_contiguous(mapping, 0, length)
    return mapping
