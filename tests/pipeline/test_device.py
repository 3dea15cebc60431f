"""What a machine's measured figures say of sizes that were not measured."""

import pytest

from inflash.pipeline.device import KernelTimes


def test_kernels_take_what_the_line_between_measured_sizes_says() -> None:
    times = KernelTimes.of([(4e6, 5e-4), (1e6, 2e-4), (16e6, 29e-4)])
    assert [times.seconds(size) for size in (1e3, 1e6, 2e6, 4e6, 10e6)] == pytest.approx([2e-4, 2e-4, 3e-4, 5e-4, 17e-4])
    assert times.seconds(32e6) == pytest.approx(61e-4), "the last line goes on"
    assert times.slower(3).seconds(32e6) == pytest.approx(183e-4)


def test_one_measured_size_is_all_that_is_known() -> None:
    times = KernelTimes.of([(2e6, 1e-3)])
    assert [times.seconds(size) for size in (1e6, 2e6, 6e6)] == pytest.approx([1e-3, 1e-3, 3e-3])


def test_a_larger_call_never_takes_less() -> None:
    times = KernelTimes.of([(1e6, 3e-4), (4e6, 2e-4)])
    assert [times.seconds(size) for size in (1e6, 4e6, 9e6)] == pytest.approx([3e-4] * 3)
