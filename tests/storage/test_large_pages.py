"""Memory at the right addresses, that keeps what it holds, whether or not the kernel moves it."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from inflash.storage.large_pages import LARGE_PAGE, advise, contiguous_memory, make_contiguous, map_aligned


@pytest.mark.parametrize("num_bytes", [4096, LARGE_PAGE, 5 * LARGE_PAGE + 4096])
def test_a_file_is_seen_by_all_who_map_it(num_bytes: int) -> None:
    descriptor = os.memfd_create("inflash-test")
    os.ftruncate(descriptor, num_bytes)
    one, other = map_aligned(num_bytes, descriptor), map_aligned(num_bytes, descriptor)
    os.close(descriptor)
    assert one.ctypes.data % LARGE_PAGE == other.ctypes.data % LARGE_PAGE == 0
    assert one.shape == (num_bytes,) and not one.any()
    one[:] = np.random.default_rng().integers(0, 256, num_bytes, np.uint8)
    np.testing.assert_array_equal(other, one)


def test_moving_keeps_what_is_there() -> None:
    memory = map_aligned(4 * LARGE_PAGE)
    memory[:] = np.random.default_rng().integers(0, 256, len(memory), np.uint8)
    before = memory.copy()
    if not make_contiguous(memory[LARGE_PAGE:]):
        pytest.skip("this kernel moves nothing into large pages, or has none left")
    np.testing.assert_array_equal(memory, before)
    large = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("AnonHugePages:")]
    assert sum(int(line.split()[1]) for line in large) >= 3 * LARGE_PAGE >> 10


def test_memory_goes_with_its_last_view() -> None:
    def is_mapped(address: int) -> bool:
        stretches = (line.split(maxsplit=1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(first, 16) <= address < int(end, 16) for first, end in stretches)

    memory = contiguous_memory(64 << 20)
    view, last = memory[:100], memory.ctypes.data + len(memory) - 1
    del memory
    gc.collect()
    view[:] = 1
    assert is_mapped(last)
    del view
    gc.collect()
    assert not is_mapped(last)


def test_what_cannot_be_had_is_an_error() -> None:
    with pytest.raises(OSError, match="annot allocate memory"):
        map_aligned(1 << 60)
    assert not advise(map_aligned(4096), -1)
