"""Memory that direct reads fill fast: physically in one piece.

A read's target is named to the disk one piece of physical memory at a time, and a virtual disk takes time for each. The memory of a
machine that has run for hours is in pieces of a page: reads of a megabyte then come at a third of the rate (docs/performance.md).
Moving pages into large ones asks no privilege and no setting of the system; where the kernel cannot (before Linux 6.1, or no memory is
left in one piece), they stay as they are. The mapping has to begin at a multiple of a large page, which `mmap` does not offer.
"""

import ctypes
import mmap
import os
import weakref

import numpy as np

LARGE_PAGE = 2 << 20
_MADV_COLLAPSE, _MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 25, 0x10, 0x4000, 0
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_aligned(num_bytes: int, descriptor: int | None = None) -> np.ndarray:
    """A file's first bytes, shared, or memory of this process: [num_bytes] uint8 at a multiple of `LARGE_PAGE`, there as long as a view.

    Raises:
      OSError: the system refuses.
    """
    room = num_bytes + LARGE_PAGE  # of addresses, of which the part with the right beginning is used
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    first = _map(None, room, _PROT_NONE, anonymous | _MAP_NORESERVE, -1)
    address = -(-first // LARGE_PAGE) * LARGE_PAGE
    kind, file = (anonymous, -1) if descriptor is None else (mmap.MAP_SHARED, descriptor)
    try:
        _map(address, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, kind | _MAP_FIXED, file)
    except OSError:
        _libc.munmap(first, room)
        raise
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(memory, _libc.munmap, first, room).atexit = False  # views may outlive the interpreter's last steps
    return np.frombuffer(memory, np.uint8)


def _map(address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, num_bytes, protection, flags, descriptor, 0)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found


def advise(memory: np.ndarray, advice: int) -> bool:
    """`madvise` for memory that begins at a page: whether the kernel did it."""
    return _libc.madvise(memory.ctypes.data, memory.nbytes, advice) == 0


def make_contiguous(memory: np.ndarray) -> bool:
    """Moves the large pages of such memory into one piece each; says whether the kernel could."""
    memory[::LARGE_PAGE] |= 0  # writes: a large page of which nothing was ever touched is refused
    return advise(memory, _MADV_COLLAPSE)


def contiguous_memory(num_bytes: int) -> np.ndarray:
    """Memory of this process, [at least num_bytes] uint8, each large page in one piece."""
    memory = map_aligned(-(-num_bytes // LARGE_PAGE) * LARGE_PAGE)
    make_contiguous(memory)
    return memory
