import gc
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflash.errors import RunError
from inflash.pipeline.slab import ALIGNMENT, Slab, SlabPlan
from inflash.pipeline.weights import alias
from inflash.storage.large_pages import LARGE_PAGE


@given(sizes=st.lists(st.integers(0, 20000), min_size=1, max_size=20))
def test_regions_are_aligned_and_apart(sizes: list[int]) -> None:
    plan = SlabPlan()
    offsets = [plan.reserve(size) for size in sizes]
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert all(end <= offset for end, offset in zip(ends, offsets[1:], strict=False))
    assert ends[-1] <= plan.num_bytes < ends[-1] + ALIGNMENT


def test_two_mappings_see_the_same_bytes() -> None:
    """The second one is a loader's."""
    slab = Slab(3 * ALIGNMENT)
    assert slab.descriptor is not None
    other = Slab(3 * ALIGNMENT, os.dup(slab.descriptor))
    values = np.random.default_rng().standard_normal((5, 7)).astype(np.float32)
    slab.array(ALIGNMENT, (5, 7), np.float32)[:] = values
    np.testing.assert_array_equal(other.array(ALIGNMENT, (5, 7), np.float32), values)
    assert not other.array(0, (ALIGNMENT,), np.uint8).any()
    slab.close()
    other.close()


def test_jax_uses_the_memory_in_place() -> None:
    slab = Slab(ALIGNMENT)
    view = slab.array(0, (8, 16), np.float32)
    array = alias(view)
    view[3] = 7
    np.testing.assert_array_equal(jax.device_get(array)[3], np.full(16, 7, np.float32))
    slab.close()


def test_memory_that_jax_cannot_use_in_place_is_refused() -> None:
    slab = Slab(ALIGNMENT)
    with pytest.raises(RunError, match=r"JAX copied shared memory of shape \(8,\)"):
        alias(slab.array(4, (8,), np.float32))
    slab.close()


def test_a_region_past_the_end_is_refused() -> None:
    slab = Slab(ALIGNMENT)
    slab.array(ALIGNMENT - 8, (2,), np.float32)
    with pytest.raises(RunError, match="a region of 12 bytes at 4088 ends past the slab's 4096 bytes"):
        slab.array(ALIGNMENT - 8, (3,), np.float32)
    slab.close()


def test_more_memory_than_there_can_be_is_refused() -> None:
    gc.collect()  # what other tests left to it
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RunError, match=rf"shared memory: {1 << 60} bytes cannot be had"):
        Slab(1 << 60)
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_twice_gives_the_descriptor_back_once() -> None:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    slab = Slab(ALIGNMENT)
    view = slab.array(0, (4,), np.uint8)
    slab.close()
    slab.close()
    view[:] = 3  # views live on, and the mapping's own descriptor with them
    assert view.tolist() == [3, 3, 3, 3]
    del slab, view
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_it_has_no_name_in_the_file_system() -> None:
    slab = Slab(ALIGNMENT)
    assert slab.descriptor is not None
    assert Path(os.readlink(f"/proc/self/fd/{slab.descriptor}")).name == "memfd:inflash-slab (deleted)"
    slab.close()


def test_what_long_reads_fill_lies_in_large_pages() -> None:
    """Regions in one piece begin and end with large pages, hold zeros and are seen by loaders, whether or not the kernel moved them."""
    plan = SlabPlan()
    plan.reserve(5000)
    with plan.in_one_piece():
        first, second = plan.reserve(3 << 20), plan.reserve(100)
    after = plan.reserve(8)
    assert plan.contiguous == [(LARGE_PAGE, 2 * LARGE_PAGE)]
    assert (first, second, after) == (LARGE_PAGE, LARGE_PAGE + (3 << 20), 3 * LARGE_PAGE)
    slab = Slab(plan.num_bytes, contiguous=plan.contiguous)
    assert slab.descriptor is not None
    assert not slab.array(0, (plan.num_bytes,), np.uint8).any()
    other = Slab(plan.num_bytes, os.dup(slab.descriptor))
    slab.array(first, (100,), np.uint8)[:] = np.arange(100)
    np.testing.assert_array_equal(other.array(first, (100,), np.uint8), np.arange(100))
    slab.close()
    other.close()
